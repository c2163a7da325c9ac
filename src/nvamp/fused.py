"""NVAMP as one kernel, for losses on one GPU: its operator, and when it applies.

nvamp::objective    the loss, its statistics, and the weights of the tokens
"""

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from nvamp.engine.backends import backend_for
from nvamp.engine.checks import has_transforms
from nvamp.engine.operator import fields_of, operator
from nvamp.objectives.base import Objective, Result, Statistics
from nvamp.objectives.nvamp import NVAMP
from nvamp.ranks import ALONE, Ranks

THREADS = 1024  # in the one program
BLOCK_BYTES = 16 * THREADS  # losses that it takes at a time
SCALARS = 12  # numbers that the kernel returns: `Statistics` first, then the two weights


class Coefficients(NamedTuple):
    """The numbers of the objective, as the operator takes them."""

    alpha: float
    beta: float
    gamma: float
    eps: float


def serves(objective: Objective, nll: Tensor, backend: str | None, ranks: Ranks) -> TypeGuard[NVAMP]:
    """Whether the kernel can evaluate this objective on losses [tokens]."""
    return (
        type(objective) is NVAMP  # one derived from it may have another rule
        and not objective.tail
        and ranks is ALONE
        and backend_for(nll, backend) == "triton"
        and not has_transforms()
    )


def evaluate(
    objective: NVAMP,
    nll: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | float | None,
    ignore_index: int,
    apart: bool = True,
) -> Result:
    """`NVAMP.evaluate` for losses [tokens]; tokens whose label is `ignore_index` do not count.

    Labels [tokens] are int64, int32 or bool. The losses of tokens that do not count may be anything. Without
    `apart`, `per_token` includes the weight that all tokens share.
    """
    items, number = None, None
    if isinstance(num_items_in_batch, Tensor):
        items = num_items_in_batch
    elif num_items_in_batch is not None and torch.compiler.is_compiling():
        items = nll.new_ones(()) * num_items_in_batch  # a number as it is would be a constant of the graph
    elif num_items_in_batch is not None:
        number = float(num_items_in_batch)
    apart = apart and objective.few_weights(1) is not None
    c = Coefficients(*(float(getattr(objective, name)) for name in Coefficients._fields))
    loss, weights, scalars, index = judge(nll, labels, items, number, ignore_index, c, objective.mode, apart)

    def statistics() -> Statistics:
        return Statistics._make((*scalars[:9].unbind(), index, scalars[9]))

    if not apart:
        return Result(loss, None, weights, statistics=statistics)
    return Result(
        loss, scalars[10], None if objective.few_weights(1) == 0 else weights, statistics=statistics
    )


@operator(
    "nvamp::objective",
    "(Tensor nll, Tensor labels, Tensor? items, float? num_items, int ignore_index, "
    f"{fields_of(Coefficients)}, str gradient, bool apart) "
    "-> (Tensor loss, Tensor weights, Tensor scalars, Tensor max_index)",
)
def judge(
    nll: Tensor,
    labels: Tensor,
    items: Tensor | None,
    num_items: float | None,
    ignore_index: int,
    coefficients: Coefficients,
    gradient: str,
    apart: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from nvamp import fused_kernels  # only here: they need the package triton
    from nvamp.engine import triton

    nll, labels = nll.contiguous(), labels.contiguous()
    if items is not None and items.device != nll.device:
        if items.device.type != "cpu":
            raise ValueError(
                f"num_items_in_batch must be on the device of the losses, {nll.device}, or on the CPU, "
                f"got {items.device}"
            )
        num_items = float(items)

    loss, weights, scalars, index = results = _results(nll)
    given = triton.number(num_items, nll) if num_items is not None else items
    triton.launch(
        fused_kernels.objective_kernel,
        1,
        triton.Launch(BLOCK_BYTES // nll.itemsize, THREADS // triton.WARP),
        nll,
        labels,
        given,
        loss,
        scalars,
        index,
        weights,
        nll.numel(),
        ignore_index,
        *(triton.number(x, nll) for x in coefficients),
        ITEMS_IN_MEMORY=isinstance(given, Tensor),
        GRADIENT=gradient,
        APART=apart,
        WIDE=triton.WIDE[nll.dtype],
    )
    return results


@judge.register_fake
def _(nll: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results(nll)


def _results(nll: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for what the operator returns."""
    return (
        nll.new_empty(()),
        torch.empty_like(nll),
        nll.new_empty(SCALARS),
        nll.new_empty((), dtype=torch.int64),
    )
