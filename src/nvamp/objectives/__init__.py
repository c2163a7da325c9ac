"""The objectives: each turns the losses of a batch's tokens into one number and a weight per token.

Each objective has a file of its own and a line in `OBJECTIVES`, where `parse` finds it.
"""

from nvamp.objectives.base import Batch, Objective, Result, Statistics
from nvamp.objectives.clipped_policy import ClippedPolicy
from nvamp.objectives.cross_entropy import CrossEntropy
from nvamp.objectives.dft import DFT
from nvamp.objectives.entropy_weighted import EntropyWeighted
from nvamp.objectives.focal import Focal
from nvamp.objectives.gce import GCE
from nvamp.objectives.nvamp import GRADIENTS, NVAMP, Gradient
from nvamp.objectives.spec import OBJECTIVES, parse
from nvamp.objectives.tail import Tail
from nvamp.objectives.tilted import Tilted
from nvamp.objectives.token_weighted import TokenWeighted
from nvamp.objectives.truncated import Truncated
from nvamp.options import between, option

__all__ = [
    "DFT",
    "GCE",
    "GRADIENTS",
    "NVAMP",
    "OBJECTIVES",
    "Batch",
    "ClippedPolicy",
    "CrossEntropy",
    "EntropyWeighted",
    "Focal",
    "Gradient",
    "Objective",
    "Result",
    "Statistics",
    "Tail",
    "Tilted",
    "TokenWeighted",
    "Truncated",
    "between",
    "option",
    "parse",
]
