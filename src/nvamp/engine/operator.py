"""Operators that PyTorch knows, without the price of its dispatcher in a plain call.

Compilers, exporters, `torch.func` and every mode see a function as a custom operator. A plain call in eager
mode needs none of that, and PyTorch's Python layers for it take some 50 µs, longer than many functions
themselves. For such a call an `Operator` bypasses them: it calls the function directly, or through an
`autograd.Function` with the same formulas if there are gradients to take.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch._C._functorch import get_interpreter_stack, is_legacy_batchedtensor

Setup = Callable[[Any, tuple[Any, ...], Any], None]
# What a schema calls the types of a group's fields.
SCHEMA_TYPES: dict[object, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    float: "float",
    float | None: "float?",
}


def fields_of(group: type, prefix: str = "") -> str:
    """The fields of a `NamedTuple` as a schema lists them, with the prefix before each name."""
    hints = get_type_hints(group).items()
    return ", ".join(f"{SCHEMA_TYPES[hint]} {prefix}{name}" for name, hint in hints)


def operator(name: str, schema: str) -> Callable[[Callable[..., Any]], "Operator"]:
    """Decorates a function that changes none of its arguments, and makes it an operator.

    All arguments are positional. PyTorch wants them flat: a parameter annotated as a `NamedTuple` stands for
    its fields, which `fields_of` lists in the schema.
    """
    return lambda function: Operator(name, schema, function)


class Operator:
    """A custom operator. A fake and a derivative are registered as with `torch.library.custom_op`.

    The fake and `setup_context` get their arguments grouped, as the function does.
    """

    def __init__(self, name: str, schema: str, function: Callable[..., Any]) -> None:
        self.function = function
        annotations = [p.annotation for p in inspect.signature(function).parameters.values()]
        self._groups = [a if hasattr(a, "_fields") else None for a in annotations]
        flat = self._of_flat(function)
        self.registered = torch.library.custom_op(name, flat, mutates_args=(), schema=schema)
        self._differentiable: type[torch.autograd.Function] | None = None

    def _of_flat(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: function(*self.grouped(args))

    def grouped(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of the function, from the flat ones that PyTorch knows."""
        rest = iter(args)
        return tuple(
            next(rest) if group is None else group(*(next(rest) for _ in group._fields))
            for group in self._groups
        )

    def register_fake(self, function: Callable[..., Any]) -> None:
        self.registered.register_fake(self._of_flat(function))

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Setup = lambda ctx, inputs, output: None
    ) -> None:
        """`backward` returns the gradients of the first flat arguments; the others have none.

        `backward` gets None for gradients that nothing depends on, and is not called if all of them are None.
        """

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            setup_context(ctx, self.grouped(inputs), output)

        def backward_of_some(ctx: Any, *grads: Tensor | None) -> Any:
            found = () if all(grad is None for grad in grads) else backward(ctx, *grads)
            return *found, *(None,) * (len(ctx.needs_input_grad) - len(found))

        def forward(ctx: Any, *args: Any) -> Any:
            output = self.function(*self.grouped(args))
            setup(ctx, args, output)
            return output

        self.registered.register_autograd(backward_of_some, setup_context=setup)
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_some)}
        self._differentiable = type(self.registered._qualname, (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> Any:
        flat = _flat(args)
        if torch.compiler.is_compiling() or not is_plain(flat):
            return self.registered(*flat)
        if self._differentiable and torch.is_grad_enabled() and torch._C._any_requires_grad(*flat):
            return self._differentiable.apply(*flat)  # type: ignore[no-untyped-call]
        return self.function(*args)


def _flat(args: tuple[Any, ...]) -> list[Any]:
    return [x for arg in args for x in (arg if isinstance(arg, tuple) else (arg,))]


def is_ordinary(x: Tensor) -> bool:
    """Whether the memory of x holds its values as they are, without a subclass, wrapper or lazy flag."""
    return not (
        type(x) not in (Tensor, torch.nn.Parameter)
        or x.is_meta
        or x.is_neg()
        or x._is_zerotensor()
        or is_legacy_batchedtensor(x)
        or torch._is_functional_tensor(x)
    )


def is_plain(args: Iterable[Any]) -> bool:
    """Whether only autograd needs to see a call with these arguments."""
    if not all(is_ordinary(x) for x in args if isinstance(x, Tensor)):
        return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or get_interpreter_stack()
        or torch._C._is_tracing()
    )
