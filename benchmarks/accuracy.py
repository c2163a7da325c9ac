"""Rounding of the linear path in half precision: `python -m benchmarks.accuracy`.

It prints the error of the weight's gradient against float64, over eager PyTorch's error in the same dtype,
for several numbers of chunks and dtypes in which the chunks are added up. The rule for that dtype rests on
it.
"""

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import machine, show_rows
from nvamp.engine import linear, linear_nll_sum
from nvamp.functional import linear_token_nll

N, D, V = 2048, 256, 16384
SCALE = 1.37 / N  # like the weight of a token in a loss; not a power of two, so that the product rounds


def ratios(logit_std: float) -> list[dict[str, Any]]:
    """Error ratios for random hidden states and weights whose logits have this standard deviation."""
    hidden = torch.randn(N, D).bfloat16()
    weight = (torch.randn(V, D) * logit_std / D**0.5).bfloat16().requires_grad_()
    labels = torch.randint(V, (N,))
    exact = weight.detach().double().requires_grad_()
    loss = SCALE * F.cross_entropy(hidden.double() @ exact.T, labels, reduction="sum")
    (truth,) = torch.autograd.grad(loss, exact)

    def error(loss: Tensor) -> float:
        (grad,) = torch.autograd.grad(loss, weight)
        return float((grad.double() - truth).norm() / truth.norm())

    eager = error(SCALE * F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum"))
    rows = []
    for chunks in (1, 2, 4, 8, 32):
        row: dict[str, Any] = {"logit_std": logit_std, "chunks": chunks}
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
            with mock.patch.object(linear, "chunk_rows", return_value=N // chunks):
                total, _ = linear_nll_sum(hidden, weight, labels, few=0, accum_dtype=dtype)
                nll = linear_token_nll(hidden, weight, labels, accum_dtype=dtype)
                row[f"one pass, {name} sums"] = error(SCALE * total) / eager
                row[f"recompute, {name} sums"] = error(SCALE * nll.sum()) / eager
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for accuracy.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = [row for logit_std in (0.3, 1.0, 3.0) for row in ratios(logit_std)]
    show_rows(f"error of grad_weight over eager's, bfloat16, {N} × {D} × {V}", rows, decimals=2)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "accuracy.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
