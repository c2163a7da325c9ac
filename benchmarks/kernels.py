"""Compiles every kernel for GPUs that need not be there, with what it takes: `python -m benchmarks.kernels`.

The backend runs on tensors without data, and Triton compiles each launch as it would where the GPU is, by its
own rules. Registers and local memory are read off the binary: local memory is what spills.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget

from nvamp.cross_entropy import triton as backend
from nvamp.cross_entropy.options import Options

ARCHITECTURES = (80, 90, 100)
VOCABULARIES = (8, 50257, 128256, 262144)
OPTIONS = {
    "plain": Options(),
    "all options": Options(label_smoothing=0.1, z_loss=1e-4, softcap=30.0, logit_scale=0.5),
}


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes, of a thread and of a program."""

    kernel: str
    case: str
    architecture: int
    num_warps: int
    block: int
    registers: int
    local_bytes: int  # of a thread: stack and spilled registers
    shared_bytes: int


class AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # each has its own kernels

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(architecture: int) -> Iterator[list[tuple[Any, backend.Launch]]]:
    """Inside, the backend compiles its launches and runs none: they come out here, with their sizes."""
    compiled: list[tuple[Any, backend.Launch]] = []

    def launch(kernel: Any, programs: int, sizes: backend.Launch, *args: Any, **constants: Any) -> None:
        types = [a.dtype if isinstance(a, Tensor) else a for a in args]
        binary = kernel.warmup(*types, grid=(programs,), **sizes.meta, **constants)
        compiled.append((binary, sizes))

    triton.runtime.driver.set_active(AbsentGPU(architecture))
    with mock.patch.object(backend, "launch", launch):
        yield compiled


def usages(architecture: int) -> Iterator[Usage]:
    """Of every kernel in every dtype, with and without options, for vocabularies of all kinds."""
    for case, logits, options in cases():
        with compiling(architecture) as compiled:
            launch_all(logits, options, metrics=options != Options())
        for binary, sizes in compiled:
            registers, local = _registers_and_local_bytes(binary.asm["cubin"])
            yield Usage(
                binary.name,
                case,
                architecture,
                sizes.num_warps,
                sizes.block,
                registers,
                local,
                binary.metadata.shared,
            )


def cases() -> Iterator[tuple[str, Tensor, Options]]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for name, options in OPTIONS.items():
            for vocab in VOCABULARIES if dtype != torch.float64 else VOCABULARIES[:1]:
                case = f"{str(dtype).removeprefix('torch.')}, {name}, {vocab}"
                yield case, torch.empty(2, 64, vocab, dtype=dtype, device="meta"), options
    transposed = torch.empty(2, 128256, 64, dtype=torch.bfloat16, device="meta").mT
    yield "bfloat16, transposed", transposed, OPTIONS["plain"]


def launch_all(logits: Tensor, opt: Options, metrics: bool) -> None:
    """Every kernel on logits [A, B, V], the one that finishes a gradient on [B, V]."""
    labels = torch.empty(logits.shape[:-1], dtype=torch.int64, device="meta")
    nll, norm, *_ = backend.token_nll(logits, labels, metrics, opt)
    backend.part_statistics(logits, labels, opt)
    out = torch.empty(logits.shape, dtype=logits.dtype, device="meta")
    for classes in (None, labels.new_empty(())):
        backend.token_nll_backward(nll, logits, labels, norm, opt, out, classes)
    pitch = -(-logits.shape[-1] // 16) * 16  # as the linear path has it
    flat = torch.empty(logits.shape[1], pitch, dtype=logits.dtype, device="meta")[:, : logits.shape[-1]]
    backend.unit_gradient_(flat, labels[0], opt)
    scale = nll.new_empty(())
    backend.scale_and_add(flat.to(nll.dtype), scale, scale, flat[:, 0], flat[0], out=flat)


def _registers_and_local_bytes(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    assert found, listing
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for the numbers as JSON")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities")
    args = parser.parse_args()
    if backend.INTERPRETED:
        sys.exit("benchmarks.kernels compiles: unset TRITON_INTERPRET")
    found = [usage for architecture in args.arch for usage in usages(architecture)]
    if args.out:
        args.out.write_text(json.dumps([asdict(u) for u in found], indent=1))
    table = Table(title="most of any case", title_justify="left")
    for column in ("kernel", "architecture", "cases", "registers", "local bytes", "shared bytes"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for kernel, architecture in dict.fromkeys((u.kernel, u.architecture) for u in found):
        cases = [u for u in found if (u.kernel, u.architecture) == (kernel, architecture)]
        most = (max(getattr(u, name) for u in cases) for name in ("registers", "local_bytes", "shared_bytes"))
        table.add_row(kernel, f"sm_{architecture}", str(len(cases)), *map(str, most))
    Console().print(table)


if __name__ == "__main__":
    main()
