"""DeepSpeed under transformers' `Trainer`: ZeRO-1 to -3 on two ranks."""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nvamp import LinearLoss
from nvamp.integrations.transformers import patch
from nvamp.objectives import parse
from tools.trainers.comparing import Outcome, Result, compare
from tools.trainers.huggingface import logged, trainer, weights
from tools.trainers.ranks import on_ranks

WORLD = 2


def results() -> Iterator[Result]:
    for stage in (1, 2, 3):
        for way in ("compute_loss_func", "patch"):
            yield compare(f"ZeRO-{stage} on {WORLD} ranks, `{way}`", partial(train, stage, way))


def train(stage: int, way: str, objective: str | None) -> Outcome:
    return trained(stage, objective and way, objective)


@cache
def trained(stage: int, way: str | None, objective: str | None) -> Outcome:
    outcome: Outcome = on_ranks(WORLD, on_rank, stage, way, objective)
    return outcome


def on_rank(stage: int, way: str | None, objective: str | None) -> Outcome:
    config = {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    with TemporaryDirectory() as folder:
        made = trainer(
            None if way == "patch" else objective, Path(folder), deepspeed=config, ddp_backend="gloo"
        )
        start = weights(made.model)
        if way == "patch":
            patch(made.model, LinearLoss(parse(objective or "ce")))
        made.train()
        return Outcome(logged(made), whole(made.model) - start)


def whole(model: Any) -> Any:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return weights(model)
