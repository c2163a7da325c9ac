"""Compiles every kernel for GPUs that need not be there, with what it takes: `python -m benchmarks.kernels`.

The backend runs on tensors without data, each launch is recorded, and Triton compiles what it would have
compiled then. Registers and local memory are read off the binary: local memory is what spills.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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
from triton.compiler import ASTSource

from nvamp.cross_entropy import triton as backend
from nvamp.cross_entropy.options import Options

ARCHITECTURES = (80, 90, 100)
VOCABULARIES = (8, 50257, 128256, 262144)
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
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


@dataclass(frozen=True)
class Recorded:
    """A launch: of which kernel, in which case, with what."""

    case: str
    kernel: Any
    sizes: backend.Launch
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def source(self) -> ASTSource:
        """What Triton would compile for this launch, with its own rules of specialization."""
        values = dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.constants
        values["BLOCK"] = self.sizes.block
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            signature[parameter.name] = kind = _kind(parameter, value)
            if kind == "constexpr":
                constants[(index,)] = value
            elif _is_aligned(parameter, value):
                attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)


def _kind(parameter: Any, value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if parameter.is_constexpr or (value == 1 and type(value) is int and not parameter.do_not_specialize):
        return "constexpr"
    return str(parameter.annotation_type) or ("i32" if -(2**31) <= value < 2**31 else "i64")


def _is_aligned(parameter: Any, value: Any) -> bool:
    if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment:
        return False
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


def launches() -> Iterator[Recorded]:
    """Every kernel in every dtype, with and without options, for vocabularies of all kinds."""
    case = ""
    recorded = []

    def record(kernel: Any, programs: int, sizes: backend.Launch, *args: Any, **constants: Any) -> None:
        recorded.append(Recorded(case, kernel, sizes, args, constants))

    with mock.patch.object(backend, "launch", record):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            for name, options in OPTIONS.items():
                for vocab in VOCABULARIES if dtype != torch.float64 else VOCABULARIES[:1]:
                    case = f"{str(dtype).removeprefix('torch.')}, {name}, {vocab}"
                    _launch_all(torch.empty(2, 64, vocab, dtype=dtype, device="meta"), options)
        case = "bfloat16, transposed"
        _launch_all(torch.empty(2, 128256, 64, dtype=torch.bfloat16, device="meta").mT, OPTIONS["plain"])
    return iter(recorded)


def _launch_all(logits: Tensor, opt: Options) -> None:
    """Every kernel on logits [A, B, V], the one that finishes a gradient on [B, V]."""
    labels = torch.empty(logits.shape[:-1], dtype=torch.int64, device="meta")
    metrics = opt == OPTIONS["all options"]
    nll, norm, *_ = backend.token_nll(logits, labels, metrics, opt)
    backend.token_nll_backward(
        nll, logits, labels, norm, opt, out=torch.empty(logits.shape, dtype=logits.dtype, device="meta")
    )
    flat = torch.empty(logits.shape[1:], dtype=logits.dtype, device="meta")
    backend.unit_gradient_(flat, labels[0], opt)
    a, b = (None if missing else nll.new_empty(()) for missing in (False, not metrics))
    assert a is not None
    backend.scale_and_add(flat.to(nll.dtype), a, b, flat[:, 0], flat[0], out=flat)


def usage(launch: Recorded, architecture: int) -> Usage:
    """Compiles a launch and reads what it takes off the binary."""
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": launch.sizes.num_warps, "enable_fp_fusion": True}
    binary = triton.compile(launch.source(), target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing.stdout)
    assert found, listing.stdout
    registers, stack, local = map(int, found.groups())
    return Usage(
        launch.kernel.__name__,
        launch.case,
        architecture,
        *launch.sizes[::-1],
        registers,
        stack + local,
        binary.metadata.shared,
    )


def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for the numbers as JSON")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities")
    args = parser.parse_args()
    if backend.INTERPRETED:
        sys.exit("benchmarks.kernels compiles: unset TRITON_INTERPRET")
    found = [usage(launch, architecture) for architecture in args.arch for launch in launches()]
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
