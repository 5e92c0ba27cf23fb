"""Host memory of somebody else, pinned where it lies, so that a GPU copies from it at full speed."""

from __future__ import annotations

import contextlib
import weakref

import torch

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of the process


class PinnedRange:
    """Pages of host memory registered with CUDA until `close`, or until this object is gone.

    owner: what keeps the memory mapped; held until then. Errors: RuntimeError when CUDA refuses.
    """

    def __init__(self, address: int, num_bytes: int, owner: object, device: torch.device) -> None:
        try:
            import cupy

            with torch.cuda.device(device):
                cupy.cuda.runtime.hostRegister(address, num_bytes, _PORTABLE)
        except Exception as error:  # CuPy is absent, or its own exception of the runtime
            raise RuntimeError(f"{num_bytes} bytes could not be pinned: {error}") from error
        self._finalizer = weakref.finalize(self, _unregister, address, owner, device)

    def close(self) -> None:
        """No copy from the range may be under way. Closing twice is fine."""
        self._finalizer()


def _unregister(address: int, owner: object, device: torch.device) -> None:
    import cupy

    with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError), torch.cuda.device(device):
        cupy.cuda.runtime.deviceSynchronize()  # nobody may have closed it, and a copy may be under way
        cupy.cuda.runtime.hostUnregister(address)
