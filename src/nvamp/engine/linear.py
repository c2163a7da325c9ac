"""The linear path: one chunk of logits at a time, each turned into its gradient in place.

The matrix products are PyTorch's own; the backend handles the rows of a chunk.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nvamp.engine import devices
from nvamp.engine.backend import Backend, Chunk, Largest, OfEntropy
from nvamp.engine.hugepages import in_huge_pages
from nvamp.engine.options import Head, Needs, Options, accumulate_dtype

MiB = 2**20
# A CPU rounds a half-precision product to half precision before it can be added up. Up to this many chunks,
# adding up in float32 as well lowers the error too little to pay for its memory; see docs/engine.md.
FEW_CHUNKS = 4
TILE = 128  # rows that a matrix product takes at a time on an accelerator
ALLOWANCE = 512 * MiB  # that a chunk of logits may take on an accelerator, however small the head
FRUGAL = 256 * MiB  # the same, if memory comes first; half of it takes up to twice the time
SUMMANDS = 4096  # classes that a full-precision product adds up at a time; cuBLAS may add them up one by one
EIGHT = 8  # cuBLAS is up to seven times slower in half precision for a vocabulary that is no multiple of 8


def chunk_rows(
    hidden: Tensor, weight: Tensor, accum_dtype: torch.dtype | None, one_pass: bool = False
) -> int:
    """Rows of a chunk of logits of hidden [N, D] and weight [V, D]: enough for an efficient matrix product.

    On a CPU a row takes room for its logits, a copy of its hidden state and the gradient of that. On an
    accelerator each chunk reads and writes the float32 gradient of the weight once, so few chunks are best. A
    chunk may take `spare_bytes`, which the backward needs anyway once the chunk is gone, or 512 MiB if that
    is more, rounded up to fill a card with tiles of a product. If `accum_dtype` is the dtype of the weight,
    memory comes first: a chunk is as large as `hidden`, or 256 MiB if that is more.
    """
    vocab, features = weight.shape
    if devices.can_look(weight):
        return max(52 * MiB // ((vocab + 2 * features) * weight.itemsize), 1)
    row = pitch_of(vocab) * weight.itemsize
    if accum_dtype not in (None, accumulate_dtype(weight.dtype)):
        return TILE * max((max(hidden.nbytes, FRUGAL) // row + TILE // 2) // TILE, 1)
    return -(-max(spare_bytes(hidden, weight, one_pass), ALLOWANCE) // (2 * TILE * row)) * 2 * TILE


def spare_bytes(hidden: Tensor, weight: Tensor, one_pass: bool) -> int:
    """Memory that the end of the backward takes beyond what is held while chunks pass, on an accelerator.

    The end holds the gradient of the weight twice, as a sum in float32 and rounded. One pass holds the
    gradient of `hidden` in float32 while chunks pass, and rounds and frees it before that.
    """
    wide = accumulate_dtype(weight.dtype)
    if wide == weight.dtype:
        return 0
    return weight.nbytes - (hidden.numel() * wide.itemsize - hidden.nbytes if one_pass else 0)


def held_dtype(weight: Tensor, accum_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the gradients of hidden and weight between the one pass and its backward.

    An accelerator keeps the dtype of the sum, so that they are rounded once, after they are scaled. A CPU
    rounds products anyway and keeps the dtype of the inputs.
    """
    if devices.can_look(weight):
        return weight.dtype
    return accum_dtype or accumulate_dtype(weight.dtype)


