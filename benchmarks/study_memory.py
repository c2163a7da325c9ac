"""The memory of a training step of `nvamp compare`, with logits and without.

    python -m benchmarks.study_memory [--lora]

By default the model has the output layer of Qwen2.5-0.5B, tied to the embedding, over one decoder layer, and
a step has two blocks of 512 tokens. Each way trains three steps on random tokens in a process of its own.
Memory is the resident set of the process, or on a GPU what PyTorch has allocated there: what is in use as the
last step begins (weights and AdamW's moments), and the most during this step.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from benchmarks.measure import machine, show_rows
from nvamp.study import training
from nvamp.study.corpus import Corpus
from nvamp.study.losses import parse_loss
from nvamp.study.models import quiet
from nvamp.study.packing import plain
from nvamp.study.settings import Lora
from nvamp.study.training import Recipe, train
from nvamp.study.watching import PeakMemory

WAYS = ("logits", "linear")
SEQUENCE = 512


class Memory(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """The bytes in use as the last step begins, and the most during it."""

    def __init__(self) -> None:
        self.memory = PeakMemory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self.before: int | None = None
        self.peak: int | None = None

    def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.memory.reset()
        self.before = self.memory.read()

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.peak = self.memory.read()


class Vocabulary:
    """All that training asks of a tokenizer: its size."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def measure(way: str, vocab: int, hidden: int, rows: int, loss: str, lora: bool) -> Memory:
    quiet()
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=5 * hidden,
        num_hidden_layers=1,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=True,
    )
    if way == "logits":
        training.install = lambda loss, model: "the benchmark asks for logits"
    blocks = torch.randint(vocab, (3 * rows, SEQUENCE))
    corpus = Corpus(Vocabulary(vocab), plain(blocks), plain(blocks[:1]), "random tokens", "")
    memory = Memory()
    with TemporaryDirectory() as directory:
        Qwen2ForCausalLM(config).save_pretrained(directory)
        recipe = Recipe(3, rows, 1e-5, model=directory, lora=Lora(8, 16) if lora else None)
        train(parse_loss(loss), 0, recipe, corpus, lambda step, value: None, callbacks=[memory])
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--rows", type=int, default=2, help=f"blocks of {SEQUENCE} tokens in a step")
    parser.add_argument("--loss", default="nvamp")
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 8 only")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for study_memory.json")
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process, and print its bytes")
    args = parser.parse_args()
    if args.way:
        memory = measure(args.way, args.vocab, args.hidden, args.rows, args.loss, args.lora)
        print(json.dumps({"before": memory.before, "peak": memory.peak}))
        return
    found = {way: _in_process(way) for way in WAYS}
    rows = [
        {
            "way": way,
            "before the step (MB)": bytes["before"] / 1e6,
            "peak (MB)": bytes["peak"] / 1e6,
            "of the step (MB)": (bytes["peak"] - bytes["before"]) / 1e6,
        }
        for way, bytes in found.items()
    ]
    logits = 4 * args.rows * SEQUENCE * args.vocab / 1e6
    show_rows(f"a training step of nvamp compare; its logits take {logits:.0f} MB", rows, decimals=0)
    args.out.mkdir(parents=True, exist_ok=True)
    arguments = {name: value for name, value in vars(args).items() if name not in ("out", "way")}
    record = {"machine": machine(), **arguments, "bytes": found}
    (args.out / "study_memory.json").write_text(json.dumps(record, indent=1))


def _in_process(way: str) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.study_memory", *sys.argv[1:], "--way", way]
    last = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    found: dict[str, int] = json.loads(last)
    return found


if __name__ == "__main__":
    main()
