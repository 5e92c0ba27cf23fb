"""The C++ module (native/bindings/module.cpp); its callers are hostcompute's own and convert what they take."""

from typing import Any

def __getattr__(name: str) -> Any: ...
