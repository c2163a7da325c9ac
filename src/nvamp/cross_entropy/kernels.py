"""Triton kernels on the rows of logits, and one that finishes the gradient of a weight.

Statistics and gradients are computed in WIDE: float32, float64 for float64. `labels`, `nll` and `grad_nll`
are flat, one element a row; `norm` has two, the largest z and log Σ exp(z − largest). Rows with
`ignore_index` are not read; rows with a label out of range get NaN, and nothing is read or written out of
bounds. Offsets of rows are 64 bits wide. With PART the logits are those of a part of the vocabulary, and a
label out of range is in another.

The options come as float64 scalars, so that a changed one compiles nothing again, with flags for what is off.
"""

import triton
import triton.language as tl

# What differs from call to call, by alignment alone or by size, is not to make variants of a kernel.
_FLAT = ("label_ptr", "nll_ptr", "norm_ptr", "grad_nll_ptr", "entropy_ptr", "correct_ptr", "classes_ptr")


@triton.jit
def _row(ptr, row, inner, stride_outer, stride_inner):
    """Where row `row` of logits [outer, inner, V] begins."""
    outer = row // inner
    return ptr + outer.to(tl.int64) * stride_outer + (row - outer * inner).to(tl.int64) * stride_inner


@triton.jit
def _columns(start, stride_vocab, ADJACENT: tl.constexpr, BLOCK: tl.constexpr):
    """A block of columns, and their offsets in a row."""
    columns = start + tl.arange(0, BLOCK)
    if ADJACENT:
        offsets = columns
    else:
        offsets = columns.to(tl.int64) * stride_vocab
    return columns, offsets


