"""What of the backend `triton` needs no kernel to run: its choice, its launches, its machine code."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import __version__ as triton_version

from nvamp.engine import backends, devices, linear, parts, triton
from nvamp.engine.backend import Chunk, Largest, OfEntropy
from nvamp.engine.options import Head, Needs, Options
from nvamp.ranks import ALONE

KERNELS = {
    "nll_kernel",
    "gradient_kernel",
    "unit_gradient_kernel",
    "keep_largest_kernel",
    "scale_and_add_kernel",
}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_chosen_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGPU:
        device = torch.device("cuda")

    gpu: Any = OnGPU()
    assert backends.backend_for(gpu, None) == "triton"
    assert backends.backend_for(gpu, "chunked") == "chunked"
    assert backends.backend_for(torch.empty(0), None) == "chunked"
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    assert backends.backend_for(gpu, None) == "chunked"
    with pytest.raises(ValueError, match="needs the package triton"):
        backends.backend_for(gpu, "triton")


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """The code in a fresh Python at the root of the project, with kernels that compile."""
    command = [sys.executable, "-c", code, *args]
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=root, check=False)


def test_nvamp_works_without_triton() -> None:
    done = run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, nvamp\n"
        "x = torch.randn(2, 5, 7, requires_grad=True)\n"
        "nvamp.NVAMPLoss()(x, torch.ones(2, 5).long()).backward()\n"
        "nvamp.NVAMPLoss(backend='triton')"
    )
    assert done.stderr.splitlines()[-1].startswith('ValueError: backend="triton" needs the package triton')


def test_tensors_on_the_cpu_are_an_error() -> None:
    done = run(
        "import torch, nvamp\n"
        "nvamp.NVAMPLoss(backend='triton')(torch.randn(2, 5, 7), torch.ones(2, 5).long())"
    )
    assert 'backend="triton" needs tensors on a GPU, got some on the CPU' in done.stderr.splitlines()[-1]


# Launches ----------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Records launches in place of running them: kernel, programs, sizes, and all arguments."""
    record: list[tuple[Any, ...]] = []
    monkeypatch.setattr(triton, "launch", lambda *args, **constants: record.append((*args, constants)))
    return record


