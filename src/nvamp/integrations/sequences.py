"""Sequences that Accelerate splits over ranks, as its `ParallelismConfig` says."""

import os
import sys
from typing import Any


def check_whole_sequences(criterion: object, config: Any = None) -> None:
    """Raises a `ValueError` if a `Trainer` would not train with a `compute_loss_func` of the criterion.

    Args:
        config: the `ParallelismConfig` of the trainer; by default the one of the process, as far as Accelerate
            or the environment that `accelerate launch` makes already knows it.
    """
    config = config or _of_process()
    if config is None:
        return
    ways = (
        "use patch(model, LinearLoss(...)) or model.loss_function = loss_function(Loss(...)), which take the "
        "labels that were shifted before"
    )
    if config.sp_size > 1:
        raise ValueError(f"under sequence parallelism, sp_size={config.sp_size}, a Trainer ignores its compute_loss_func: {ways}")
    if config.cp_size > 1 and getattr(criterion, "shift", True):
        raise ValueError(
            f"under context parallelism, cp_size={config.cp_size}, a rank has a part of each sequence, and "
            f"compute_loss_func would shift the labels within it: {ways}"
        )


def _of_process() -> Any:
    if "accelerate" not in sys.modules:
        return None
    from accelerate import ParallelismConfig
    from accelerate.state import AcceleratorState

    config = AcceleratorState._shared_state.get("parallelism_config")
    if config is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        config = ParallelismConfig()
    return config
