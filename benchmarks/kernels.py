"""Compiles the kernels on logits for GPUs that need not be present, and counts what decides their speed.

    python -m benchmarks.kernels                       bfloat16 on compute capability 9.0: what matters daily
    python -m benchmarks.kernels --plain               the three main kernels alone, without options
    python -m benchmarks.kernels --arch 80 gfx942      other GPUs
    python -m benchmarks.kernels --peers               Liger's kernels beside them
    python -m benchmarks.kernels --all --out all.json  every dtype and option

The backend runs on tensors without data, and Triton compiles each launch as it would on that GPU. Registers
and local memory, which holds spilled registers, come from the binary. Instructions for each element and
widths of accesses are counted in the disassembled binary, as `benchmarks.assembly` explains. A question mark
means that the loads behind a count do not add up to whole blocks.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from benchmarks.assembly import Body, blocks, bodies, main_bodies, read_amdgcn, read_sass
from nvamp.engine import triton as backend
from nvamp.engine.backend import Chunk, Largest, OfEntropy
from nvamp.engine.linear import pitch_of
from nvamp.engine.options import Options, accumulate_dtype

OPTIONS = {
    "plain": Options(),
    "all options": Options(label_smoothing=0.1, z_loss=1e-4, softcap=30.0, logit_scale=0.5),
}
MANY_ROWS, FEW_ROWS = 4096, 32  # the backend may launch other sizes for few
FEATURES = 4096
DAILY = (50257, 50264, 128256)
MAIN = ("nll", "gradient", "unit gradient")
ON_LOGITS = (
    "nll",
    "nll of a part",
    "gradient",
    "gradient of a part",
    "gradient with entropy",
    "gradient of a part with entropy",
)  # for any layout; the others run on chunks


class Case(NamedTuple):
    """Logits, and the options of their loss."""

    dtype: torch.dtype
    options: str
    vocab: int
    layout: str = "contiguous"

    def logits(self) -> Tensor:
        rows = FEW_ROWS if self.layout == "few rows" else MANY_ROWS
        if self.layout == "transposed":
            return torch.empty(2, self.vocab, rows, dtype=self.dtype, device="meta").mT
        pitch = pitch_of(self.vocab) if self.layout == "padded" else self.vocab
        return torch.empty(2, rows, pitch, dtype=self.dtype, device="meta")[..., : self.vocab]


@dataclass(frozen=True)
class Usage:
    """The resources of a compiled kernel, for each thread and program."""

    kernel: str
    launch: str  # what it was launched for
    dtype: str
    options: str
    vocab: int
    layout: str
    architecture: str
    num_warps: int
    block: int
    registers: int
    local_bytes: int  # for each thread: stack and spilled registers
    shared_bytes: int
    instructions: list[float]  # for an element, in each of its passes
    special: float  # instructions among them for the special function units, at an eighth of the rate
    load_width: int  # bytes, the narrowest among passes
    store_width: int
    whole_blocks: bool  # the loads add up to whole blocks, so the passes can have been identified right
    has_float64: bool
    loops: list[str]  # all loops that were found


class AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        if self.architecture.startswith("gfx"):
            return GPUTarget("hip", self.architecture, 32 if self.architecture.startswith("gfx1") else 64)
        return GPUTarget("cuda", int(self.architecture), 32)

    def get_current_device(self) -> str:
        return self.architecture  # each has its own kernels

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling(architecture: str | int) -> Iterator[list[tuple[Any, backend.Launch]]]:
    """A context in which the backend compiles its launches, listed with their sizes, and runs none."""
    compiled: list[tuple[Any, backend.Launch]] = []

    def launch(kernel: Any, programs: int, sizes: backend.Launch, *args: Any, **constants: Any) -> None:
        named = {name: _without_data(x) for name, x in constants.items()}
        binary = kernel.warmup(*map(_without_data, args), grid=(programs,), **sizes.meta, **named)
        compiled.append((binary, sizes))

    gpu = AbsentGPU(str(architecture))
    triton.runtime.driver.set_active(gpu)
    warp = 64 if gpu.get_current_target().backend == "hip" else 32  # as the backend has it
    with mock.patch.object(backend, "launch", launch), mock.patch.object(backend, "WARP", warp):
        yield compiled


def _without_data(argument: Any) -> Any:
    return MockTensor.wrap_dtype(argument.dtype) if isinstance(argument, Tensor) else argument


# What is compiled --------------------------------------------------------------------------------------


def launches(logits: Tensor, opt: Options, metrics: int) -> dict[str, Callable[[], object]]:
    """Every launch on logits [A, B, V], which the gradient overwrites if their rows are padded."""
    vocab, padded = logits.shape[-1], logits.stride(-2) > logits.shape[-1]
    labels = torch.empty(logits.shape[:-1], dtype=torch.int64, device="meta")
    scale = torch.empty((), dtype=accumulate_dtype(logits.dtype), device="meta")
    nll, norm = scale.new_empty(labels.shape), scale.new_empty(*labels.shape, 2)
    out = logits if padded else torch.empty(logits.shape, dtype=logits.dtype, device="meta")
    classes, of_entropy = labels.new_empty(()), OfEntropy(nll, nll)
    backward = backend.token_nll_backward
    chunk = logits.new_empty(MANY_ROWS, pitch_of(vocab))[:, :vocab]  # as the linear path has it
    chunk_labels, chunk_nll = labels.new_empty(MANY_ROWS), scale.new_empty(MANY_ROWS)
    hidden, wide = logits.new_empty(MANY_ROWS, FEATURES), scale.new_empty(vocab, FEATURES)
    u, v, weight = chunk[0], hidden[0], logits.new_empty(vocab, FEATURES)
    largest = Largest(scale.new_empty(2), labels.new_empty(2), u, v)
    return {
        "nll": lambda: backend.token_nll(logits, labels, metrics, opt),
        "nll of a part": lambda: backend.part_statistics(logits, labels, metrics, opt),
        "gradient": lambda: backward(nll, logits, labels, norm, opt, out),
        "gradient of a part": lambda: backward(nll, logits, labels, norm, opt, out, classes),
        "gradient with entropy": lambda: backward(nll, logits, labels, norm, opt, out, of_entropy=of_entropy),
        "gradient of a part with entropy": lambda: backward(
            nll, logits, labels, norm, opt, out, classes, of_entropy
        ),
        "unit gradient": lambda: backend.unit_gradient_(chunk, chunk_labels, opt),
        "keep largest": lambda: backend.keep_largest(
            largest, Chunk(0, 0, chunk_nll, chunk_labels, chunk, hidden), opt
        ),
        "scale and add": lambda: backend.scale_and_add(wide, scale, scale, u, v, out=weight),
    }


def launch_all(logits: Tensor, opt: Options, metrics: int) -> None:
    for launch in launches(logits, opt, metrics).values():
        launch()


def daily_cases() -> Iterator[Case]:
    for options in OPTIONS:
        for vocab in DAILY:
            yield from _layouts(torch.bfloat16, options, vocab)


def all_cases() -> Iterator[Case]:
    """Every dtype and option, for a vocabulary of each kind: tiny, odd, and a multiple of 16."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for options in OPTIONS:
            for vocab in (8, 50257, 128256) if dtype != torch.float64 else (8,):
                yield from _layouts(dtype, options, vocab)
    yield Case(torch.bfloat16, "plain", 128256, "transposed")


