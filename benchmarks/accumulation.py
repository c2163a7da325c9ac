"""Distance of accumulated gradients from the whole batch's gradient: `python -m benchmarks.accumulation`.

Each micro-batch has its own dispersion, so the distance grows as micro-batches shrink. The batch is 64 blocks
of 64 tokens from the held-out text of `nvamp compare`; the model comes from its folder, or is untrained.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import machine, show_rows
from nvamp import NVAMPLoss
from nvamp.objectives import Gradient
from nvamp.study.compare import prepare
from nvamp.study.models import build_model, quiet
from nvamp.study.settings import Settings

BLOCKS = 64
MODES: tuple[Gradient, ...] = ("scalar", "token", "full")


def gradient(model: Any, blocks: Tensor, rows: int, mode: Gradient, gamma: float) -> Tensor:
    """The gradient of all parameters, accumulated over micro-batches of `rows` blocks [tokens]."""
    criterion, items = NVAMPLoss(gradient=mode, gamma=gamma), blocks[:, 1:].numel()
    model.zero_grad()
    for micro_batch in torch.split(blocks, rows):
        loss = criterion(model(input_ids=micro_batch).logits, micro_batch, num_items_in_batch=items)
        torch.autograd.backward(loss)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def distances(model: Any, blocks: Tensor, gamma: float) -> list[dict[str, Any]]:
    """‖accumulated − whole‖ / ‖whole‖, by the size of the micro-batch and the gradient mode."""
    whole = {mode: gradient(model, blocks, len(blocks), mode, gamma) for mode in MODES}
    rows = []
    for size in (32, 16, 8, 4, 2, 1):
        row: dict[str, Any] = {"blocks": size, "tokens": size * (blocks.shape[1] - 1)}
        for mode in MODES:
            accumulated = gradient(model, blocks, size, mode, gamma)
            row[mode] = float((accumulated - whole[mode]).norm() / whole[mode].norm())
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model of nvamp compare, such as runs/compare/models/ce-seed0")
    parser.add_argument("--gamma", type=float, default=0.001, help="weight of the largest loss")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for accumulation.json")
    args = parser.parse_args()
    quiet()
    torch.manual_seed(0)
    corpus = prepare(Settings(losses=("ce",), seeds=1, steps=1, batch_size=BLOCKS))
    rows = distances(build_model(args.model, corpus), corpus.held_out[:BLOCKS], args.gamma)
    show_rows("distance of the accumulated gradient", rows, decimals=4)
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "model": args.model, "gamma": args.gamma, "rows": rows}
    (args.out / "accumulation.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