@triton.jit
def _tanh_and_slope(u):
    """tanh u and its derivative, each in the form that loses no digits: one near zero, one far from it."""
    e = tl.exp(-2 * tl.abs(u))
    tanh = (1 - e) / (1 + e)
    tanh = tl.where(u < 0, -tanh, tanh)
    near = tl.abs(u) < 0.625
    if u.dtype == tl.float32:  # float64 has digits to lose
        s = u * u  # a series from Cephes, tanhf.c
        series = (-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2
        series = (series * s + 1.33314422036e-1) * s - 3.33332819422e-1
        tanh = tl.where(near, u + u * s * series, tanh)
    return tanh, tl.where(near, 1 - tanh * tanh, 4 * e / ((1 + e) * (1 + e)))


@triton.jit
def _z_and_slope(x, softcap, logit_scale, WIDE: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr):
    """z of logits x, and dz/dx."""
    z = x.to(WIDE)
    slope = tl.full(z.shape, 1, WIDE)
    if SCALED:
        scale = tl.full((), logit_scale, WIDE)
        z *= scale
        slope *= scale
    if CAPPED:
        cap = tl.full((), softcap, WIDE)
        tanh, tanh_slope = _tanh_and_slope(z / cap)
        z = cap * tanh
        slope *= tanh_slope
    return z, slope


@triton.jit
def _z(x, softcap, logit_scale, WIDE: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr):
    z, _ = _z_and_slope(x, softcap, logit_scale, WIDE, CAPPED, SCALED)
    return z


@triton.jit
def _statistics(
    x_ptr,
    label,
    vocab,
    readable,
    stride_vocab,
    softcap,
    logit_scale,
    WIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    METRICS: tl.constexpr,
    ADJACENT: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pass over a row: largest z, Σ exp(z − largest), z of the label; where asked for, Σ z, entropy,
    correctness.

    Columns from `vocab` up to `readable` are there and mean nothing.
    """
    x = tl.load(x_ptr + label.to(tl.int64) * stride_vocab)
    at_label = _z(x, softcap, logit_scale, WIDE, CAPPED, SCALED)
    top = tl.full((), float("-inf"), WIDE)
    total = tl.full((), 0, WIDE)  # Σ exp(z − top)
    total_z = tl.full((), 0, WIDE)  # Σ z
    weighted = tl.full((), 0, WIDE)  # Σ exp(z − top)·(z − top)
    beaten = tl.full((), 0, tl.int32)
    for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        columns, offsets = _columns(start, stride_vocab, ADJACENT, BLOCK)
        inside = columns < vocab
        block = tl.load(x_ptr + offsets, mask=columns < readable, other=0)
        z = tl.where(inside, _z(block, softcap, logit_scale, WIDE, CAPPED, SCALED), float("-inf"))
        higher = tl.maximum(top, tl.max(z))
        shift = tl.where(higher == float("-inf"), 0, higher)  # nothing but −inf so far
        e = tl.exp(z - shift)
        shrink = tl.exp(top - shift)
        if METRICS:
            below_before = tl.where(total == 0, 0, top - shift)
            weighted = shrink * (weighted + total * below_before) + tl.sum(e * tl.where(e == 0, 0, z - shift))
            # The label wins ties against later columns alone. Whatever is compared to NaN beats it.
            below = tl.where(columns < label, z < at_label, z <= at_label)
            beaten = tl.maximum(beaten, tl.max(tl.where(below | (columns >= vocab), 0, 1)))
        if SMOOTHED:
            total_z += tl.sum(tl.where(inside, z, 0))
        total = total * shrink + tl.sum(e)
        top = higher
    entropy = total
    if METRICS:
        entropy = tl.log(total) - weighted / total
    return top, total, at_label, total_z, entropy, beaten == 0


@triton.jit
def _loss(
    top,
    log_sum,
    at_label,
    total_z,
    vocab,
    label_smoothing,
    z_loss,
    WIDE: tl.constexpr,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
):
    # loss = lse − (1 − label_smoothing)·z[y] − label_smoothing·mean(z) + z_loss·lse²
    nll = (top - at_label) + log_sum
    if SMOOTHED:
        smoothing = tl.full((), label_smoothing, WIDE)
        nll = (1 - smoothing) * nll + smoothing * ((top - total_z / vocab) + log_sum)
    if Z_LOSS:
        nll += tl.full((), z_loss, WIDE) * (top + log_sum) * (top + log_sum)
    return nll


@triton.jit
def _gradient(
    z,
    slope,
    columns,
    label,
    top,
    log_sum,
    weight,
    vocab,
    label_smoothing,
    z_loss,
    WIDE: tl.constexpr,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
):
    """Of weight·loss, by the logits."""
    # dloss/dz = p·(1 + 2·z_loss·lse) − (1 − label_smoothing)·[v = y] − label_smoothing/V
    g = tl.exp((z - top) - log_sum)
    if Z_LOSS:
        g *= 1 + 2 * tl.full((), z_loss, WIDE) * (top + log_sum)
    if SMOOTHED:
        smoothing = tl.full((), label_smoothing, WIDE)
        g = g - tl.where(columns == label, 1 - smoothing, 0) - smoothing / vocab
    else:
        g = tl.where(columns == label, g - 1, g)
    return g * slope * weight


@triton.jit(do_not_specialize=["inner", "ignore_index"], do_not_specialize_on_alignment=_FLAT)
def nll_kernel(
    x_ptr,
    label_ptr,
    nll_ptr,
    norm_ptr,
    entropy_ptr,
    correct_ptr,
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    vocab,
    ignore_index,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    WIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    METRICS: tl.constexpr,
    PART: tl.constexpr,
    ADJACENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Losses and norm of logits [outer, inner, V]: a program a row, which it reads once.

    With PART what they follow from: z of a label that is here to `nll`, Σ z to `entropy` if SMOOTHED, and to
    `norm` Σ exp(z − largest) without the logarithm.
    """
    row = tl.program_id(0)
    label = tl.load(label_ptr + row).to(tl.int64)
    if label == ignore_index:
        tl.store(nll_ptr + row, 0)
        tl.store(norm_ptr + 2 * row, 0)
        tl.store(norm_ptr + 2 * row + 1, 0)
        if METRICS or (PART and SMOOTHED):
            tl.store(entropy_ptr + row, 0)
        if METRICS:
            tl.store(correct_ptr + row, 0)
        return
    valid = (label >= 0) & (label < vocab)
    label = tl.where(valid, label, 0)
    x_ptr = _row(x_ptr, row, inner, stride_outer, stride_inner)
    top, total, at_label, total_z, entropy, correct = _statistics(
        x_ptr, label, vocab, vocab, stride_vocab, softcap, logit_scale,
        WIDE, CAPPED, SCALED, SMOOTHED, METRICS, ADJACENT, 1, BLOCK,
    )  # fmt: skip
    tl.store(norm_ptr + 2 * row, top)
    if PART:
        tl.store(norm_ptr + 2 * row + 1, total)
        tl.store(nll_ptr + row, tl.where(valid, at_label, 0))
        if SMOOTHED:
            tl.store(entropy_ptr + row, total_z)
    else:
        log_sum = tl.log(total)
        tl.store(norm_ptr + 2 * row + 1, log_sum)
        nll = _loss(top, log_sum, at_label, total_z, vocab, label_smoothing, z_loss, WIDE, SMOOTHED, Z_LOSS)
        tl.store(nll_ptr + row, tl.where(valid, nll, float("nan")))
    if METRICS:
        tl.store(entropy_ptr + row, entropy)
        tl.store(correct_ptr + row, correct & valid)


@triton.jit(do_not_specialize=["inner", "ignore_index"], do_not_specialize_on_alignment=_FLAT)
def gradient_kernel(
    x_ptr,
    out_ptr,
    label_ptr,
    norm_ptr,
    grad_nll_ptr,
    classes_ptr,
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    out_stride_outer,
    out_stride_inner,
    out_stride_vocab,
    vocab,
    ignore_index,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    WIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    PART: tl.constexpr,
    ADJACENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of Σ grad_nll·nll by logits [outer, inner, V], which may be `out`: a program a block.

    With PART `norm` is that of the whole vocabulary, and its size is at `classes`.
    """
    blocks = tl.cdiv(vocab, BLOCK)
    row = tl.program_id(0) // blocks
    start = (tl.program_id(0) - row * blocks) * BLOCK
    out_ptr = _row(out_ptr, row, inner, out_stride_outer, out_stride_inner)
    columns, offsets = _columns(start, stride_vocab, ADJACENT, BLOCK)
    _, out_offsets = _columns(start, out_stride_vocab, ADJACENT, BLOCK)
    inside = columns < vocab
    label = tl.load(label_ptr + row).to(tl.int64)
    if label == ignore_index:
        tl.store(out_ptr + out_offsets, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=inside)
        return
    weight = tl.load(grad_nll_ptr + row)
    classes = vocab
    if PART:
        classes = tl.load(classes_ptr)
    else:
        weight = tl.where((label >= 0) & (label < vocab), weight, float("nan"))
    top, log_sum = tl.load(norm_ptr + 2 * row), tl.load(norm_ptr + 2 * row + 1)
    x = tl.load(_row(x_ptr, row, inner, stride_outer, stride_inner) + offsets, mask=inside, other=0)
    z, slope = _z_and_slope(x, softcap, logit_scale, WIDE, CAPPED, SCALED)
    g = _gradient(
        z, slope, columns, label, top, log_sum, weight, classes, label_smoothing, z_loss,
        WIDE, SMOOTHED, Z_LOSS,
    )  # fmt: skip
    tl.store(out_ptr + out_offsets, g.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["ignore_index"], do_not_specialize_on_alignment=_FLAT)
def unit_gradient_kernel(
    x_ptr,
    label_ptr,
    nll_ptr,
    pitch,
    vocab,
    ignore_index,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    softcap: tl.float64,
    logit_scale: tl.float64,
    WIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Losses of logits [rows, V], which become the gradient of their sum: a program a row.

    It reads the row twice, the second time backwards: what it read last is still in the cache. The first time
    the next two blocks are on their way while one is worked on: no other program is there to fill the wait.
    Rows are `pitch` apart, and what is between them is read and written too: where the pitch is a multiple of
    16, and only there, all of that is vectors.
    """
    row = tl.program_id(0)
    x_ptr += row.to(tl.int64) * pitch
    blocks = tl.cdiv(vocab, BLOCK)
    label = tl.load(label_ptr + row).to(tl.int64)
    if label == ignore_index:
        tl.store(nll_ptr + row, 0)
        for block in range(blocks):
            columns = block * BLOCK + tl.arange(0, BLOCK)
            tl.store(x_ptr + columns, tl.zeros((BLOCK,), x_ptr.dtype.element_ty), mask=columns < pitch)
        return
    weight = tl.where((label >= 0) & (label < vocab), tl.full((), 1, WIDE), float("nan"))
    label = tl.where((label >= 0) & (label < vocab), label, 0)
    top, total, at_label, total_z, _, _ = _statistics(
        x_ptr, label, vocab, pitch, 1, softcap, logit_scale,
        WIDE, CAPPED, SCALED, SMOOTHED, False, True, 3, BLOCK,
    )  # fmt: skip
    log_sum = tl.log(total)
    nll = _loss(top, log_sum, at_label, total_z, vocab, label_smoothing, z_loss, WIDE, SMOOTHED, Z_LOSS)
    tl.store(nll_ptr + row, nll * weight)
    tl.debug_barrier()  # the logit of the label has been read by all before one overwrites it
    for block in range(blocks):
        columns = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        there = columns < pitch
        z, slope = _z_and_slope(
            tl.load(x_ptr + columns, mask=there, other=0), softcap, logit_scale, WIDE, CAPPED, SCALED
        )
        g = _gradient(
            z,
            slope,
            columns,
            label,
            top,
            log_sum,
            weight,
            vocab,
            label_smoothing,
            z_loss,
            WIDE,
            SMOOTHED,
            Z_LOSS,
        )
        tl.store(x_ptr + columns, g.to(x_ptr.dtype.element_ty), mask=there)


@triton.jit
def scale_and_add_kernel(
    x_ptr,
    out_ptr,
    a_ptr,
    b_ptr,
    u_ptr,
    v_ptr,
    columns_in_all,
    HAS_B: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = a·x + b·u vᵀ, for x [R, C], which `out` may be: a program a row."""
    row = tl.program_id(0).to(tl.int64)
    a = tl.load(a_ptr).to(WIDE)
    if HAS_B:
        bu = tl.load(b_ptr).to(WIDE) * tl.load(u_ptr + row).to(WIDE)
    for start in range(0, columns_in_all, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < columns_in_all
        at = row * columns_in_all + columns
        y = a * tl.load(x_ptr + at, mask=inside).to(WIDE)
        if HAS_B:
            y += bu * tl.load(v_ptr + columns, mask=inside).to(WIDE)
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)
