"""The list of backends, and the choice of one for a tensor."""

from importlib.util import find_spec
from typing import cast

from torch import Tensor

from nvamp.engine import chunked
from nvamp.engine.backend import Backend

NAMES = ("reference", "chunked", "triton")
# Without a choice of the caller, the first of these that is installed.
OF_DEVICE = {"cuda": ("triton", "chunked")}  # ROCm calls its devices cuda too
HAS_TRITON = find_spec("triton") is not None


def check_backend(backend: str | None) -> None:
    """Raises a `ValueError` for a backend that does not exist."""
    if backend is not None and backend not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, or None, got {backend!r}")
    if backend == "triton" and not HAS_TRITON:
        raise ValueError('backend="triton" needs the package triton, which is not installed')


def backend_for(x: Tensor, backend: str | None) -> str:
    """The backend that serves `x`: the one asked for, or the best one of its device."""
    check_backend(backend)
    candidates = OF_DEVICE.get(x.device.type, ("chunked",))
    return backend or next(name for name in candidates if name != "triton" or HAS_TRITON)


def load(name: str) -> Backend:
    """The backend with this name. `"reference"` is not one of them: autograd differentiates it."""
    if name == "triton":
        from nvamp.engine import triton  # only here: it needs the package of that name

        return cast(Backend, triton)
    return cast(Backend, chunked)
