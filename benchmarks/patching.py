"""A training step of a whole Llama, with and without `patch`: `python -m benchmarks.patching`.

It measures forward and backward: time, and peak memory beyond what was held before the step.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import as_json, machine, peak_bytes, show_rows, time_in_turn
from nvamp import LinearNVAMPLoss, NVAMPLoss
from nvamp.integrations.transformers import loss_function, patch


def build(vocab: int, hidden: int) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
        )
    ).train()


def step(model: Any, tokens: Tensor) -> Callable[[], None]:
    def run() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad()

    return run


def steps(vocab: int, hidden: int, tokens: Tensor) -> dict[str, Callable[[], None]]:
    """A step of the model as it is, of NVAMP on its logits, and of the patched model."""
    own, by_logits, patched = (build(vocab, hidden) for _ in range(3))
    by_logits.loss_function = loss_function(NVAMPLoss(), by_logits)
    patch(patched, LinearNVAMPLoss())
    models = {"transformers' cross-entropy": own, "loss_function": by_logits, "patch": patched}
    return {name: step(model, tokens) for name, model in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4, help="sequences of 512 tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for patching.json")
    args = parser.parse_args()
    contenders = steps(args.vocab, args.hidden, torch.randint(args.vocab, (args.rows, 512)))
    timings = time_in_turn(contenders, args.repeats)
    peaks = {name: peak_bytes(run) for name, run in contenders.items()}
    rows = [
        {"step": name, "seconds": timings[name].median_s, "peak MiB": peaks[name] / 2**20} for name in peaks
    ]
    logits = args.rows * 512 * args.vocab * 4 / 2**20
    show_rows(f"a training step; the logits are {logits:.0f} MiB in float32", rows, decimals=2)
    args.out.mkdir(parents=True, exist_ok=True)
    arguments = {name: value for name, value in vars(args).items() if name != "out"}
    record = {"machine": machine(), **arguments, "timings": as_json(timings), "peak_bytes": peaks}
    (args.out / "patching.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
