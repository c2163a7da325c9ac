"""nvamp: loss functions for language models on one engine, at the cost of a fused cross-entropy."""

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