def _sum_dtype(head: Head, rows: int, accum_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which the gradient of the weight is added up over all chunks."""
    if accum_dtype is not None:
        return accum_dtype
    dtype = head.weight.dtype
    few = FEW_CHUNKS if devices.can_look(head.weight) and dtype != torch.float16 else 1
    return dtype if rows <= few * chunk_rows(head.hidden, head.weight, None) else accumulate_dtype(dtype)


class _Rows(NamedTuple):
    """The rows of a head that have a label or, not `compact`, all of them."""

    head: Head
    labels: Tensor  # [rows]
    ignored: Tensor | None  # bool [rows]; None if no row is
    where: Tensor | None  # which rows of the head they are; None: all of them

    @classmethod
    def of(cls, head: Head, opt: Options, compact: bool) -> "_Rows":
        ignored = head.labels == opt.ignore_index
        if not compact:
            return cls(head, head.labels, ignored, None)
        where = (~ignored).nonzero()[:, 0]
        if len(where) == len(ignored):
            return cls(head, head.labels, None, None)
        return cls(head, head.labels[where], None, where)

    def gather(self, x: Tensor) -> Tensor:
        """These rows of x [N, ...]."""
        return x if self.where is None else x[self.where]

    def scatter(self, x: Tensor) -> Tensor:
        """[N, ...] with x in these rows, zeros elsewhere."""
        if self.where is None:
            return x
        return x.new_zeros(len(self.head.hidden), *x.shape[1:]).index_copy_(0, self.where, x)

    def hidden(self, at: slice) -> Tensor:
        """Hidden states [rows, D] of these rows, zeros for a row without a label: it may hold anything."""
        if self.where is not None:
            return self.head.hidden[self.where[at]]
        hidden = self.head.hidden[at]
        return hidden if self.ignored is None else hidden.masked_fill(self.ignored[at][:, None], 0)

    def slices(self, accum_dtype: torch.dtype | None, one_pass: bool = False) -> list[slice]:
        """Which rows each chunk has."""
        n = len(self.labels)
        rows = _even(n, chunk_rows(self.head.hidden, self.head.weight, accum_dtype, one_pass))
        return [slice(start, min(start + rows, n)) for start in range(0, n, max(rows, 1))]

    def chunks(self, slices: list[slice]) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Logits [rows, V], always in the same memory, hidden states [rows, D], and which rows these are."""
        _, weight, bias, _ = self.head
        vocab = len(weight)
        # On an accelerator rows start at whole 32 bytes, for vector loads and for the matrix products.
        pitch = vocab if devices.can_look(weight) else pitch_of(vocab)
        rows = slices[0].stop if slices else 0
        buffer = in_huge_pages(weight.new_empty((rows, pitch)))
        for at in slices:
            hidden = self.hidden(at)
            out = buffer[: len(hidden), :vocab]
            for part in _parts(weight):
                if bias is None:
                    torch.mm(hidden, weight[part].T, out=out[:, part])
                else:
                    torch.addmm(bias[part], hidden, weight[part].T, out=out[:, part])
            yield out, hidden, at


def pitch_of(vocab: int) -> int:
    """Elements from one row of logits to the next, on an accelerator."""
    return -(-vocab // 16) * 16


def _parts(weight: Tensor) -> list[slice]:
    """The classes of a weight [V, D] that a product takes at once: whole eights, and the few others."""
    vocab = len(weight)
    whole = vocab // EIGHT * EIGHT
    if whole in (0, vocab) or weight.itemsize != 2 or not _can_add_to_wider(weight):
        return [slice(0, vocab)]
    return [slice(0, whole), slice(whole, vocab)]


def _summed_parts(weight: Tensor) -> list[slice]:
    """The same for products that add up the classes: not too many at once in full precision."""
    if devices.can_look(weight) or weight.itemsize == 2:
        return _parts(weight)
    return [slice(start, start + SUMMANDS) for start in range(0, len(weight), SUMMANDS)]


def _even(n: int, most: int) -> int:
    """Rows of a chunk: as few chunks as `most` rows allow, all alike, in whole tiles if they are large."""
    rows = -(-n // max(-(-n // most), 1))
    whole = -(-rows // TILE) * TILE
    return whole if 8 * TILE <= whole <= most else rows


class _Gradients:
    """Sums, over chunks, of the gradients of a head; empty tensors for gradients that are not needed."""

    def __init__(
        self, rows: _Rows, needs: Needs, hidden: Tensor, weight: Tensor, bias: Tensor, scale: float = 0.0
    ) -> None:
        """`scale` multiplies what `weight` holds already; if it is 0, `weight` may hold anything."""
        self.rows, self.needs = rows, needs
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.scale = scale

    @classmethod
    def empty(
        cls, rows: _Rows, needs: Needs, hidden_dtype: torch.dtype, weight_dtype: torch.dtype
    ) -> "_Gradients":
        hidden, weight, *_ = rows.head
        return cls(
            rows,
            needs,
            hidden.new_zeros(hidden.shape if needs.hidden else 0, dtype=hidden_dtype),
            in_huge_pages(weight.new_empty(weight.shape if needs.weight else 0, dtype=weight_dtype)),
            weight.new_zeros(len(weight) if needs.bias else 0, dtype=accumulate_dtype(weight.dtype)),
        )

    def add(self, grad: Tensor, hidden: Tensor, at: slice) -> None:
        """Adds the part of hidden [rows, D], the rows `at`, from the gradient [rows, V] of their logits."""
        weight, where = self.rows.head.weight, self.rows.where
        if self.needs.hidden:
            parts = _summed_parts(weight)
            dtype = self.hidden.dtype if len(parts) == 1 else accumulate_dtype(weight.dtype)  # to round once
            in_place = where is None and dtype == self.hidden.dtype
            total = self.hidden[at] if in_place else self.hidden.new_empty(hidden.shape, dtype=dtype)
            for i, part in enumerate(parts):
                _add_product(total, grad[:, part], weight[part], scale=float(i > 0))
            if where is not None:
                self.hidden.index_copy_(0, where[at], total.to(self.hidden.dtype))
            elif not in_place:
                self.hidden[at] = total
        if self.needs.weight:
            for part in _parts(weight):
                _add_product(self.weight[part], grad[:, part].T, hidden, self.scale)
            self.scale = 1.0
        if self.needs.bias:
            self.bias += grad.sum(0, dtype=self.bias.dtype)

    def finish(self) -> None:
        """Applies the scale if nothing was added."""
        if self.scale == 0:
            self.weight.zero_()
        elif self.scale != 1:
            self.weight *= self.scale

    def result(self, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of hidden, weight and bias; the last is in the dtype of losses."""
        self.finish()
        return self.hidden, self.weight.to(weight_dtype), self.bias


def _add_product(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """total = scale·total + a @ b. The total may have a wider dtype; if scale is 0, it may hold anything."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=scale)
    elif _can_add_to_wider(total):
        torch.addmm(total, a, b, beta=scale, out_dtype=total.dtype, out=total)
    else:  # no product there can be added to a wider sum
        for out, rows in zip(torch.split(total, 8192), torch.split(a, 8192), strict=True):
            if scale == 0:
                out.copy_(rows @ b)
            else:
                torch.add(rows @ b, out, alpha=scale, out=out)


def _can_add_to_wider(total: Tensor) -> bool:
    if not total.is_cuda or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(total.device) >= (8, 0)


def token_nll(
    backend: Backend, head: Head, metrics: int, accum_dtype: torch.dtype | None, opt: Options
) -> tuple[Tensor, ...]:
    """`Backend.token_nll`, [N, ...] each."""
    return _of_each_chunk(
        lambda logits, labels: backend.token_nll(logits, labels, metrics, opt), head, accum_dtype, opt
    )


def part_statistics(
    backend: Backend, head: Head, metrics: int, accum_dtype: torch.dtype | None, opt: Options
) -> tuple[Tensor, ...]:
    """`Backend.part_statistics`, for a weight that is a part of the vocabulary; [N, ...] each."""
    return _of_each_chunk(
        lambda logits, labels: backend.part_statistics(logits, labels, metrics, opt), head, accum_dtype, opt
    )


def _of_each_chunk(
    function: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    head: Head,
    accum_dtype: torch.dtype | None,
    opt: Options,
) -> tuple[Tensor, ...]:
    """The results of a function on the logits [rows, V] and labels [rows] of each chunk, [N, ...] each."""
    rows = _Rows.of(head, opt, compact=devices.can_wait(head.hidden))
    chunks = [function(x, rows.labels[at]) for x, _, at in rows.chunks(rows.slices(accum_dtype))]
    if not chunks:
        chunks = [function(head.weight.new_empty(0, len(head.weight)), rows.labels)]
    return tuple(rows.scatter(torch.cat(results)) for results in zip(*chunks, strict=True))


def token_nll_backward(
    backend: Backend,
    grad_nll: Tensor,
    norm: Tensor,
    classes: Tensor | None,
    weights: Tensor | None,
    of_entropy: OfEntropy | None,
    head: Head,
    needs: Needs,
    accum_dtype: torch.dtype | None,
    opt: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of Σ grad_nll·nll with respect to hidden, weight and bias, in their dtypes.

    `classes`, `weights` and `of_entropy` are as in `Backend.token_nll_backward`.
    """
    rows = _Rows.of(head, opt, compact=devices.can_wait(head.hidden))
    weights = None if weights is None else rows.gather(weights)
    norm, grad_nll, *entropies = (rows.gather(x) for x in (norm, grad_nll, *(of_entropy or ())))
    sum_dtype = _sum_dtype(head, len(rows.labels), accum_dtype)
    grads = _Gradients.empty(rows, needs, head.hidden.dtype, sum_dtype)

    def take_chunks() -> None:  # a function, so that the chunk is gone before the gradient is rounded
        for x, h, at in rows.chunks(rows.slices(accum_dtype)):
            backend.token_nll_backward(
                grad_nll[at],
                x,
                rows.labels[at],
                norm[at],
                opt,
                out=x,
                classes=classes,
                weights=None if weights is None else weights[at],
                of_entropy=OfEntropy(*(e[at] for e in entropies)) if entropies else None,
            )
            grads.add(x, h, at)

    take_chunks()
    hidden, weight, bias = grads.result(head.weight.dtype)
    return hidden, weight, bias.to(weight.dtype)


class Units(NamedTuple):
    """What the one pass leaves to its backward; tensors that are not needed are empty."""

    max_index: Tensor  # int64 [1]: the row of the largest loss
    max_grad: Tensor  # [V]: the gradient of that loss with respect to its logits
    max_hidden: Tensor  # [D]
    grad_hidden: Tensor  # [N, D]: the gradients of Σ nll, these two in `held_dtype`
    grad_weight: Tensor  # [V, D]
    grad_bias: Tensor  # [V], in the dtype of losses


def unit_gradients(
    backend: Backend,
    head: Head,
    needs: Needs,
    few: int,
    metrics: int,
    accum_dtype: torch.dtype | None,
    opt: Options,
) -> tuple[tuple[Tensor, ...], Units]:
    """(nll,) or, with `metrics`, the results of `Backend.token_nll`, [N, ...] each, and the units.

    The row of the largest loss is kept if `few` is 1.
    """
    rows = _Rows.of(head, opt, compact=devices.can_look(head.hidden))
    held = held_dtype(head.weight, accum_dtype)
    sum_dtype = torch.promote_types(held, _sum_dtype(head, len(rows.labels), accum_dtype))
    grads = _Gradients.empty(rows, needs, held, sum_dtype)
    slices = rows.slices(accum_dtype, one_pass=True)
    largest = Largest.none(head, len(slices)) if few == 1 else None
    found: list[tuple[Tensor, ...]] = []

    def take_chunks() -> None:  # as above
        for i, (x, h, at) in enumerate(rows.chunks(slices)):
            labels = rows.labels[at]
            of_logits = backend.token_nll(x, labels, metrics, opt)[1:] if metrics else ()
            nll = backend.unit_gradient_(x, labels, opt)
            found.append((nll, *of_logits))
            if largest is not None:
                backend.keep_largest(largest, Chunk(i, at.start, nll, labels, x, h), opt)
            grads.add(x, h, at)

    take_chunks()
    if not found:
        found.append(backend.token_nll(head.weight.new_empty(0, len(head.weight)), rows.labels, metrics, opt))
    tokens = tuple(rows.scatter(torch.cat(results)) for results in zip(*found, strict=True))
    of_sum = grads.result(held)
    if largest is None:
        none = head.weight.new_empty(0)
        return tokens, Units(none.long(), none, none.clone(), *of_sum)
    index = largest.row[-1:]
    if rows.where is not None and len(rows.where):
        index = rows.where[index]
    # A copy, not a view: a fake tensor does not know what else its memory holds.
    return tokens, Units(index.clone(), largest.grad, largest.hidden, *of_sum)


def weighted_gradients(
    backend: Backend,
    grad_sum: Tensor,
    grad_nll: Tensor | None,
    units: Units,
    head: Head,
    needs: Needs,
    few: int,
    accum_dtype: torch.dtype | None,
    opt: Options,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of grad_sum·Σ nll + Σ grad_nll·nll with respect to hidden, weight and bias, in their dtypes.

    `grad_nll` [N] is 0 except in `few` rows; if `few` is 1, except in the row of the largest loss. `in_place`
    overwrites the units.
    """
    dtype = head.weight.dtype
    if not (few and len(head.hidden)):
        grad_nll = None

    def room_for(unit: Tensor) -> Tensor:
        return unit if in_place and unit.dtype == dtype else torch.empty_like(unit, dtype=dtype)

    hidden = room_for(units.grad_hidden)
    if needs.hidden:  # each of its rows is the gradient of one loss: any weights will do
        scale = grad_sum if grad_nll is None else (grad_sum + grad_nll)[:, None]
        torch.mul(units.grad_hidden, scale, out=hidden)
    if in_place and hidden is not units.grad_hidden:
        units.grad_hidden.untyped_storage().resize_(0)  # not needed again: room for the next
    bias = units.grad_bias * grad_sum
    if grad_nll is not None and few > 1:
        weight = units.grad_weight if in_place else units.grad_weight.clone()
        _scale_and_add_rows(backend, weight, bias, grad_sum, grad_nll, head, needs, few, accum_dtype, opt)
        return hidden, weight.to(dtype), bias.to(dtype)
    grad_max = None if grad_nll is None else grad_nll[units.max_index]
    weight = room_for(units.grad_weight)
    if needs.weight:
        backend.scale_and_add(
            units.grad_weight, grad_sum, grad_max, units.max_grad, units.max_hidden, out=weight
        )
    if needs.bias and grad_max is not None:
        bias += grad_max * units.max_grad
    return hidden, weight, bias.to(dtype)


def _scale_and_add_rows(
    backend: Backend,
    weight: Tensor,
    bias: Tensor,
    grad_sum: Tensor,
    grad_nll: Tensor,
    head: Head,
    needs: Needs,
    few: int,
    accum_dtype: torch.dtype | None,
    opt: Options,
) -> None:
    """Scales weight [V, D] by `grad_sum`, and adds the gradients of Σ grad_nll·nll to it and to the bias.

    It computes the logits of the rows with a `grad_nll` other than 0 again.
    """
    if devices.can_look(grad_nll):
        at = grad_nll.nonzero()[:, 0]
        scale = float(grad_sum)  # the first product applies it
    else:
        at = grad_nll.abs().topk(min(few, len(grad_nll)), sorted=False).indices
        weight *= grad_sum
        scale = 1.0
    chosen = head._replace(hidden=head.hidden[at], labels=head.labels[at])
    rows = _Rows.of(chosen, opt, compact=devices.can_look(head.hidden))
    grad_nll = rows.gather(grad_nll[at])
    grads = _Gradients(rows, needs._replace(hidden=False), weight.new_empty(0), weight, bias, scale)
    for x, h, part in rows.chunks(rows.slices(accum_dtype, one_pass=True)):
        labels = rows.labels[part]
        _, norm = backend.token_nll(x, labels, False, opt)
        backend.token_nll_backward(grad_nll[part], x, labels, norm, opt, out=x)
        grads.add(x, h, part)
    grads.finish()
