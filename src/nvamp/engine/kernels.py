"""Triton kernels on the rows of logits, and two that finish the gradient of a weight.

Statistics and gradients are computed in WIDE: float32, float64 for float64. `labels`, `nll` and `grad_nll`
are flat, one element a row; `norm` has two, the largest z and log Σ exp(z − largest). Rows with
`ignore_index` are not read; rows with a label out of range get NaN, and nothing is read or written out of
bounds. Offsets of rows are 64 bits wide. With PART the logits are those of a part of the vocabulary, and a
label out of range is in another.

A row of adjacent columns is read and written in vectors of 16 bytes, wherever it begins. The few columns
before its first boundary of 16 bytes and after its last one, its edges, go one at a time. A block of columns
is [BLOCK / (LANES·VECTOR), LANES, VECTOR]. A lane is a thread: it takes whole vectors, and keeps a maximum
and sums of its own until the row ends, so that threads exchange numbers only once a row.

The options come as scalars, so that a changed one compiles nothing again, with flags for what is off: as
float32, which every GPU has, or for float64 logits as pointers to a float64.
"""

import triton
import triton.language as tl

# These differ from call to call by alignment or size, which is not to make variants of a kernel.
_FLAT = (
    "label_ptr",
    "nll_ptr",
    "norm_ptr",
    "grad_nll_ptr",
    "entropy_ptr",
    "grad_entropy_ptr",
    "sum_below_ptr",
    "prediction_ptr",
    "classes_ptr",
)


