"""ms-swift's fine-tuning, with a loss of ours in its `loss_map`."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nvamp import Loss
from nvamp.integrations.transformers import compute_loss_func
from nvamp.objectives import parse
from tools.trainers.comparing import Outcome, Result, compare
from tools.trainers.huggingface import ARGUMENTS, Watch, save


def results() -> Iterator[Result]:
    yield compare("`sft_main` with `loss_type`, a name added to `loss_map`", train)


def train(objective: str | None) -> Outcome:
    from swift.loss import loss_map
    from swift.pipelines import SwiftSft

    loss_map["nvamp"] = lambda args, trainer: compute_loss_func(Loss(parse(objective or "ce")))
    watch = Watch(None)

    class Sft(SwiftSft):  # type: ignore[misc]  # swift is untyped here
        def train(self, trainer: Any) -> Any:
            trainer.add_callback(watch)
            return super().train(trainer)

    with TemporaryDirectory() as folder:
        save(Path(folder))
        arguments = {
            "model": folder,
            "model_type": "llama",
            "template": "dummy",
            "tuner_type": "full",
            "torch_dtype": "float32",
            "dataset": f"{folder}/data.json",
            "output_dir": f"{folder}/out",
            "loss_type": objective and "nvamp",
            **ARGUMENTS,
        }
        given = {f"--{name}": str(value) for name, value in arguments.items() if value is not None}
        text = [word for pair in given.items() for word in pair]
        Sft(text).main()
    assert watch.outcome is not None
    return watch.outcome