def _layouts(dtype: torch.dtype, options: str, vocab: int) -> Iterator[Case]:
    yield Case(dtype, options, vocab)
    yield Case(dtype, options, vocab, "few rows")
    if vocab % 16 and dtype == torch.bfloat16:  # the same instructions on other addresses
        yield Case(dtype, options, vocab, "padded")


def usages(architecture: str, case: Case, only: tuple[str, ...] = ()) -> Iterator[Usage]:
    """The usage of every launch for a case."""
    options = OPTIONS[case.options]
    found = launches(case.logits(), options, metrics=3 * (options != Options()))
    for name in only or found:
        if case.layout == "contiguous" or name in ON_LOGITS:
            with compiling(architecture) as compiled:
                found[name]()
            for binary, sizes in compiled:
                yield usage(architecture, case, name, binary, sizes)


class LigerLaunch(backend.Launch):
    @property
    def meta(self) -> dict[str, Any]:
        return {"BLOCK_SIZE": self.block, "num_warps": self.num_warps, "enable_fp_fusion": True}


def peers(architecture: str, case: Case) -> Iterator[Usage]:
    """Liger's kernels, launched as its functions would; the functions read data, so they cannot run here."""
    import liger_kernel.ops.cross_entropy as liger

    logits = case.logits().flatten(0, 1)
    block = min(liger.MAX_FUSED_SIZE, triton.next_power_of_2(case.vocab))
    usual = 16 if architecture.startswith("gfx") else 32
    blackwell = architecture.startswith(("10", "12"))
    fewer = 8 if blackwell and case.dtype.itemsize == 2 else usual
    for name, launch, warps in (
        ("Liger's cross-entropy", _liger_cross_entropy, fewer),
        ("Liger's, for a linear layer", _liger_cross_entropy, usual),
        ("Liger's multiplication", _liger_multiplication, usual),
    ):
        with compiling(architecture) as compiled:
            launch(liger, logits, LigerLaunch(block, warps))
        for binary, sizes in compiled:
            yield usage(architecture, case, name, binary, sizes)


