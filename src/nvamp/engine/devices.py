"""Which questions code may ask of the device of a tensor."""

import torch
from torch import Tensor


def can_look(x: Tensor) -> bool:
    """Whether reading the data costs nothing. On any device but a CPU it would wait for the device."""
    return x.device.type == "cpu"


def can_wait(x: Tensor) -> bool:
    """Whether waiting for the device is allowed. It is not while a CUDA graph is recorded."""
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())