def test_nothing_looks_at_the_data(launched: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without data stand for a device: a look at them raises. So a CUDA graph can record this."""
    monkeypatch.setattr(devices, "can_wait", lambda _: False)  # as while it is recorded
    monkeypatch.setattr(linear, "chunk_rows", lambda *_: 48)
    head = Head(meta(100, 32), meta(501, 32), meta(501), meta(100, dtype=torch.int64))
    needs, opt, nll = Needs(True, True, True), Options(), meta(100, dtype=torch.float32)
    with pytest.raises((RuntimeError, NotImplementedError)):  # what a look at the data is here
        head.labels.sum().item()

    _, units = linear.unit_gradients(triton, head, needs, 1, False, None, opt)  # type: ignore[arg-type]
    index, grad, hidden, *of_sum = units
    assert (index.shape, grad.shape, hidden.shape) == ((1,), (501,), (32,))
    assert [u.shape for u in of_sum] == [(100, 32), (501, 32), (501,)]
    assert {u.dtype for u in of_sum} == {torch.float32}
    for few in (1, 60):
        grads = linear.weighted_gradients(triton, nll[0], nll, units, head, needs, few, None, opt, False)  # type: ignore[arg-type]
        assert [g.shape for g in grads] == [(100, 32), (501, 32), (501,)]
    _, norm = linear.token_nll(triton, head, False, None, opt)  # type: ignore[arg-type]
    targets = parts._Targets.of(head.labels, 501, opt, ALONE)
    statistics = linear.part_statistics(triton, head._replace(labels=targets.labels), 3, None, opt)  # type: ignore[arg-type]
    whole, others = parts._put_together(parts._Statistics(*statistics), targets, 3, opt, ALONE)
    found = [x.shape for x in (*whole, *others) if x is not None]
    assert found == [(100, 2), (100,), (), (100,), (100,), (100,)]
    for classes, of_entropy in product((None, targets.classes), (None, OfEntropy(nll, nll))):
        grads = linear.token_nll_backward(
            triton, nll, norm, classes, None, of_entropy, head, needs, None, opt
        )  # type: ignore[arg-type]
        assert [g.shape for g in grads] == [(100, 32), (501, 32), (501,)]
        assert {g.dtype for g in grads} == {torch.bfloat16}
    assert {call[0].fn.__name__ for call in launched} == KERNELS


@pytest.mark.parametrize("vocab", [1, 8, 32000, 50257, 262144])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_sizes_of_programs(vocab: int, dtype: torch.dtype) -> None:
    def reading(rows: int, metrics: bool) -> Callable[..., triton.Launch]:
        return lambda *args: triton.reading(*args, rows, metrics)

    rules = [triton.streaming, triton.revisiting, *(reading(n, m) for n in (8, 4096) for m in (False, True))]
    for launch_of, capped in product(rules, (True, False)):
        block, warps = sizes = launch_of(vocab, dtype, capped)
        assert block.bit_count() == warps.bit_count() == 1
        assert 1 <= warps <= 32
        assert vocab <= block or block * dtype.itemsize >= 2048
        lanes, vector = sizes.lanes(dtype).values()
        assert vector * dtype.itemsize == 16
        assert block % (lanes * vector) == 0
        assert lanes <= 32 * warps


@pytest.mark.parametrize("vocab", [32000, 50257, 262144])
def test_a_program_with_a_softcap_takes_half(vocab: int) -> None:
    """It needs more registers."""
    for launch_of in (triton.streaming, triton.revisiting):
        assert (
            2 * launch_of(vocab, torch.bfloat16, True).block == launch_of(vocab, torch.bfloat16, False).block
        )


def test_no_program_is_no_launch() -> None:
    """A GPU refuses a grid of none."""
    kernel: Any = {}
    triton.launch(kernel, 0, triton.Launch(64, 1), torch.empty(0))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 4, 5), (4, 5), (2, 2, 3, 2, 5)])
def test_planes_hold_all_rows_in_their_order(shape: tuple[int, ...]) -> None:
    wide = torch.randn([size + 2 for size in shape])
    for logits in (wide[tuple(slice(1, 1 + size) for size in shape)], torch.randn(shape)):
        found = torch.full((logits.numel() // shape[-1], shape[-1]), torch.nan)
        for plane, rows in triton._planes(logits):
            assert plane.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
            found[rows] = plane.reshape(-1, shape[-1])
        assert torch.equal(found, logits.reshape(-1, shape[-1]))


SHAPES = [(8192, 4096, 128256), (16384, 2048, 151936), (4096, 8192, 262144), (32768, 576, 49152), (1, 8, 64)]


@pytest.mark.parametrize(("n", "d", "v"), SHAPES)
def test_chunks_on_an_accelerator(n: int, d: int, v: int) -> None:
    """As few as fit into what the backward takes anyway, or 512 MiB; with a sum in bfloat16, less."""
    hidden, weight, row = meta(n, d), meta(v, d), 2 * (-(-v // 16) * 16)

    at_the_end = 4 * v * d + 2 * n * d + 2 * v * d  # the sum, and both gradients
    for one_pass, grad_hidden in ((True, 4 * n * d), (False, 2 * n * d)):
        meanwhile = 4 * v * d + grad_hidden
        for accum_dtype in (None, torch.float32):
            rows = linear.chunk_rows(hidden, weight, accum_dtype, one_pass)
            assert rows % 256 == 0
            assert (rows - 256) * row < max(at_the_end - meanwhile, 2**29) <= rows * row
            assert linear.held_dtype(weight, accum_dtype) == torch.float32
        assert linear.held_dtype(weight, torch.bfloat16) == torch.bfloat16
        rows = linear.chunk_rows(hidden, weight, torch.bfloat16, one_pass)
        assert rows % 128 == 0
        assert (rows - 64) * row <= max(2 * n * d, 2**28) < (rows + 65) * row


def test_chunks_are_alike_and_no_larger_than_asked_for() -> None:
    for n in range(1, 5000, 37):
        for most in (1, 100, 1023, 1025, 1100, 1500, 2047):
            rows = linear._even(n, most)
            assert rows <= most
            assert -(-n // rows) == -(-n // most)
    assert linear._even(2000, 1100) == 1024  # whole tiles


def test_of_tied_losses_in_several_blocks_the_first_counts() -> None:
    head = Head(torch.zeros(3000, 1), torch.zeros(2, 1), None, torch.zeros(3000, dtype=torch.int64))
    largest = Largest.none(head, 1)
    chunk = Chunk(0, 0, torch.ones(3000), head.labels, torch.zeros(3000, 2), head.hidden)
    triton.keep_largest(largest, chunk, Options())
    assert (float(largest.loss[1]), int(largest.row[1])) == (1, 0)


def test_losses_of_half_precision_are_compared_in_float32() -> None:
    hidden, weight = torch.zeros(2, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    head = Head(hidden, weight, None, torch.zeros(2, dtype=torch.int64))
    largest = Largest.none(head, 2)
    for row, loss in enumerate((6.01, 6.005)):  # both would be 6 in bfloat16
        nll, grad, one = torch.tensor([loss]), torch.zeros(1, 2, dtype=torch.bfloat16), slice(row, row + 1)
        triton.keep_largest(largest, Chunk(row, row, nll, head.labels[one], grad, hidden[one]), Options())
    assert largest.row.tolist() == [0, 0, 0]


def test_of_the_largest_loss_every_class_and_every_feature_is_kept() -> None:
    for features, vocab in ((3000, 2), (2, 3000)):
        head = Head(torch.randn(5, features), torch.zeros(vocab, features), None, torch.zeros(5).long())
        grad = torch.randn(5, vocab)
        largest = Largest.none(head, 1)
        chunk = Chunk(0, 0, torch.tensor([1.0, 3, 2, 0, 1]), head.labels, grad, head.hidden)
        triton.keep_largest(largest, chunk, Options())
        assert torch.equal(largest.hidden, head.hidden[1])
        assert torch.equal(largest.grad, grad[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_alike(dtype: torch.dtype) -> None:
    """Element by element."""

    def distances(x: Tensor) -> Tensor:
        index = torch.arange(x.untyped_storage().nbytes() // x.itemsize)
        return x.itemsize * index.as_strided(x.shape, x.stride(), x.storage_offset()) + address(x)

    def address(x: Tensor) -> int:
        return x.untyped_storage().data_ptr()

    memory = torch.zeros(400, dtype=dtype)
    shapes = [
        memory[start:].as_strided((outer, 3, 5), (outer_stride, pitch, step))
        for start, outer, outer_stride, pitch, step in product((0, 1, 8), (1, 2), (40, 41), (8, 9), (1, 2))
    ]
    found = set()
    for x, out in product(shapes, shapes):
        if len(x) == len(out):
            really = bool(((distances(x) - distances(out)) % 16 == 0).all())
            assert triton._alike(x, out) <= really
            found.add((triton._alike(x, out), really))
    assert {(True, True), (False, False)} <= found
    assert all(triton._alike(x, x) for x in shapes)


class Allocations(TorchDispatchMode):
    """The most bytes that tensors have at any time, without those that were there before."""

    def __init__(self, *before: Tensor) -> None:
        super().__init__()
        self.before = {StorageWeakRef(x.untyped_storage()).cdata for x in before}
        self.storages: dict[int, StorageWeakRef] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                ref = StorageWeakRef(x.untyped_storage())
                if ref.cdata not in self.before:
                    self.storages.setdefault(ref.cdata, ref)
        alive = {cdata: ref for cdata, ref in self.storages.items() if not ref.expired()}
        held = (torch.UntypedStorage._new_with_weak_ptr(cdata) for cdata in alive)
        self.storages, self.peak = alive, max(self.peak, sum(x.nbytes() for x in held))
        return result


@pytest.mark.parametrize(("one_pass", "few"), [(True, 0), (True, 1), (True, 100), (False, 0)])
@pytest.mark.parametrize(("n", "d", "v"), [*SHAPES[:4], (16384, 768, 50257)])
def test_memory_on_an_accelerator(
    n: int, d: int, v: int, one_pass: bool, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much as Liger holds with a float32 sum: 6·V·D + 2·N·D bytes. A small head adds its chunk."""
    monkeypatch.setattr(devices, "can_wait", lambda _: False)
    monkeypatch.setattr(triton, "launch", lambda *_, **__: None)
    monkeypatch.setattr(linear, "_add_product", lambda *_, **__: None)  # it allocates nothing
    head = Head(meta(n, d), meta(v, d), None, meta(n, dtype=torch.int64))
    needs, opt, nll = Needs(True, True, False), Options(), meta(n, dtype=torch.float32)
    norm = meta(n, 2, dtype=torch.float32)
    engine: Any = triton
    with Allocations(head.hidden, head.weight, head.labels, nll, norm) as held:
        if one_pass:
            _, units = linear.unit_gradients(engine, head, needs, few, False, None, opt)
            linear.weighted_gradients(engine, nll[0], nll, units, head, needs, few, None, opt, in_place=True)
        else:
            linear.token_nll_backward(engine, nll, norm, None, None, None, head, needs, None, opt)
    at_the_end = 6 * v * d + 2 * n * d
    chunk = 2 * min(linear.chunk_rows(*head[:2], None, one_pass), n) * (v + 15)
    a_few_numbers = 64 * (n + v) + 2 * chunk // v * d  # of tokens and classes; hidden states of a chunk
    tile = 2 * 256 * v  # what rounding up to whole tiles may add
    while_chunks_pass = 4 * v * d + (4 if one_pass else 2) * n * d + chunk
    assert held.peak <= max(at_the_end, while_chunks_pass) + a_few_numbers
    if 2 * v * d > 2**29 + 4 * n * d:
        assert held.peak <= at_the_end + a_few_numbers + tile


# Machine code ------------------------------------------------------------------------------------------


COMPILED = """
import json, sys
from benchmarks.kernels import OPTIONS, all_cases, compiling, launches, resources

architecture, options = sys.argv[1:]
found = {}
for case in all_cases():
    if case.options not in options or case.layout == "padded" or (case.vocab == 8 and case.dtype.itemsize < 8):
        continue  # the same instructions on other addresses; programs too small to need many registers
    with compiling(architecture) as compiled:
        for launch in launches(case.logits(), OPTIONS[case.options], metrics=3 * (case.options != "plain")).values():
            launch()
    for binary, _ in compiled:
        if binary.hash not in found:
            found[binary.hash] = (binary.name, *resources(binary.asm), binary.metadata.shared, repr(case))
print(json.dumps(list(found.values())))
"""


@pytest.mark.parametrize(
    ("architecture", "options"), [(80, "all options"), (90, "plain, all options"), (100, "all options")]
)
def test_compiles_without_spills(
    architecture: int, options: str, record_property: Callable[[str, object], None]
) -> None:
    """Every kernel, in every dtype, with and without options, for a GPU that is not here."""
    done = run(COMPILED, str(architecture), options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name for name, *_ in found} == KERNELS
    spilled = 0 if tuple(map(int, triton_version.split(".")[:2])) >= (3, 9) else 8  # a register, by 3.6
    for kernel in KERNELS:
        of_kernel = [usage for usage in found if usage[0] == kernel]
        most = [max(usage[i] for usage in of_kernel) for i in (1, 2, 3)]
        record_property(f"{kernel}, sm_{architecture}: registers, local and shared bytes", most)
        assert most[1] <= spilled, [usage for usage in of_kernel if usage[2]]
        assert most[2] <= 99 * 1024  # what the smallest GPUs of these generations have


def test_other_sizes_and_options_compile_nothing_again() -> None:
    done = run(
        "import torch\n"
        "from benchmarks.kernels import Options, compiling, launch_all\n"
        "def kernels(options):\n"
        "    with compiling(90) as compiled:\n"
        "        for shape in ((1, 1), (1, 2), (1, 16), (4, 1), (4, 7), (4, 112), (5, 60_000)):\n"
        "            for opt in options:\n"
        "                launch_all(torch.empty(*shape, vocab, dtype=torch.bfloat16, device='meta'), opt, False)\n"
        "    return len({binary.hash for binary, _ in compiled})\n"
        "for vocab in (128256, 50257):\n"
        "    print(kernels([Options()]), kernels([Options(z_loss=1e-4), Options(z_loss=2e-4)]))"
    )
    # Nine, and those with a program a row once more for few rows.
    assert done.stdout.split() == ["11"] * 4, done.stderr
