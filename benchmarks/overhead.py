"""The cost of a loss apart from its passes over the logits: `python -m benchmarks.overhead`.

It counts kernel launches, and measures the time in which the host issues a forward and a backward of a batch
so small that there is nothing else to wait for. The engine computes the losses of the tokens and the
objective makes one number of them; the plain sum of the losses shows the time of the engine alone.

    python -m benchmarks.overhead                                          on the CPU
    python -m benchmarks.overhead --device cuda                            on a GPU
    TRITON_INTERPRET=1 python -m benchmarks.overhead --backend triton      a GPU's launches without a GPU
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nvamp import LinearNVAMPLoss, NVAMPLoss, fused
from nvamp.engine import devices, ops
from nvamp.engine.backends import HAS_TRITON
from nvamp.engine.operator import Operator
from nvamp.functional import linear_token_nll, token_nll

OPERATORS = {
    o.registered._opoverload: o
    for o in (*vars(ops).values(), *vars(fused).values())
    if isinstance(o, Operator)
}
# PyTorch's operations of two launches: they fill or copy before they write. Others take one; views and
# operations that only reserve memory take none.
OF_TWO = ("constant_pad_nd", "masked_fill", "index_put")
OF_NONE = ("empty", "empty_like", "new_empty", "empty_strided", "promote_types")
LOSSES: dict[str, dict[str, Any]] = {
    "cross-entropy": {"alpha": 0.0, "beta": 1.0, "gamma": 0.0},
    "scalar": {},
    "token": {"gradient": "token"},
    "full": {"gradient": "full"},
    "detached": {"gradient": "detached"},
}

Loss = Callable[[], Tensor]  # a forward, to be followed by a backward


class Launches(NamedTuple):
    engine: int
    objective: int


class Counting(TorchDispatchMode):
    """A context that records the launches that PyTorch's operations and Triton's kernels take on a GPU.

    It also records what nvamp's operators call.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[tuple[str, str]] = []  # the function of nvamp, if any, and the operation
        self._function = ""

    def count(self) -> Launches:
        engine = sum(function not in ("", "objective") for function, _ in self.names)
        return Launches(engine, len(self.names) - engine)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in OPERATORS:
            operator = OPERATORS[func]
            with self:
                return self.looked_into(operator.function, func._opname)(*operator.grouped(args))
        if not func.is_view and func._opname not in OF_NONE:
            self.names += [(self._function, func._opname)] * (2 if func._opname in OF_TWO else 1)
        return func(*args, **(kwargs or {}))

    def looked_into(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, with all its calls recorded under its name."""

        def run(*args: Any) -> Any:
            outside, self._function = self._function, name
            try:
                return function(*args)
            finally:
                self._function = outside

        return run

    def recorded(self, launch: Callable[..., None]) -> Callable[..., None]:
        def run(kernel: Any, *args: Any, **constants: Any) -> None:
            self.names.append((self._function, kernel.fn.__name__))
            with torch.utils._python_dispatch._disable_current_modes():  # Triton's interpreter uses PyTorch
                launch(kernel, *args, **constants)

        return run


@contextmanager
def counting() -> Iterator[Counting]:
    mode = Counting()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(devices, "can_look", return_value=False))  # as on a GPU
        for name in ("_weighted_gradients", "_token_nll_backward_"):  # in the engine, but not operators
            function = mode.looked_into(getattr(ops, name), name)
            stack.enter_context(mock.patch.object(ops, name, function))
        if HAS_TRITON:
            from nvamp.engine import triton

            stack.enter_context(mock.patch.object(triton, "launch", mode.recorded(triton.launch)))
        stack.enter_context(mode)
        yield mode


def launches(loss: Loss, inputs: list[Tensor]) -> tuple[Launches, Launches]:
    """The launches of a forward and of its backward."""
    with counting() as forward:
        value = loss()
    with counting() as backward:
        torch.autograd.grad(value, inputs)
    return forward.count(), backward.count()


def host_seconds(loss: Loss, inputs: list[Tensor], rounds: int = 30, steps: int = 50) -> float:
    """The time that a forward and a backward take to issue, in the quickest of `rounds` rounds."""

    def step() -> None:
        torch.autograd.backward(loss())
        for x in inputs:
            x.grad = None

    def seconds() -> float:
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - start) / steps

    return min(seconds() for _ in range(rounds))


class Contender(NamedTuple):
    name: str
    loss: Loss
    inputs: list[Tensor]  # the tensors that get a gradient


def contenders(device: str, backend: str | None, n: int = 64, vocab: int = 16) -> Iterator[Contender]:
    """The losses of n tokens, from logits and from hidden states."""
    logits = torch.randn(n, vocab, device=device, requires_grad=True)
    hidden = torch.randn(n, 32, device=device, requires_grad=True)
    weight = torch.randn(vocab, 32, device=device, requires_grad=True)
    labels = torch.randint(vocab, (n,), device=device)

    yield Contender("logits, eager cross-entropy", lambda: F.cross_entropy(logits, labels), [logits])
    yield Contender(
        "logits, sum of the losses", lambda: token_nll(logits, labels, backend=backend).sum(), [logits]
    )
    for name, options in LOSSES.items():
        of_logits = NVAMPLoss(**options, shift=False, backend=backend)
        yield Contender(f"logits, {name}", lambda f=of_logits: f(logits, labels), [logits])  # type: ignore[misc]

    head = [hidden, weight]
    yield Contender(
        "linear, eager cross-entropy", lambda: F.cross_entropy(F.linear(hidden, weight), labels), head
    )
    yield Contender(
        "linear, sum of the losses",
        lambda: linear_token_nll(hidden, weight, labels, backend=backend).sum(),
        head,
    )
    for name, options in LOSSES.items():
        linear = LinearNVAMPLoss(**options, shift=False, backend=backend)
        yield Contender(f"linear, {name}", lambda f=linear: f(hidden, weight, labels), head)  # type: ignore[misc]


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", help="the engine's; the best one of the device by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    interpreted = args.backend == "triton" and args.device == "cpu"
    print(f"{'launches of':30}{'engine':>20}{'objective':>20}")
    print(f"{'':30}{'forward':>10}{'backward':>10}{'forward':>10}{'backward':>10}{'host µs':>12}")
    for name, loss, inputs in contenders(args.device, args.backend):
        forward, backward = launches(loss, inputs)
        counts = (forward.engine, backward.engine, forward.objective, backward.objective)
        took = "" if interpreted else f"{1e6 * host_seconds(loss, inputs):12.0f}"
        print(f"{name:30}" + "".join(f"{count:10}" for count in counts) + took)


if __name__ == "__main__":
    main()
