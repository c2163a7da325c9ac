"""The objectives: each turns the losses of a batch's tokens into one number and a weight per token.

One file an objective, and one line in `OBJECTIVES`, by which `parse` knows it.
"""

from nvamp.objectives.base import Batch, Objective, Result, Statistics
from nvamp.objectives.cross_entropy import CrossEntropy
from nvamp.objectives.focal import Focal
from nvamp.objectives.nvamp import GRADIENTS, NVAMP, Gradient
from nvamp.objectives.spec import OBJECTIVES, parse

__all__ = [
    "GRADIENTS",
    "NVAMP",
    "OBJECTIVES",
    "Batch",
    "CrossEntropy",
    "Focal",
    "Gradient",
    "Objective",
    "Result",
    "Statistics",
    "parse",
]
