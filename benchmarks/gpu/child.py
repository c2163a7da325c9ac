"""Runs one part of the run sheet in this process, which `benchmarks.gpu` starts."""

import argparse
import faulthandler
import gc
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.plan import SHAPES, TOY, Part
from benchmarks.gpu.rows import Rows, reason

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels")
NO_GPU = 3  # exit status
# The module of each group's function; "machine" is in this one.
MODULES = {
    "hazards": "hazards",
    "logits": "contest",
    "linear": "contest",
    "policy": "contest",
    "accuracy": "correctness",
    "graphs": "correctness",
    "compile": "correctness",
    **dict.fromkeys(("overhead", "small", "kernels", "chunks", "odd", "products"), "sweep"),
}


def machine(bench: "Bench") -> None:
    """The machine on which the numbers were measured, and its ceilings."""
    import torch

    from benchmarks.measure import machine as host

    installed = {d.name.lower().replace("_", "-"): d.version for d in distributions() if d.name}
    found: dict[str, Any] = {**host(), **{name: installed[name] for name in PACKAGES if name in installed}}
    if bench.meter.on_gpu:
        properties = torch.cuda.get_device_properties(bench.meter.device)
        found |= {
            "card": properties.name,
            "card_GiB": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": str(torch.version.cuda),
        }
    bench.rows.add("machine", **found)
    bench.rows.add("ceilings", **bench.meter.ceilings(bench.toy))


def function_of(part: Part) -> Callable[["Bench"], None]:
    if part.group == "machine":
        return machine
    function: Callable[[Bench], None] = getattr(
        import_module(f"benchmarks.gpu.{MODULES[part.group]}"), part.group
    )
    return function


def own_limit(limit: float) -> float:
    """Seconds after which a hanging part reports where it is and ends, just before the parent ends it."""
    return max(limit - 1, 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--skip-peers", action="store_true")
    args = parser.parse_args()
    faulthandler.dump_traceback_later(own_limit(args.limit), exit=True)
    deadline = time.monotonic() + args.limit - min(5.0, args.limit / 4)
    part, rows = Part(args.part, args.limit), Rows(args.rows, args.part)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    # Starting a pool of compilers takes longer than compiling the few kernels of a contest.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import torch

    if args.dry_run:
        torch.set_num_threads(1)  # spinning threads cost much on small tensors

    from benchmarks.gpu.bench import Bench
    from benchmarks.gpu.meter import Meter

    if not args.dry_run and not torch.cuda.is_available():
        return NO_GPU
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)  # compilers and peers repeat them
    torch.manual_seed(0)
    device = torch.device("cpu" if args.dry_run else "cuda")
    known = TOY if args.dry_run else SHAPES
    shapes = [known[part.shape]] if part.shape else list(known.values())
    bench = Bench(Meter(device), rows, shapes, args.dry_run, not args.skip_peers, deadline)
    try:
        function = function_of(part)
        gc.collect()
        gc.freeze()  # the many collections to come need not traverse the imported modules
        function(bench)
        bench.meter.sync()
    except BaseException as error:  # including an interruption
        traceback.print_exc()
        rows.add("broke off", why=reason(error))
        return 1
    rows.add("done")
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # no clean-up: the device may be beyond it