def _liger_cross_entropy(liger: Any, logits: Tensor, sizes: backend.Launch) -> None:
    labels, loss = logits.new_empty(len(logits), dtype=torch.int64), logits.new_empty(len(logits))
    backend.launch(
        liger.liger_cross_entropy_kernel,
        len(logits),
        sizes,
        *(logits, logits.stride(0), labels, 1, None, loss, None, 1, None, 0, None, 0),
        *(logits.shape[1], len(logits), len(logits), 0.0, -100, 0.0, 0.0, "mean", None),
        *(False, False, False),
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=False,
        HAS_GRADIENTS=True,
    )


def _liger_multiplication(liger: Any, logits: Tensor, sizes: backend.Launch) -> None:
    factor = logits.new_empty(())
    args = (logits, logits.stride(0), factor, logits.shape[1])
    backend.launch(liger.element_mul_kernel, len(logits), sizes, *args)


# What is counted ---------------------------------------------------------------------------------------


def usage(architecture: str, case: Case, launch: str, binary: Any, sizes: backend.Launch) -> Usage:
    code, read = machine_code(binary), bytes_read(launch, case)
    elements = sizes.block / (sizes.num_warps * AbsentGPU(architecture).get_current_target().warp_size)
    main = main_bodies(code.bodies, elements, read)
    loaded = [max(b.bytes_loaded, 1) / read for b in main]  # elements
    return Usage(
        binary.name,
        launch,
        str(case.dtype).removeprefix("torch."),
        case.options,
        case.vocab,
        case.layout,
        architecture if architecture.startswith("gfx") else f"sm_{architecture}",
        sizes.num_warps,
        sizes.block,
        code.registers,
        code.local_bytes,
        binary.metadata.shared,
        [round(len(b.instructions) / n, 2) for b, n in zip(main, loaded, strict=True)],
        round(sum(b.count("MUFU|v_(exp|log|rcp)") / n for b, n in zip(main, loaded, strict=True)), 2),
        min(b.load_width for b in main),
        min((b.store_width for b in main if b.stores), default=0),
        all(n % max(elements, 1) == 0 for n in loaded),
        code.has_float64,
        [_described(b) for b in code.bodies],
    )


def bytes_read(launch: str, case: Case) -> int:
    """The bytes that the kernel reads for each element."""
    narrow, wide, label = case.dtype.itemsize, accumulate_dtype(case.dtype).itemsize, 8
    return {"scale and add": wide + narrow, "keep largest": wide + label}.get(launch, narrow)


def _described(body: Body) -> str:
    def listed(accesses: dict[int, int]) -> str:
        return " + ".join(f"{n}x{width}" for width, n in sorted(accesses.items(), reverse=True)) or "nothing"

    name = "loop" if body.loop else "all, loops once"
    accesses = f"loads {listed(body.loads)}, stores {listed(body.stores)}"
    return f"{name}: {len(body.instructions)} instructions, {accesses}"


class MachineCode(NamedTuple):
    registers: int
    local_bytes: int
    has_float64: bool
    bodies: list[Body]


_known: dict[str, MachineCode] = {}


def machine_code(binary: Any) -> MachineCode:
    if binary.hash not in _known:
        read = _nvidia if "cubin" in binary.asm else _amd
        _known[binary.hash] = read(binary.asm)
    return _known[binary.hash]