@triton.jit
def _exp(x):
    """exp x. In float32 it takes two instructions fewer than `tl.exp` and is as exact."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _number(option, WIDE: tl.constexpr):
    """The value of an option: a float32 itself, or a pointer to a float64."""
    if tl.float64 == WIDE:
        return tl.load(option)
    else:
        return tl.full((), option, WIDE)


@triton.jit
def _row(row, inner, stride_outer, stride_inner):
    """The offset of row `row` of logits [outer, inner, V]."""
    outer = row // inner
    return outer * stride_outer + (row - outer * inner) * stride_inner


@triton.jit
def _whole_vectors(ptr, vocab, ADJACENT: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of a row before its first boundary of 16 bytes, and columns of whole vectors from there on.

    A row whose columns are not adjacent has no boundaries: all of it counts as whole vectors.
    """
    head = tl.zeros((), tl.int32)
    body = head + vocab
    if ADJACENT:
        itemsize: tl.constexpr = 16 // VECTOR
        beyond = (ptr.to(tl.int64) // itemsize % VECTOR).to(tl.int32)
        head = tl.minimum((VECTOR - beyond) % VECTOR, vocab)
        body = (vocab - head) // VECTOR * VECTOR
    return head, body


@triton.jit
def _edges(head, body, vocab, VECTOR: tl.constexpr):
    """The columns [2·VECTOR] before and after the whole vectors of a row; −1 for those it does not have."""
    i = tl.arange(0, 2 * VECTOR)
    after = head + body + i - VECTOR
    return tl.where(i < VECTOR, tl.where(i < head, i, -1), tl.where(after < vocab, after, -1))


@triton.jit
def _columns(BLOCK: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The columns of a block, by lanes: neighbouring lanes take neighbouring vectors."""
    vectors = (
        tl.arange(0, BLOCK // (LANES * VECTOR))[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
    )
    return vectors * VECTOR + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def _offsets(columns, stride_vocab, ADJACENT: tl.constexpr):
    if ADJACENT:
        return columns
    else:
        return columns.to(tl.int64) * stride_vocab


@triton.jit
def _body(ptr, row, head, ALIGNED: tl.constexpr, VECTOR: tl.constexpr):
    """The start of the whole vectors of the row at an offset, declared to Triton as a boundary.

    It is declared twice: for AMD's GPUs Triton considers offsets alone, and takes `ptr` as it is.
    """
    start = row + head
    if ALIGNED:
        start = tl.multiple_of(start, VECTOR)
    body_ptr = ptr + start
    if ALIGNED:
        body_ptr = tl.multiple_of(body_ptr, 16)
    return body_ptr


@triton.jit
def _lane_sum(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def _tanh_and_slope(u):
    """tanh u and its derivative, each in the form that loses no digits: one near zero, one far from it."""
    e = _exp(-2 * tl.abs(u))
    inverse = 1 / (1 + e)
    tanh = (1 - e) * inverse
    tanh = tl.where(u < 0, -tanh, tanh)
    near = tl.abs(u) < 0.625
    if u.dtype == tl.float32:  # float64 has digits to lose
        s = u * u  # a series from Cephes, tanhf.c
        series = (-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2
        series = (series * s + 1.33314422036e-1) * s - 3.33332819422e-1
        tanh = tl.where(near, u + u * s * series, tanh)
    return tanh, tl.where(near, 1 - tanh * tanh, 4 * e * (inverse * inverse))


@triton.jit
def _z_and_slope(x, softcap, logit_scale, WIDE: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr):
    """z of logits x, and dz/dx."""
    z = x.to(WIDE)
    slope = tl.full(z.shape, 1, WIDE)
    if SCALED:
        scale = _number(logit_scale, WIDE)
        z *= scale
        slope *= scale
    if CAPPED:
        cap = _number(softcap, WIDE)
        tanh, tanh_slope = _tanh_and_slope(z * (1 / cap))
        z = cap * tanh
        slope *= tanh_slope
    return z, slope


@triton.jit
def _load_z(ptr, there, softcap, logit_scale, WIDE: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr):
    """z of the logits that are there, −inf for the others."""
    if CAPPED or SCALED:
        x = tl.load(ptr, mask=there, other=0)
        z, _ = _z_and_slope(x, softcap, logit_scale, WIDE, CAPPED, SCALED)
        return tl.where(there, z, float("-inf"))
    else:
        return tl.load(ptr, mask=there, other=float("-inf")).to(WIDE)


@triton.jit
def _finite(x):
    """x, or 0 for −inf, safe to subtract from something that may be −inf too."""
    return tl.where(x == float("-inf"), 0, x)


@triton.jit
def _anchor(at_label):
    """What is subtracted from every z before they are added up: their common part would cost digits."""
    return tl.where(tl.abs(at_label) < float("inf"), at_label, 0)


@triton.jit
def _with_block(z, top, total, weighted, METRICS: tl.constexpr):
    """Adds a block to each lane's largest z, Σ exp(z − largest) and Σ exp(z − largest)·(z − largest)."""
    higher = tl.maximum(top, tl.max(tl.max(z, 2), 0))
    shift = _finite(higher)
    below = z - shift[None, :, None]
    e = _exp(below)
    shrink = _exp(top - shift)
    if METRICS:
        weighted = shrink * (weighted + total * tl.where(total == 0, 0, top - shift))
        weighted += _lane_sum(e * tl.maximum(below, -1e30))  # 0 for −inf
    return higher, total * shrink + _lane_sum(e), weighted


@triton.jit
def _statistics(
    logits_ptr,
    row,
    label,
    vocab,
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
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """One pass over a row: largest z, Σ exp(z − largest) and z of the label; if SMOOTHED, Σ (z − anchor);
    with METRICS, the entropy and the first class of the largest z.
    """
    x_ptr = logits_ptr + row
    x = tl.load(x_ptr + label * stride_vocab)
    at_label, _ = _z_and_slope(x, softcap, logit_scale, WIDE, CAPPED, SCALED)
    anchor = _anchor(at_label)
    head, body = _whole_vectors(x_ptr, vocab, ADJACENT, VECTOR)
    edges = _edges(head, body, vocab, VECTOR)
    z_edges = _load_z(x_ptr + edges, edges >= 0, softcap, logit_scale, WIDE, CAPPED, SCALED)
    body_ptr = _body(logits_ptr, row, head, ADJACENT, VECTOR)
    columns = _columns(BLOCK, LANES, VECTOR)
    top = tl.full((LANES,), float("-inf"), WIDE)
    total = tl.full((LANES,), 0, WIDE)  # Σ exp(z − top)
    total_z = tl.full((LANES,), 0, WIDE)  # Σ (z − anchor)
    weighted = tl.full((LANES,), 0, WIDE)  # Σ exp(z − top)·(z − top)
    reached = tl.zeros((LANES,), tl.int32)  # the start of the block in which a lane first had its largest z
    whole = body // BLOCK * BLOCK  # a mask costs instructions: only the last block has one
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        ptr = body_ptr + _offsets(start + columns, stride_vocab, ADJACENT)
        z, _slope = _z_and_slope(tl.load(ptr), softcap, logit_scale, WIDE, CAPPED, SCALED)
        before = top
        top, total, weighted = _with_block(z, top, total, weighted, METRICS)
        if SMOOTHED:
            total_z += _lane_sum(z - anchor)
        if METRICS:
            reached = tl.where(top > before, start, reached)
    if whole < body:
        last = whole + columns
        ptr = body_ptr + _offsets(last, stride_vocab, ADJACENT)
        z_last = _load_z(ptr, last < body, softcap, logit_scale, WIDE, CAPPED, SCALED)
        before = top
        top, total, weighted = _with_block(z_last, top, total, weighted, METRICS)
        if METRICS:
            reached = tl.where(top > before, whole, reached)
        if SMOOTHED:
            total_z += _lane_sum(tl.where(last < body, z_last - anchor, 0))
    # Now the lanes and the edges come together.
    body_top, edges_top = tl.max(top), tl.max(z_edges)
    highest = tl.maximum(body_top, edges_top)
    shift = _finite(highest)
    shrink = _exp(top - shift)
    e = _exp(z_edges - shift)
    sum_z = tl.sum(total_z)
    if SMOOTHED:
        sum_z += tl.sum(tl.where(edges >= 0, z_edges - anchor, 0))
    sum_e = tl.sum(total * shrink) + tl.sum(e)
    entropy, prediction = sum_e, label
    if METRICS:
        weighted = shrink * (weighted + total * tl.where(total == 0, 0, top - shift))
        sum_weighted = tl.sum(weighted) + tl.sum(e * tl.maximum(z_edges - shift, -1e30))
        some = tl.where(sum_e == 0, 1, sum_e)  # a part may have no mass
        entropy = tl.log(some) - sum_weighted / some
        # The largest z of the body is in the first block in which a lane had it; of equals the first counts.
        c = tl.min(tl.where(top == body_top, reached, whole)) + tl.arange(0, BLOCK)
        z = _load_z(
            x_ptr + head + _offsets(c, stride_vocab, ADJACENT),
            c < body,
            softcap,
            logit_scale,
            WIDE,
            CAPPED,
            SCALED,
        )
        in_body = tl.min(tl.where(z == tl.max(z), head + c, vocab))
        in_edges = tl.min(tl.where((edges >= 0) & (z_edges == edges_top), edges, vocab))
        in_body = tl.where(body_top < edges_top, vocab, in_body)
        in_edges = tl.where(edges_top < body_top, vocab, in_edges)
        prediction = tl.minimum(tl.minimum(in_body, in_edges), vocab - 1).to(tl.int64)
    return highest, sum_e, at_label, sum_z, entropy, prediction


@triton.jit
def _loss(
    top,
    log_sum,
    at_label,
    sum_z,
    vocab,
    label_smoothing,
    z_loss,
    WIDE: tl.constexpr,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
):
    # loss = lse − z[y] − label_smoothing·mean(z − z[y]) + z_loss·lse²
    nll = (top - at_label) + log_sum
    if SMOOTHED:
        smoothing = _number(label_smoothing, WIDE)
        nll = (1 - smoothing) * nll + smoothing * (((top - _anchor(at_label)) - sum_z / vocab) + log_sum)
    if Z_LOSS:
        nll += _number(z_loss, WIDE) * (top + log_sum) * (top + log_sum)
    return nll


@triton.jit
def _factors(
    top,
    log_sum,
    weight,
    vocab,
    entropy,
    grad_entropy,
    label_smoothing,
    z_loss,
    WIDE: tl.constexpr,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """(a, b, c, d) of the gradient (a + d·(z − top))·exp(z − top) − b − c·[v = y], with respect to z.

    It is the gradient of weight·loss, with ENTROPY of weight·loss + grad_entropy·entropy.
    """
    # dloss/dz = p·(1 + 2·z_loss·lse) − (1 − label_smoothing)·[v = y] − label_smoothing/V
    # dentropy/dz = −p·(log p + entropy)
    a = weight * _exp(-log_sum)
    b = tl.zeros_like(a)
    c = weight
    d = tl.zeros_like(a)
    if Z_LOSS:
        a *= 1 + 2 * _number(z_loss, WIDE) * (top + log_sum)
    if ENTROPY:
        d = -grad_entropy * _exp(-log_sum)
        a += d * (entropy - log_sum)
    if SMOOTHED:
        smoothing = _number(label_smoothing, WIDE)
        b = weight * smoothing / vocab
        c = weight * (1 - smoothing)
    return a, b, c, d


@triton.jit
def _gradient(
    x,
    top,
    a,
    b,
    d,
    softcap,
    logit_scale,
    WIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """The gradient with respect to logits x, as if none of them was the label's."""
    z, slope = _z_and_slope(x, softcap, logit_scale, WIDE, CAPPED, SCALED)
    if ENTROPY:
        below = z - top
        g = (a + d * tl.maximum(below, -1e4)) * _exp(below)  # 0 long before −10⁴, and for −inf
    else:
        g = a * _exp(z - top)
    if SMOOTHED:
        g -= b
    if CAPPED or SCALED:
        g *= slope
    return g


@triton.jit(do_not_specialize=["inner", "ignore_index"], do_not_specialize_on_alignment=_FLAT)
def nll_kernel(
    x_ptr,
    label_ptr,
    nll_ptr,
    norm_ptr,
    entropy_ptr,
    prediction_ptr,
    sum_below_ptr,
    inner,
    stride_outer,
    stride_inner,
    stride_vocab,
    vocab,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    logit_scale,
    WIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    METRICS: tl.constexpr,
    PART: tl.constexpr,
    SUM: tl.constexpr,
    ADJACENT: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Losses and norm of logits [outer, inner, V]: a program a row, which it reads once.

    With PART it writes what they follow from: to `nll` the z of a label that is here, and to `norm`
    Σ exp(z − largest) without the logarithm. With SUM it writes Σ (largest − z) to `sum_below`, which
    is 0 before.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row).to(tl.int64)
    if label == ignore_index:
        tl.store(nll_ptr + row, 0)
        tl.store(norm_ptr + 2 * row, 0)
        tl.store(norm_ptr + 2 * row + 1, 0)
        if METRICS:
            tl.store(entropy_ptr + row, 0)
            tl.store(prediction_ptr + row, 0)
        return
    valid = (label >= 0) & (label < vocab)
    label = tl.where(valid, label, 0)
    x_row = _row(row, inner, stride_outer, stride_inner)
    top, total, at_label, sum_z, entropy, prediction = _statistics(
        x_ptr, x_row, label, vocab, stride_vocab, softcap, logit_scale,
        WIDE, CAPPED, SCALED, SMOOTHED or SUM, METRICS, ADJACENT, 1, BLOCK, LANES, VECTOR,
    )  # fmt: skip
    tl.store(norm_ptr + 2 * row, top)
    if PART:
        tl.store(norm_ptr + 2 * row + 1, total)
        tl.store(nll_ptr + row, tl.where(valid, at_label, 0))
    else:
        log_sum = tl.log(total)
        tl.store(norm_ptr + 2 * row + 1, log_sum)
        nll = _loss(top, log_sum, at_label, sum_z, vocab, label_smoothing, z_loss, WIDE, SMOOTHED, Z_LOSS)
        tl.store(nll_ptr + row, tl.where(valid, nll, float("nan")))
    if SUM:
        tl.store(sum_below_ptr + row, vocab * (_finite(top) - _anchor(at_label)) - sum_z)
    if METRICS:
        tl.store(entropy_ptr + row, entropy)
        tl.store(prediction_ptr + row, prediction)


@triton.jit(do_not_specialize=["inner", "ignore_index"], do_not_specialize_on_alignment=_FLAT)
def gradient_kernel(
    x_ptr,
    out_ptr,
    label_ptr,
    norm_ptr,
    grad_nll_ptr,
    entropy_ptr,
    grad_entropy_ptr,
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
    label_smoothing,
    z_loss,
    softcap,
    logit_scale,
    WIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    ENTROPY: tl.constexpr,
    PART: tl.constexpr,
    ADJACENT: tl.constexpr,
    ALIKE: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Gradient of Σ grad_nll·nll, with ENTROPY of Σ grad_nll·nll + Σ grad_entropy·entropy, with respect to
    logits [outer, inner, V], which may be `out`: a program a block.

    Its vectors follow `out`. The logits have theirs at the same columns if the two are ALIKE, and are read
    one at a time if not. With PART norm and entropy describe the whole vocabulary, whose size is at
    `classes`.
    """
    blocks = tl.cdiv(vocab, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * BLOCK
    out_row = _row(row, inner, out_stride_outer, out_stride_inner)
    head, body = _whole_vectors(out_ptr + out_row, vocab, ADJACENT, VECTOR)
    edges = _edges(head, body, vocab, VECTOR)
    edges = tl.where(start == 0, edges, -1)
    columns = start + _columns(BLOCK, LANES, VECTOR)
    inside = columns < body
    body_out_ptr = _body(out_ptr, out_row, head, ADJACENT, VECTOR)
    body_out_ptr += _offsets(columns, out_stride_vocab, ADJACENT)
    out_ptr += out_row
    label = tl.load(label_ptr + row).to(tl.int64)
    if label == ignore_index:
        zero = out_ptr.dtype.element_ty
        tl.store(body_out_ptr, tl.zeros(columns.shape, zero), mask=inside)
        tl.store(out_ptr + edges, tl.zeros(edges.shape, zero), mask=edges >= 0)
        return
    weight = tl.load(grad_nll_ptr + row)
    classes = vocab
    here = (label >= 0) & (label < vocab)
    if PART:
        classes = tl.load(classes_ptr)
    else:
        weight = tl.where(here, weight, float("nan"))
    # The label's column is in this program's block or in the edges.
    in_block = (label >= head + start) & (label < tl.minimum(head + start + BLOCK, head + body))
    in_edges = (start == 0) & ((label < head) | (label >= head + body))
    here = here & (in_block | in_edges)
    x_row = _row(row, inner, stride_outer, stride_inner)
    body_ptr = _body(x_ptr, x_row, head, ADJACENT and ALIKE, VECTOR)
    body_ptr += _offsets(columns, stride_vocab, ADJACENT)
    x_ptr += x_row
    x_label = tl.load(x_ptr + label * stride_vocab, mask=here, other=0)
    top, log_sum = tl.load(norm_ptr + 2 * row), tl.load(norm_ptr + 2 * row + 1)
    entropy, grad_entropy = weight, weight
    if ENTROPY:
        entropy, grad_entropy = tl.load(entropy_ptr + row), tl.load(grad_entropy_ptr + row)
    a, b, c, d = _factors(
        top, log_sum, weight, classes, entropy, grad_entropy, label_smoothing, z_loss,
        WIDE, SMOOTHED, Z_LOSS, ENTROPY,
    )  # fmt: skip
    x = tl.load(body_ptr, mask=inside, other=0)
    x_edges = tl.load(x_ptr + edges, mask=edges >= 0, other=0)
    tl.debug_barrier()  # the logit of the label has been read by all before one overwrites it
    g = _gradient(x, top, a, b, d, softcap, logit_scale, WIDE, CAPPED, SCALED, SMOOTHED, ENTROPY)
    tl.store(body_out_ptr, g.to(out_ptr.dtype.element_ty), mask=inside)
    g = _gradient(x_edges, top, a, b, d, softcap, logit_scale, WIDE, CAPPED, SCALED, SMOOTHED, ENTROPY)
    tl.store(out_ptr + edges, g.to(out_ptr.dtype.element_ty), mask=edges >= 0)
    if here:
        tl.debug_barrier()  # the label's column has been written as one of all
        _z_label, slope = _z_and_slope(x_label, softcap, logit_scale, WIDE, CAPPED, SCALED)
        g_label = _gradient(
            x_label, top, a, b, d, softcap, logit_scale, WIDE, CAPPED, SCALED, SMOOTHED, ENTROPY
        )
        g_label -= c * slope
        tl.store(out_ptr + label * out_stride_vocab, g_label.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["ignore_index"], do_not_specialize_on_alignment=_FLAT)
def unit_gradient_kernel(
    x_ptr,
    label_ptr,
    nll_ptr,
    pitch,
    vocab,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    logit_scale,
    WIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    SCALED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Losses of logits [rows, V], which become the gradient of their sum: a program a row.

    It reads the row twice, the second time backwards: what it read last is still in the cache. The first time
    the next two blocks load while one is worked on, as no other program is there to fill the wait.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr = x_ptr
    x_ptr += row * pitch
    head, body = _whole_vectors(x_ptr, vocab, True, VECTOR)
    edges = _edges(head, body, vocab, VECTOR)
    body_ptr = _body(logits_ptr, row * pitch, head, True, VECTOR)
    columns = _columns(BLOCK, LANES, VECTOR)
    label = tl.load(label_ptr + row).to(tl.int64)
    narrow = x_ptr.dtype.element_ty
    if label == ignore_index:
        tl.store(nll_ptr + row, 0)
        for start in range(0, body, BLOCK):
            at = start + columns
            tl.store(body_ptr + at, tl.zeros(at.shape, narrow), mask=at < body)
        tl.store(x_ptr + edges, tl.zeros(edges.shape, narrow), mask=edges >= 0)
        return
    weight = tl.where((label >= 0) & (label < vocab), tl.full((), 1, WIDE), float("nan"))
    label = tl.where((label >= 0) & (label < vocab), label, 0)
    top, total, at_label, sum_z, _entropy, _prediction = _statistics(
        logits_ptr, row * pitch, label, vocab, 1, softcap, logit_scale,
        WIDE, CAPPED, SCALED, SMOOTHED, False, True, 3, BLOCK, LANES, VECTOR,
    )  # fmt: skip
    log_sum = tl.log(total)
    nll = _loss(top, log_sum, at_label, sum_z, vocab, label_smoothing, z_loss, WIDE, SMOOTHED, Z_LOSS)
    tl.store(nll_ptr + row, nll * weight)
    a, b, c, d = _factors(
        top, log_sum, weight, vocab, weight, weight, label_smoothing, z_loss, WIDE, SMOOTHED, Z_LOSS, False
    )
    x_label = tl.load(x_ptr + label)
    x_edges = tl.load(x_ptr + edges, mask=edges >= 0, other=0)
    tl.debug_barrier()  # the logit of the label has been read by all before one overwrites it
    whole = body // BLOCK
    if whole * BLOCK < body:
        last = whole * BLOCK + columns
        x_last = tl.load(body_ptr + last, mask=last < body, other=0)
        g_last = _gradient(x_last, top, a, b, d, softcap, logit_scale, WIDE, CAPPED, SCALED, SMOOTHED, False)
        tl.store(body_ptr + last, g_last.to(narrow), mask=last < body)
    for block in range(whole):
        at = body_ptr + (whole - 1 - block) * BLOCK + columns
        g = _gradient(tl.load(at), top, a, b, d, softcap, logit_scale, WIDE, CAPPED, SCALED, SMOOTHED, False)
        tl.store(at, g.to(narrow))
    g_edges = _gradient(x_edges, top, a, b, d, softcap, logit_scale, WIDE, CAPPED, SCALED, SMOOTHED, False)
    tl.store(x_ptr + edges, g_edges.to(narrow), mask=edges >= 0)
    tl.debug_barrier()  # the label's column has been written as one of all
    _z_label, slope = _z_and_slope(x_label, softcap, logit_scale, WIDE, CAPPED, SCALED)
    g_label = _gradient(x_label, top, a, b, d, softcap, logit_scale, WIDE, CAPPED, SCALED, SMOOTHED, False)
    tl.store(x_ptr + label, (g_label - c * slope).to(narrow))


@triton.jit(
    do_not_specialize=["chunk", "start", "rows", "ignore_index"], do_not_specialize_on_alignment=_FLAT
)
def keep_largest_kernel(
    nll_ptr,
    label_ptr,
    grad_ptr,
    hidden_ptr,
    loss_ptr,
    index_ptr,
    largest_grad_ptr,
    largest_hidden_ptr,
    chunk,
    start,
    rows,
    pitch,
    hidden_stride,
    feature_stride,
    vocab,
    features,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Copies the gradient [V] and hidden state [D] of a chunk's largest loss if it beats all chunks before.

    The largest loss of chunks 0 to i − 1 is at `loss` + i, its row at `index` + i, so that no program reads
    what this launch writes. NaN and inf are alike; the first of equals stays.
    """
    best = tl.full((), float("-inf"), loss_ptr.dtype.element_ty)
    best_row = tl.zeros((), tl.int32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        loss = tl.load(nll_ptr + row, mask=row < rows, other=float("-inf"))
        label = tl.load(label_ptr + row, mask=row < rows, other=0)
        loss = tl.where(loss == loss, loss, float("inf"))
        loss = tl.where((label == ignore_index) | (row >= rows), float("-inf"), loss)
        highest = tl.max(loss)
        highest_row = first + tl.argmax(loss, 0)
        best_row = tl.where(highest > best, highest_row, best_row)
        best = tl.maximum(best, highest)
    before = tl.load(loss_ptr + chunk)
    better = best > before
    if tl.program_id(0) == 0:
        tl.store(loss_ptr + chunk + 1, tl.maximum(best, before))
        index = tl.load(index_ptr + chunk)
        tl.store(index_ptr + chunk + 1, tl.where(better, start + best_row, index))
    if better:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        row = best_row.to(tl.int64)
        grad = tl.load(grad_ptr + row * pitch + at, mask=at < vocab)
        tl.store(largest_grad_ptr + at, grad, mask=at < vocab)
        hidden = tl.load(hidden_ptr + row * hidden_stride + at * feature_stride, mask=at < features)
        tl.store(largest_hidden_ptr + at, hidden, mask=at < features)


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
