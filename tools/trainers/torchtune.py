"""torchtune's own recipe for full fine-tuning, whose configuration names a loss of ours."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tools.trainers.comparing import Outcome, Result, compare

VOCABULARY, ROWS, LENGTH, STEPS = 64, 48, 16, 6
LOSSES: dict[str | None, dict[str, Any]] = {
    None: {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
    "ce": {"_component_": "nvamp.NVAMPLoss", "shift": False, "alpha": 0.0, "beta": 1.0, "gamma": 0.0},
    "nvamp": {"_component_": "nvamp.NVAMPLoss", "shift": False},
}
HERE = "tools.trainers.torchtune"
logged: list[float] = []


def results() -> Iterator[Result]:
    yield compare("`full_finetune_single_device`, `loss._component_: nvamp.NVAMPLoss`, `shift: False`", train)


def train(objective: str | None) -> Outcome:
    from omegaconf import OmegaConf

    logged.clear()
    with TemporaryDirectory() as folder:
        configuration = {
            "output_dir": folder,
            "model": {
                "_component_": "torchtune.models.llama3.llama3",
                "vocab_size": VOCABULARY,
                "num_layers": 2,
                "num_heads": 4,
                "num_kv_heads": 2,
                "embed_dim": 32,
                "intermediate_dim": 64,
                "max_seq_len": 64,
            },
            "tokenizer": {"_component_": f"{HERE}.tokenizer"},
            "dataset": {"_component_": f"{HERE}.rows"},
            "checkpointer": {"_component_": f"{HERE}.Checkpointer", "model_type": "LLAMA3"},
            "metric_logger": {"_component_": f"{HERE}.Logger"},
            "loss": LOSSES[objective],
            "optimizer": {"_component_": "torch.optim.SGD", "lr": 0.3},
            "optimizer_in_bwd": False,
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "epochs": 1,
            "max_steps_per_epoch": STEPS,
            "resume_from_checkpoint": False,
            "seed": 0,
            "shuffle": False,
            "compile": False,
            "device": "cpu",
            "dtype": "fp32",
        }
        made = recipe()(OmegaConf.create(configuration))
        made.setup(OmegaConf.create(configuration))
        start = weights(made._model)
        made.train()
        return Outcome(torch.tensor(logged), weights(made._model) - start)


def recipe() -> Any:
    """The recipe's class; torchtune keeps its recipes in files that are no modules."""
    import torchtune

    path = Path(torchtune.__file__).parents[1] / "recipes/full_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("full_finetune_single_device", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FullFinetuneRecipeSingleDevice


def weights(model: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def tokenizer() -> Any:
    return SimpleNamespace(pad_id=0)


def rows(tokenizer: Any) -> list[dict[str, list[int]]]:
    """Random tokens; of every row another number is scored."""
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        {"tokens": row, "labels": row[: 2 + i % LENGTH] + [-100] * (LENGTH - 2 - i % LENGTH)}
        for i, row in enumerate(tokens)
    ]


class Checkpointer:
    """Starts from the same random weights every time, and saves nothing."""

    def __init__(self, model_type: str, should_load_recipe_state: bool) -> None: ...

    def load_checkpoint(self) -> dict[str, Any]:
        from torchtune.models.llama3 import llama3

        torch.manual_seed(1)
        model = llama3(VOCABULARY, 2, 4, 2, 32, 64, intermediate_dim=64)
        return {"model": model.state_dict()}

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None: ...


class Logger:
    """Keeps the losses."""

    def log_config(self, config: Any) -> None: ...

    def log_dict(self, values: Any, step: int) -> None:
        logged.append(float(values["loss"]))

    def close(self) -> None: ...
