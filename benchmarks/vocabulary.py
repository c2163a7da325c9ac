"""A sharded vocabulary beside PyTorch's `loss_parallel`: `python -m benchmarks.vocabulary`.

Two processes of one thread each hold half of the logits as a `DTensor`. It measures forward and backward; the
collectives are counted, not estimated.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel
from torch.multiprocessing.spawn import spawn

from benchmarks.measure import Run, machine, peak_bytes, show_rows, time_in_turn
from nvamp import NVAMPLoss

RANKS = 2
LOSS_PARALLEL = "loss_parallel: cross-entropy"


def contenders(logits: Tensor, labels: Tensor) -> dict[str, Run]:
    """The contenders, each a forward and a backward on logits [N, V], sharded over V."""

    def plain() -> None:
        with loss_parallel():
            torch.autograd.backward(F.cross_entropy(logits, labels))
        logits.grad = None

    def of(criterion: NVAMPLoss) -> Run:
        def run() -> None:
            torch.autograd.backward(criterion(logits, labels))
            logits.grad = None

        return run

    return {
        LOSS_PARALLEL: plain,
        "nvamp: cross-entropy": of(NVAMPLoss(0.0, 1.0, 0.0, shift=False)),
        "nvamp: scalar": of(NVAMPLoss(shift=False)),
        "nvamp: token": of(NVAMPLoss(gradient="token", shift=False)),
    }


def measure(rank: int, dtype: torch.dtype, n: int, vocab: int, repeats: int, folder: str) -> None:
    """Runs in each process; the first one writes its rows to the folder."""
    torch.set_num_threads(1)
    store = f"file://{folder}/{dtype}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(rank)
    local = torch.randn(n, vocab // RANKS).to(dtype)
    logits = DTensor.from_local(local, mesh, [Shard(1)]).requires_grad_()
    labels = torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(0))
    runs = contenders(logits, labels)
    timings = time_in_turn(runs, repeats)
    rows = []
    for name, run in runs.items():
        with CommDebugMode() as count:  # type: ignore[no-untyped-call]
            run()
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "contender": name,
                "time": timings[name].median_s / timings[LOSS_PARALLEL].median_s,
                "peak / logits of a rank": peak_bytes(run) / local.nbytes,
                "collectives": count.get_total_counts(),
            }
        )
    if rank == 0:
        Path(folder, f"{dtype}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for vocabulary.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in (torch.float32, torch.bfloat16):
            arguments = (dtype, args.tokens, args.vocab, args.repeats, folder)
            spawn(measure, arguments, nprocs=RANKS)  # type: ignore[no-untyped-call]
            rows += json.loads(Path(folder, f"{dtype}.json").read_text())
    show_rows("forward and backward of a sharded vocabulary", rows, decimals=2)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "vocabulary.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
