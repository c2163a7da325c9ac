"""What a training of many steps asks for: nothing that grows, nothing compiled again, the same bits every time."""

import ctypes
import gc
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from nvamp import LinearNVAMPLoss, NVAMPLoss
from nvamp.objectives import GRADIENTS, Gradient
from tests.models import CRITERIA, HeadAndLoss
from tests.parameters import with_backend, with_gradient, with_path


def batch(b: int, s: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [b, s, 8], a weight [33, 8], and labels [b, s] of which some are ignored."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(33, (b, s), generator=g)
    labels[torch.rand(b, s, generator=g) < 0.2] = -100
    return torch.randn(b, s, 8, generator=g).to(dtype), torch.randn(33, 8, generator=g).to(dtype), labels


def step(path: str, hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> list[Tensor]:
    """The loss, and its gradients by hidden and weight."""
    h, w = (x.detach().requires_grad_() for x in (hidden, weight))
    if path == "logits":
        loss = NVAMPLoss(**options)(h @ w.T, labels)
    else:
        loss = LinearNVAMPLoss(**options)(h, w, labels)
    return [loss.detach(), *torch.autograd.grad(loss, (h, w))]


# Memory -------------------------------------------------------------------------------------------------


class _MallInfo(ctypes.Structure):
    """What glibc's `mallinfo` gives; see its manual page."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def allocated() -> int:
    """Bytes of this process that were allocated and not freed: of those in memory, some are for later."""
    mallinfo = ctypes.CDLL("libc.so.6").mallinfo
    mallinfo.restype = _MallInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


def test_ten_thousand_steps_leave_nothing_behind() -> None:
    """20 bytes that a step leaves, in Python or outside, or a tenth of an object, would show."""
    inputs = batch(2, 5)

    def run(steps: int) -> None:
        for i in range(steps):
            step("logits" if i % 2 else "linear", *inputs)

    run(1000)
    gc.collect()
    objects, memory = len(gc.get_objects()), allocated()
    run(9000)
    gc.collect()
    assert len(gc.get_objects()) - objects < 900
    assert allocated() - memory < 180_000
    tracemalloc.start()
    run(100)
    before = tracemalloc.get_traced_memory()[0]
    run(1000)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 20_000


# Compilation --------------------------------------------------------------------------------------------


@with_path
@pytest.mark.parametrize("gradient", ["scalar", "full"])
@pytest.mark.parametrize("kind", [int, torch.tensor], ids=["int", "tensor"])
def test_changing_shapes_and_counts_compile_twice_at_most(path: str, gradient: Gradient, kind: Any) -> None:
    """Once for the first shape, once for any: of the batch, of the sequence, and of the number of items."""
    torch._dynamo.reset()
    model = HeadAndLoss(CRITERIA[path](gradient=gradient), 8, 33)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for i, (b, s) in enumerate([(2, 5), (3, 7), (4, 9), (5, 6), (2, 11), (7, 3), (3, 8), (6, 12)]):
        hidden, _, labels = batch(b, s, seed=i)
        loss = compiled(hidden, labels, num_items_in_batch=kind(50 + 3 * i))
        torch.testing.assert_close(loss, model(hidden, labels, num_items_in_batch=kind(50 + 3 * i)))
        loss.backward()
    assert counter.frame_count <= 2


# The same bits ------------------------------------------------------------------------------------------


@pytest.fixture
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic mode, in which fresh memory holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@with_path
@with_gradient
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@with_backend
@pytest.mark.usefixtures("deterministic")
def test_deterministic_mode(path: str, gradient: Gradient, dtype: torch.dtype, backend: str) -> None:
    inputs = batch(2, 4 if backend == "triton" else 40, dtype)
    first = step(path, *inputs, gradient=gradient, backend=backend)
    assert not any(x.isnan().any() for x in first)
    for a, b in zip(first, step(path, *inputs, gradient=gradient, backend=backend), strict=True):
        assert torch.equal(a, b)


@with_path
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_threads(path: str, backend: str) -> None:
    """Of several threads at once each gets what it would get alone. Triton's interpreter is for one thread."""
    work = [(batch(2, 20 + i, seed=i), gradient) for i in range(8) for gradient in GRADIENTS]

    def run(inputs: tuple[Tensor, Tensor, Tensor], gradient: Gradient) -> list[Tensor]:
        return step(path, *inputs, gradient=gradient, backend=backend)

    alone = [run(*arguments) for arguments in work]
    ready = threading.Barrier(4)

    def at_once(order: list[int]) -> list[list[Tensor]]:
        ready.wait()
        return [run(*work[i]) for i in order]

    orders = [list(range(k, 32)) + list(range(k)) for k in (0, 8, 16, 24)]
    with ThreadPoolExecutor(4) as pool:
        for order, results in zip(orders, pool.map(at_once, orders), strict=True):
            for i, result in zip(order, results, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(result, alone[i], strict=True))


@pytest.mark.parametrize("option", ["alpha", "beta", "gamma"])
def test_a_schedule_compiles_twice(option: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    criterion = NVAMPLoss()
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    for value in (0.1, 0.2, 0.3, 0.4):
        setattr(criterion, option, value)
        torch.testing.assert_close(compiled(logits, labels), criterion(logits, labels))
    assert counter.frame_count == 2
