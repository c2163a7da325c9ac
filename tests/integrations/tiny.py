"""A tiny model, rows of random tokens, and a `Trainer` that leaves nothing behind but what the tests look at."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset

from tests.engine.problems import IGNORED

ROWS, SEQ, V = 64, 12, 31
ALL_TERMS = {"alpha": 1.0, "beta": 0.5, "gamma": 0.7}  # large enough that each shows
CROSS_ENTROPY = {"alpha": 0.0, "beta": 1.0, "gamma": 0.0}
# Arguments of a Trainer on a CPU that logs every step and leaves nothing else behind ...
LOGGED: dict[str, Any] = {
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}
# ... and of one that takes plain gradient descent, where the gradient's size shows.
DESCENT = {
    **LOGGED,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}


class Rows(Dataset[dict[str, Tensor]]):
    """Random tokens, and as labels the same, with some of them ignored if `unequal`; weights if `weighted`."""

    def __init__(self, unequal: bool, weighted: bool = False) -> None:
        g = torch.Generator().manual_seed(0)
        self.inputs = torch.randint(V, (ROWS, SEQ), generator=g)
        kept = torch.randint(2, SEQ + 1, (ROWS,), generator=g) if unequal else torch.full((ROWS,), SEQ)
        self.labels = torch.where(torch.arange(SEQ) < kept[:, None], self.inputs, IGNORED)
        self.columns = {"token_weight": 2 * torch.rand(ROWS, SEQ, generator=g)} if weighted else {}

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        columns = {name: x[index] for name, x in self.columns.items()}
        return {"input_ids": self.inputs[index], "labels": self.labels[index], **columns}


def tiny() -> Any:
    """A Llama of a few thousand parameters, the same every time."""
    transformers.set_seed(1)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=SEQ,
        )
    )


def trainer_of(model: Any, rows: Any, folder: Path, arguments: dict[str, Any], **options: Any) -> Any:
    """A `Trainer` with these `TrainingArguments` that prints nothing; `options` are its own."""
    made = transformers.Trainer(
        model,
        transformers.TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=rows,
        **options,
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def logged_losses(trainer: Any) -> Tensor:
    """The loss of each step that was logged, [steps]."""
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def weights_of(model: Any) -> Tensor:
    """A copy of all parameters, flat."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def assert_same(a: Tensor, b: Tensor) -> None:
    assert float((a - b).norm() / b.norm()) <= 1e-5
