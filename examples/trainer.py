"""The Hugging Face `Trainer` with any objective, in each of the three ways of docs/transformers.md.

    python examples/trainer.py --path patch --loss nvamp:gamma=0.04,tail=0.05

trains the small Llama of `nvamp compare` on the source of Python's standard library, or on `--text`. The
three paths print the same curve, to rounding; only `patch` never holds the logits.

Needs: `pip install 'nvamp-loss[study]'`. `nvamp.study` is here for the demo's data and model only.
"""

import argparse
import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset

from nvamp import LinearLoss, Loss
from nvamp.integrations.transformers import compute_loss_func, loss_function, patch
from nvamp.objectives import Objective, parse
from nvamp.study.compare import LR, SEQUENCE
from nvamp.study.corpus import build_corpus
from nvamp.study.models import build_model, quiet
from nvamp.study.sources import read_documents

PATHS = ("patch", "loss_function", "compute_loss_func")


class Blocks(Dataset[dict[str, Tensor]]):
    """Blocks of tokens, which are their own labels: the loss shifts them."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


class Curve(transformers.TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Prints the losses that the `Trainer` logs."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name in ("loss", "eval_loss"):
            if name in logs:
                print(f"step {state.global_step}: {name} {logs[name]:.5f}", flush=True)


def train(path: str, objective: Objective, corpus: Any, steps: int, scratch: str) -> None:
    transformers.set_seed(0)
    model = build_model(None, corpus)
    options: dict[str, Any] = {}
    if path == "patch":
        patch(model, LinearLoss(objective))
    elif path == "loss_function":
        model.loss_function = loss_function(Loss(objective), model)
    else:
        options["compute_loss_func"] = compute_loss_func(Loss(objective))
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=LR,
            logging_steps=max(steps // 10, 1),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=Blocks(corpus.train),
        eval_dataset=Blocks(corpus.held_out[:32]),
        callbacks=[Curve],
        **options,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    trainer.evaluate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--path", choices=PATHS, default=PATHS[0], help=f"default: {PATHS[0]}")
    parser.add_argument("--loss", default="nvamp", help="an objective as a text; default: nvamp")
    parser.add_argument("--steps", type=int, default=40, help="default: 40")
    parser.add_argument("--text", action="append", default=[], help="a file or directory of text; repeat it")
    options = parser.parse_args()
    quiet()
    corpus = build_corpus(*read_documents(options.text), SEQUENCE)
    with tempfile.TemporaryDirectory() as scratch:
        train(options.path, parse(options.loss), corpus, options.steps, scratch)


if __name__ == "__main__":
    main()
