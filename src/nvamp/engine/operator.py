"""Operators that PyTorch knows, without the price of its dispatcher in a plain call.

A custom operator is what a compiler, an exporter, `torch.func` and every mode see of a function. A plain call
in eager mode needs none of that, and going through PyTorch's Python layers for them takes some 50 µs, longer
than many a function itself. An `Operator` bypasses them in that case: it calls the function, by way of an
`autograd.Function` of the same formulas if there are gradients to take.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_interpreter_stack, is_legacy_batchedtensor

Setup = Callable[[Any, tuple[Any, ...], Any], None]


def operator(name: str, schema: str) -> Callable[[Callable[..., Any]], "Operator"]:
    """Makes an operator of the function that it decorates, which changes none of its arguments.

    All arguments are positional.
    """
    return lambda function: Operator(name, schema, function)


class Operator:
    """A custom operator; registering a fake and a derivative is as `torch.library.custom_op` has it."""

    def __init__(self, name: str, schema: str, function: Callable[..., Any]) -> None:
        self.function = function
        self.registered = torch.library.custom_op(name, function, mutates_args=(), schema=schema)
        self.register_fake = self.registered.register_fake
        self._differentiable: type[torch.autograd.Function] | None = None

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Setup = lambda ctx, inputs, output: None
    ) -> None:
        """Gradients that nothing depends on are None in `backward`, which is not called if they all are."""

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            setup_context(ctx, inputs, output)

        def backward_of_some(ctx: Any, *grads: Tensor | None) -> Any:
            if all(grad is None for grad in grads):
                return (None,) * len(ctx.needs_input_grad)
            return backward(ctx, *grads)

        def forward(ctx: Any, *args: Any) -> Any:
            output = self.function(*args)
            setup(ctx, args, output)
            return output

        self.registered.register_autograd(backward_of_some, setup_context=setup)
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_some)}
        self._differentiable = type(self.registered._qualname, (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or not is_plain(args):
            return self.registered(*args)
        if self._differentiable and torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self._differentiable.apply(*args)  # type: ignore[no-untyped-call]
        return self.function(*args)


def is_ordinary(x: Tensor) -> bool:
    """Whether the memory of x holds its numbers, and nothing but x itself stands between."""
    return not (
        type(x) not in (Tensor, torch.nn.Parameter)
        or x.is_meta
        or x.is_neg()
        or x._is_zerotensor()
        or is_legacy_batchedtensor(x)
        or torch._is_functional_tensor(x)
    )


def is_plain(args: tuple[Any, ...]) -> bool:
    """Whether only autograd needs to see a call with these arguments."""
    if not all(is_ordinary(x) for x in args if isinstance(x, Tensor)):
        return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or get_interpreter_stack()
        or torch._C._is_tracing()
    )
