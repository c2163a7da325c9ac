"""A small Llama and rows of tokens for the trainers that build on transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.utils.data import Dataset

from nvamp import LinearLoss, Loss
from nvamp.integrations.stats import log_stats
from nvamp.integrations.transformers import compute_loss_func, patch
from nvamp.objectives import parse
from tools.trainers.comparing import Outcome

VOCABULARY, ROWS, LENGTH, STEPS = 64, 64, 16, 6
CHAT = "{% for message in messages %}{{ message['content'] + ' ' + eos_token + ' ' }}{% endfor %}"


class Rows(Dataset[dict[str, Tensor]]):
    """Random tokens; of every row another number is scored."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.inputs = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=g)
        kept = torch.randint(2, LENGTH + 1, (ROWS, 1), generator=g)
        self.labels = self.inputs.where(torch.arange(LENGTH) < kept, -100)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.inputs[index], "labels": self.labels[index]}


def model() -> Any:
    """A Llama of some thousand parameters, the same every time."""
    transformers.set_seed(1)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    )


# Plain gradient steps, where the gradient's size shows, each of them logged.
ARGUMENTS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


def trainer(objective: str | None, folder: Path, **arguments: Any) -> Any:
    """A `Trainer` of `model()`, with `log_stats` if it is not the trainer's own loss."""
    args = transformers.TrainingArguments(output_dir=str(folder), **(ARGUMENTS | arguments))
    criterion = None if objective is None else Loss(parse(objective))
    made = transformers.Trainer(
        model(), args, train_dataset=Rows(), compute_loss_func=criterion and compute_loss_func(criterion)
    )
    if criterion is not None:
        log_stats(made, criterion)
    return made


def weights(model: Any) -> Tensor:
    """A copy of all parameters, flat."""
    return torch.cat([parameter.detach().flatten().float().cpu() for parameter in model.parameters()])


def logged(trainer: Any, name: str = "loss") -> Tensor:
    """What the trainer logged under a name, [steps]."""
    values = [entry[name] for entry in trainer.state.log_history if name in entry]
    return torch.tensor(values, dtype=torch.float64)


def tracked(tracker: str, read: Callable[[str, str], list[float]]) -> Callable[[str | None], Outcome]:
    """Training under a tracker; the losses are those that the tracker stored.

    Args:
        tracker: its name among transformers' integrations.
        read: reads the values of a metric from the tracker's store, as `read(run, metric)`.
    """

    def train(objective: str | None) -> Outcome:
        with TemporaryDirectory() as folder:
            run = objective or "own"
            made = trainer(objective, Path(folder), report_to=tracker, run_name=run)
        start = weights(made.model)
        made.train()
        if objective is not None:
            # JSON and SQLite keep all digits.
            assert read(run, "train/nvamp_hardest_share") == logged(made, "nvamp_hardest_share").tolist()
        losses = torch.tensor(read(run, "train/loss"))
        assert len(losses) == STEPS, losses
        return Outcome(losses, weights(made.model) - start)

    return train


class Watch(transformers.TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Patches the model of a trainer that another library makes, and keeps what became of it."""

    def __init__(self, criterion: LinearLoss | None) -> None:
        self.criterion = criterion
        self.outcome: Outcome | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.criterion is not None:
            patch(kwargs["model"], self.criterion)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = weights(kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        losses = torch.tensor([entry["loss"] for entry in state.log_history if "loss" in entry])
        self.outcome = Outcome(losses, weights(kwargs["model"]) - self.start)


def save(folder: Path) -> None:
    """Writes the model and a tokenizer of 64 words, as a checkpoint, and data.json: questions and answers."""
    words = ["<eos>", "<pad>", *(f"w{i}" for i in range(2, VOCABULARY))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", chat_template=CHAT
    )
    tokenizer.save_pretrained(folder)
    model().save_pretrained(folder)
    rows = [
        {
            "instruction": " ".join(words[i] for i in row[:4]),
            "input": "",
            "output": " ".join(words[i] for i in row[4 : 6 + 5 * n % 11]),
        }
        for n, row in enumerate((2 + Rows().inputs % (VOCABULARY - 2)).tolist())
    ]
    (folder / "data.json").write_text(json.dumps(rows))
