"""Sequences that Accelerate splits over ranks, as its `ParallelismConfig` says."""

import os
import sys
from typing import Any


def check_whole_sequences(criterion: object, config: Any = None) -> None:
    """Raises a `ValueError` if a `Trainer` would not train with a `compute_loss_func` of the criterion.

    Args:
        config: the `ParallelismConfig` of the trainer; by default that of the process, if Accelerate has one
            already or `accelerate launch` has set one in the environment.
    """
    config = config or _of_process()
    if config is None:
        return
    ways = (
        "use patch(model, LinearLoss(...)) or model.loss_function = loss_function(Loss(...), model), which "
        "get labels that were shifted before the sequences were split"
    )
    if (ranks := getattr(config, "sp_size", 1)) > 1:
        raise ValueError(
            f"under sequence parallelism, sp_size={ranks}, a Trainer ignores its compute_loss_func: {ways}"
        )
    if (ranks := getattr(config, "cp_size", 1)) > 1 and getattr(criterion, "shift", True):
        raise ValueError(
            f"under context parallelism, cp_size={ranks}, each rank has a part of a sequence, and "
            f"compute_loss_func would shift the labels within it: {ways}"
        )


def _of_process() -> Any:
    if "accelerate" not in sys.modules:
        return None
    from accelerate.state import AcceleratorState

    config = AcceleratorState._shared_state.get("parallelism_config")
    if config is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        from accelerate.parallelism_config import ParallelismConfig  # Accelerate 1.10 and later

        config = ParallelismConfig()
    return config
