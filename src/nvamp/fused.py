"""The objective in one kernel, for losses that lie on one GPU: its operator, and when it serves.

nvamp::objective    the loss, what it was made of, and if asked for the weight of every token
"""

from typing import Any

import torch
from torch import Tensor

from nvamp.engine.backends import backend_for
from nvamp.engine.checks import has_transforms
from nvamp.engine.operator import operator
from nvamp.objective import Gradient, Result, Statistics
from nvamp.ranks import ALONE, Ranks

THREADS = 1024  # of the one program
BLOCK_BYTES = 16 * THREADS  # of losses, that it takes at a time
SCALARS = 11  # what the kernel says of a batch; the first are `Statistics`, then the two weights


def serves(x: Tensor, backend: str | None, ranks: Ranks) -> bool:
    """Whether the losses of x, a tensor of the batch, are to be judged here."""
    return ranks is ALONE and backend_for(x, backend) == "triton" and not has_transforms()


def evaluate(
    nll: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | float | None,
    *,
    ignore_index: int,
    alpha: float,
    beta: float,
    gamma: float,
    eps: float,
    gradient: Gradient,
    per_token: bool,
) -> Result:
    """`objective.evaluate` of losses [tokens], of which those count whose label is not `ignore_index`.

    Labels [tokens] are int64, int32 or bool.
    """
    items, number = None, None
    if isinstance(num_items_in_batch, Tensor):
        items = num_items_in_batch
    elif num_items_in_batch is not None and torch.compiler.is_compiling():
        items = nll.new_ones(()) * num_items_in_batch  # a number as it is would be a constant of the graph
    elif num_items_in_batch is not None:
        number = float(num_items_in_batch)
    loss, weights, scalars, index = objective(
        nll, labels, items, number, ignore_index, *map(float, (alpha, beta, gamma, eps)), gradient, per_token
    )

    def statistics() -> Statistics:
        return Statistics._make((*scalars.unbind()[:9], index))

    if per_token:
        return Result(loss, weights, None, statistics)
    shared, at_max = scalars[9], scalars[10]
    return Result(loss, shared, at_max if gamma and gradient != "detached" else None, statistics)


@operator(
    "nvamp::objective",
    "(Tensor nll, Tensor labels, Tensor? items, float? num_items, int ignore_index, float alpha, "
    "float beta, float gamma, float eps, str gradient, bool per_token) "
    "-> (Tensor loss, Tensor weights, Tensor scalars, Tensor max_index)",
)
def objective(
    nll: Tensor,
    labels: Tensor,
    items: Tensor | None,
    num_items: float | None,
    ignore_index: int,
    alpha: float,
    beta: float,
    gamma: float,
    eps: float,
    gradient: str,
    per_token: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from nvamp import objective_kernels  # only here: they need the package triton
    from nvamp.engine import triton

    nll, labels = nll.contiguous(), labels.contiguous()
    if items is not None and items.device != nll.device:
        if items.device.type != "cpu":
            raise ValueError(
                f"num_items_in_batch must be on the device of the losses, {nll.device}, or on the CPU, "
                f"got {items.device}"
            )
        num_items = float(items)

    loss, weights, scalars, index = results = _results(nll, per_token)
    given = triton.number(num_items, nll) if num_items is not None else items
    triton.launch(
        objective_kernels.objective_kernel,
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
        *(triton.number(x, nll) for x in (alpha, beta, gamma, eps)),
        ITEMS_IN_MEMORY=isinstance(given, Tensor),
        GRADIENT=gradient,
        WEIGHTS=per_token,
        WIDE=triton.WIDE[nll.dtype],
    )
    return results


@objective.register_fake
def _(nll: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results(nll, args[-1])


def _results(nll: Tensor, per_token: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for what the operator returns."""
    return (
        nll.new_empty(()),
        nll.new_empty(nll.shape if per_token else (0,)),
        nll.new_empty(SCALARS),
        nll.new_empty((), dtype=torch.int64),
    )