def _nvidia(asm: Any) -> MachineCode:
    listing = _of_cubin("nvdisasm", asm, "-c", "--no-dataflow")
    has_float64 = "f64" in asm["ttir"] or bool(
        re.search(r"\s(D(ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w*64H|\S+\.F64)", listing)
    )
    return MachineCode(*resources(asm), has_float64, bodies(blocks(read_sass(listing))))


def resources(asm: Any) -> tuple[int, int]:
    """Registers and bytes of local memory of each thread, on an NVIDIA GPU."""
    listing = _of_cubin("cuobjdump", asm, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", listing)
    assert found, listing
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _of_cubin(tool: str, asm: Any, *options: str) -> str:
    """What one of the tools that come with Triton prints about machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(Path(triton.__file__).parent / "backends/nvidia/bin" / tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd(asm: Any) -> MachineCode:
    listing = asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"^ +\.{name}: +(\d+)$", listing, re.MULTILINE)
        assert found, name
        return int(found[1])

    has_float64 = "f64" in asm["ttir"] or bool(re.search(r"\sv_\w+_f64", listing))
    registers = number("vgpr_count")
    return MachineCode(
        registers, number("private_segment_fixed_size"), has_float64, bodies(blocks(read_amdgcn(listing)))
    )


# The command line --------------------------------------------------------------------------------------


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=["90"], help="compute capabilities, or gfx and a number")
    parser.add_argument("--vocab", type=int, nargs="+", help="these vocabularies, in bfloat16")
    parser.add_argument("--plain", action="store_true", help="only the main kernels, without options")
    parser.add_argument("--all", action="store_true", help="every dtype and option")
    parser.add_argument("--peers", action="store_true", help="Liger's kernels too, without options")
    parser.add_argument("--loops", action="store_true", help="list every loop that was found")
    parser.add_argument("--out", type=Path, help="file for the numbers as JSON")
    args = parser.parse_args()
    if backend.INTERPRETED:
        sys.exit("benchmarks.kernels compiles: unset TRITON_INTERPRET")
    cases = list(all_cases() if args.all else daily_cases())
    if args.vocab:
        cases = [c for o in OPTIONS for v in args.vocab for c in _layouts(torch.bfloat16, o, v)]
    if args.plain:
        cases = [c for c in cases if c.options == "plain"]
    only = MAIN if args.plain else ()
    found = [u for architecture in args.arch for case in cases for u in usages(architecture, case, only)]
    if args.peers:
        theirs = [c for c in cases if c.options == "plain" and c.layout == "contiguous"]
        found += [u for architecture in args.arch for case in theirs for u in peers(architecture, case)]
    if args.out:
        args.out.write_text(json.dumps([asdict(u) for u in found], indent=1))
    console = Console()
    console.print(table(found))
    if args.loops:
        for (kernel, gpu, case), same in alike(found).items():
            console.print(f"{kernel}, {gpu}, {case}:", *same[0].loops, sep="\n  ")


def alike(found: list[Usage]) -> dict[tuple[str, str, str], list[Usage]]:
    """Groups of usages that differ only in the vocabulary, by kernel, GPU and case."""
    groups: dict[str, list[Usage]] = {}
    for u in found:
        groups.setdefault(str(replace(u, vocab=0)), []).append(u)
    named = {}
    for same in groups.values():
        first, vocabularies = same[0], ", ".join(str(u.vocab) for u in same)
        case = f"{first.dtype}, {first.options}, {first.layout}: {vocabularies}"
        named[first.launch, first.architecture, case] = same
    return named


def table(found: list[Usage]) -> Table:
    shown = Table()
    for column in ("kernel", "GPU", "case"):
        shown.add_column(column)
    for column in ("instructions", "special", "load", "store", "registers", "local", "shared"):
        shown.add_column(column, justify="right")
    for names, (u, *_) in alike(found).items():
        passes = " + ".join(f"{i:.1f}" for i in u.instructions)
        total = f" = {sum(u.instructions):.1f}" if len(u.instructions) > 1 else ""
        counted = passes + total + "?" * (not u.whole_blocks)
        sizes = (u.load_width, u.store_width, u.registers, u.local_bytes, u.shared_bytes)
        shown.add_row(*names, counted, f"{u.special:.1f}", *map(str, sizes))
    return shown


if __name__ == "__main__":
    main()
