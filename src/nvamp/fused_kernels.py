# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""NVAMP as one Triton kernel: `nvamp.objectives.NVAMP` in one program, for losses on one GPU.

PyTorch's operations make a hundred launches on a few thousand numbers, and issuing them takes longer than the
passes over the logits. One program of 1024 threads takes a few microseconds for 8192 losses.
"""

import triton
import triton.language as tl

# These differ from call to call and are not to make variants of the kernel; one program is fast without them.
_POINTERS = ("nll_ptr", "label_ptr", "items", "loss_ptr", "scalars_ptr", "index_ptr", "weight_ptr")

# Above 0, and far below the variance of losses so large that its ε vanishes.
TINY, WIDE_TINY = tl.constexpr(2.0**-126), tl.constexpr(2.0**-1022)


@triton.jit
def _number(x, IN_MEMORY: tl.constexpr, WIDE: tl.constexpr):
    """A number from the caller: a float32, or one in memory in any dtype."""
    if IN_MEMORY:
        return tl.load(x).to(WIDE)
    else:
        return tl.full((), x, WIDE)


@triton.jit
def _divide(x, y):
    """x/y rounded as IEEE demands; Triton's own division of float32 is an approximation."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def _sqrt(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1, 0) - tl.where(x < 0, 1, 0)


