"""What may be asked of the device that a tensor lives on."""

import torch
from torch import Tensor


def can_look(x: Tensor) -> bool:
    """Whether a look at the data costs nothing. On other devices than a CPU it would wait for the device."""
    return x.device.type == "cpu"


def can_wait(x: Tensor) -> bool:
    """Whether one may wait for the device at all: not while its work is recorded as a CUDA graph."""
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
