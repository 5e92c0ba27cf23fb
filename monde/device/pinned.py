"""Host memory of somebody else, pinned where it lies, so that a GPU copies from it at full speed."""

from __future__ import annotations

import contextlib
import weakref


class PinnedRange:
    """Pages of host memory registered with CUDA until `close`, or until this object is gone.

    owner: what keeps the memory mapped; held until then. Errors: RuntimeError when CUDA refuses.
    """

    def __init__(self, address: int, num_bytes: int, owner: object) -> None:
        try:
            import cupy

            cupy.cuda.runtime.hostRegister(address, num_bytes, 0)
        except Exception as error:  # CuPy is absent, or its own exception of the runtime
            raise RuntimeError(f"{num_bytes} bytes could not be pinned: {error}") from error
        self._finalizer = weakref.finalize(self, _unregister, address, owner)

    def close(self) -> None:
        """No copy from the range may be under way. Closing twice is fine."""
        self._finalizer()


def _unregister(address: int, owner: object) -> None:
    import cupy

    with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):  # the process may be leaving
        cupy.cuda.runtime.deviceSynchronize()
        cupy.cuda.runtime.hostUnregister(address)