@triton.jit
def _scale(size):
    """The power of two that brings `size` below 2⁴¹; 1 if it is."""
    if size.dtype == tl.float32:
        excess = (size.to(tl.int32, bitcast=True) >> 23) - (127 + 40)
        return ((127 - tl.minimum(tl.maximum(excess, 0), 127 - 40)) << 23).to(tl.float32, bitcast=True)
    else:
        excess = (size.to(tl.int64, bitcast=True) >> 52) - (1023 + 40)
        return ((1023 - tl.minimum(tl.maximum(excess, 0), 1023 - 40)) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _losses(nll_ptr, label_ptr, start, tokens, ignore_index, BLOCK: tl.constexpr):
    """The losses of a block of tokens, their indices, and which of them count."""
    at = start + tl.arange(0, BLOCK)
    inside = at < tokens
    label = tl.load(label_ptr + at, mask=inside, other=0).to(tl.int64)
    return tl.load(nll_ptr + at, mask=inside, other=0), at, inside & (label != ignore_index)


@triton.jit
def _largest(best, best_at):
    """The largest of a block and its index: the first of equals, the first NaN if there is one."""
    is_nan = best != best
    some_nan = tl.max(is_nan.to(tl.int32), 0) > 0
    number = tl.max(tl.where(is_nan, float("-inf"), best), 0)
    is_largest = tl.where(some_nan, is_nan, best == number)
    index = tl.min(tl.where(is_largest, best_at, 2147483647), 0)
    return tl.where(some_nan, float("nan"), number), index


@triton.jit(do_not_specialize=["tokens", "ignore_index"], do_not_specialize_on_alignment=_POINTERS)
def objective_kernel(
    nll_ptr,
    label_ptr,
    items,
    loss_ptr,
    scalars_ptr,
    index_ptr,
    weight_ptr,
    tokens,
    ignore_index,
    alpha,
    beta,
    gamma,
    eps,
    ITEMS_IN_MEMORY: tl.constexpr,
    GRADIENT: tl.constexpr,
    APART: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss, its statistics and the weights of all tokens, in one program.

    nll and weights are [tokens] in WIDE. With APART the weights leave out the one that all tokens share, in
    the modes that have one. Labels are integers or bool; tokens with `ignore_index` do not count, and their
    losses may be anything. `scalars` are N, M, N/M, C, μ, σ, d, mean sign, X and the scale, then the weight
    that all tokens share and the extra weight of the largest. Integers are exact up to 2²⁴ in float32.
    """
    count = tl.zeros((BLOCK,), tl.int32)
    size = tl.zeros((BLOCK,), WIDE)
    best = tl.full((BLOCK,), float("-inf"), WIDE)
    best_at = tl.arange(0, BLOCK)
    for start in tl.range(0, tokens, BLOCK):
        ell, at, valid = _losses(nll_ptr, label_ptr, start, tokens, ignore_index, BLOCK)
        count += valid.to(tl.int32)
        size = tl.maximum(size, tl.where(valid, tl.abs(ell), 0))
        candidate = tl.where(valid, ell, float("-inf"))
        better = (candidate > best) | ((candidate != candidate) & (best == best))
        best = tl.where(better, candidate, best)
        best_at = tl.where(better, at, best_at)
    n = tl.sum(count, 0).to(WIDE)
    some = tl.where(n > 1, n, 1.0)
    largest, index = _largest(best, best_at)
    largest = tl.where(n > 0, largest, 0.0)
    index = tl.where(n > 0, index, -1)
    m = some
    share = tl.full((), 1, WIDE)  # N/M
    if items is not None:
        m = _number(items, ITEMS_IN_MEMORY, WIDE)
        m = tl.where(m == 0, 1.0, m)
        share = _divide(n, m)

    # The mean is computed from ℓ − X, so that the deviations of equal losses are exact zeros.
    scale = _scale(tl.max(size, 0))
    top = scale * largest
    total = tl.zeros((BLOCK,), WIDE)
    below = tl.zeros((BLOCK,), WIDE)
    for start in tl.range(0, tokens, BLOCK):
        ell, at, valid = _losses(nll_ptr, label_ptr, start, tokens, ignore_index, BLOCK)
        total += tl.where(valid, scale * ell, 0)
        below += tl.where(valid, scale * ell - top, 0)
    mean = top + _divide(tl.sum(below, 0), some)

    squares = tl.zeros((BLOCK,), WIDE)
    spread = tl.zeros((BLOCK,), WIDE)
    signs = tl.zeros((BLOCK,), tl.int32)
    for start in tl.range(0, tokens, BLOCK):
        ell, at, valid = _losses(nll_ptr, label_ptr, start, tokens, ignore_index, BLOCK)
        deviation = tl.where(valid, scale * ell - mean, 0)
        squares += deviation * deviation
        spread += tl.abs(deviation)
        signs += _sign(deviation)
    noise = _number(eps, tl.float64 == WIDE, WIDE) * scale * scale
    noise = tl.maximum(noise, WIDE_TINY if tl.float64 == WIDE else TINY)
    std = _sqrt(_divide(tl.sum(squares, 0), some) + noise)
    dispersion = _divide(_divide(tl.sum(spread, 0), some), std)
    mean_sign = _divide(tl.sum(signs, 0).to(WIDE), some)

    a = _number(alpha, tl.float64 == WIDE, WIDE)
    b = _number(beta, tl.float64 == WIDE, WIDE)
    g = _number(gamma, tl.float64 == WIDE, WIDE)
    scaled_cross_entropy = _divide(tl.sum(total, 0), m)
    cross_entropy = _divide(scaled_cross_entropy, scale)
    # L = α·d·C + β·C + γ·X·(N/M)
    tl.store(loss_ptr, (a * dispersion + b) * cross_entropy + g * largest * share)
    if GRADIENT == "detached":
        shared = _divide(a * dispersion, m)
        at_max = tl.zeros((), WIDE)
    else:
        shared = _divide(a * dispersion + b, m)
        at_max = g * share
    tl.store(index_ptr, index)
    tl.store(scalars_ptr, n)
    tl.store(scalars_ptr + 1, m)
    tl.store(scalars_ptr + 2, share)
    tl.store(scalars_ptr + 3, cross_entropy)
    tl.store(scalars_ptr + 4, _divide(mean, scale))
    tl.store(scalars_ptr + 5, _divide(std, scale))
    tl.store(scalars_ptr + 6, dispersion)
    tl.store(scalars_ptr + 7, mean_sign)
    tl.store(scalars_ptr + 8, largest)
    tl.store(scalars_ptr + 9, scale)
    tl.store(scalars_ptr + 10, shared)
    tl.store(scalars_ptr + 11, at_max)

    # scalar     (α·d + β)/M + γ·(N/M)·[i = argmax]; all tokens share the first term
    # token      (α·|z_i| + β)/M + γ·(N/M)·[i = argmax]
    # detached   α·d/M, which all tokens share
    # full       scalar + α·C·[(s_i − mean s) − d·z_i]/(N·σ), s_i = sign(ℓ_i − μ)
    for start in tl.range(0, tokens, BLOCK):
        ell, at, valid = _losses(nll_ptr, label_ptr, start, tokens, ignore_index, BLOCK)
        weight = tl.zeros((BLOCK,), WIDE)
        if not APART:
            weight += shared
        deviation = scale * ell - mean
        if GRADIENT == "token":
            weight = _divide(a * tl.abs(_divide(deviation, std)) + b, m)
        if GRADIENT == "full":
            slope = (_sign(deviation).to(WIDE) - mean_sign) - dispersion * _divide(deviation, std)
            weight += a * scaled_cross_entropy * _divide(slope, some * std)
        weight += tl.where(at == index, at_max, 0)
        tl.store(weight_ptr + at, tl.where(valid, weight, 0), mask=at < tokens)
