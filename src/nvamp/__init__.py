"""nvamp: loss functions for language models on one engine, at the cost of a fused cross-entropy."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvamp import functional, objectives
    from nvamp.apply import NVAMPStats
    from nvamp.losses import LinearLoss, LinearNVAMPLoss, Loss, NVAMPLoss, TokenLoss, TokenNVAMPLoss

__version__ = "0.1.0"
__all__ = [
    "LinearLoss",
    "LinearNVAMPLoss",
    "Loss",
    "NVAMPLoss",
    "NVAMPStats",
    "TokenLoss",
    "TokenNVAMPLoss",
    "functional",
    "objectives",
]

if not TYPE_CHECKING:  # or else type checkers would believe in names that do not exist

    def __getattr__(name: str) -> object:
        """Import PyTorch with the first name that needs it: `nvamp --version` needs none."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name in ("functional", "objectives"):
            return import_module(f"nvamp.{name}")
        home = "nvamp.apply" if name == "NVAMPStats" else "nvamp.losses"
        found = globals()[name] = getattr(import_module(home), name)
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
