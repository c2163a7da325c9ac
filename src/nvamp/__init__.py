"""NVAMP: a variance-aware, max-penalized loss for language models, at the cost of a fused cross-entropy."""

from nvamp import functional
from nvamp.functional import NVAMPStats
from nvamp.losses import LinearNVAMPLoss, NVAMPLoss, TokenNVAMPLoss

__version__ = "0.1.0"
__all__ = ["LinearNVAMPLoss", "NVAMPLoss", "NVAMPStats", "TokenNVAMPLoss", "functional"]
