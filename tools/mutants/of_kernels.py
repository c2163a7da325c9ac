"""Mutants of the kernels and what launches them, which the tests run in Triton's interpreter."""

from tools.mutants.mutant import Mutant

ENGINE, TESTS = "src/nvamp/engine", "tests/engine"
FUSED = "src/nvamp/fused"


def mutant(old: str, new: str, tests: str, names: str, file: str = f"{ENGINE}/kernels.py") -> Mutant:
    return Mutant(file, old, new, f"{TESTS}/test_{tests}.py", names)


def launching(old: str, new: str, tests: str, names: str) -> Mutant:
    return mutant(old, new, tests, names, f"{ENGINE}/triton.py")


def fused(old: str, new: str, names: str) -> Mutant:
    return Mutant(f"{FUSED}_kernels.py", old, new, "tests/test_fused.py", names)


# fmt: off
MUTANTS = [
    # Where the vectors of a row begin and end.
    mutant("tl.minimum((VECTOR - beyond) % VECTOR, vocab)", "(VECTOR - beyond) % VECTOR", "engine", "shorter_than_a_vector"),
    mutant("tl.where(i < head, i, -1)", "tl.where(i <= head, i, -1)", "engine", "strides and triton"),
    mutant("tl.where(after < vocab, after, -1)", "tl.where(after <= vocab, after, -1)", "engine", "strides and triton"),
    # z, its slope, and sums that keep their digits.
    mutant("tl.where(near, u + u * s * series, tanh)", "tanh", "engine", "logits_path_is_as_accurate and triton"),
    mutant("tl.where(near, 1 - tanh * tanh, 4 * e * (inverse * inverse))", "1 - tanh * tanh", "engine", "slope_of_a_cap"),
    mutant('return tl.where(x == float("-inf"), 0, x)', "return x", "engine", "masked_vocabulary and triton"),
    mutant('return tl.where(tl.abs(at_label) < float("inf"), at_label, 0)', "return at_label", "engine", "infinite_loss and triton"),
    mutant('return tl.where(tl.abs(at_label) < float("inf"), at_label, 0)', "return tl.zeros_like(at_label)", "engine", "keeps_its_digits and triton"),
    mutant("_lane_sum(e * tl.maximum(below, -1e30))", "_lane_sum(e * below)", "entropy", "masked_classes and triton"),
    mutant("(weighted + total * tl.where(total == 0, 0, top - shift))\n        weighted +=", "weighted\n        weighted +=", "entropy", "gradients_by_logits and triton"),
    mutant("reached = tl.where(top > before, start, reached)", "reached = tl.where(top >= before, start, reached)", "entropy", "first_of_equals and triton"),
    mutant("reached = tl.where(top > before, whole, reached)", "reached = tl.where(top >= before, whole, reached)", "entropy", "first_of_equals and triton"),
    mutant("tl.where(last < body, z_last - anchor, 0)", "z_last - anchor", "engine", "token_nll and triton and smoothing and not linear"),
    mutant("some = tl.where(sum_e == 0, 1, sum_e)", "some = sum_e", "parts", "no_part_in_metrics and triton"),
    mutant("tl.where(body_top < edges_top, vocab, in_body)", "tl.where(body_top <= edges_top, vocab, in_body)", "entropy", "first_of_equals and triton"),
    mutant("tl.where(edges_top < body_top, vocab, in_edges)", "in_edges", "entropy", "first_of_equals and triton"),
    # The loss and its gradient.
    mutant("* (top + log_sum) * (top + log_sum)", "* (top + log_sum) * top", "engine", "token_nll and triton and z_loss and not linear"),
    mutant("a *= 1 + 2 * _number(", "a *= 1 + _number(", "engine", "token_nll and triton and z_loss and not linear"),
    mutant("a += d * (entropy - log_sum)", "a += d * entropy", "entropy", "gradients_by_logits and triton and plain"),
    mutant("(a + d * tl.maximum(below, -1e4))", "(a + d * below)", "entropy", "masked_classes and triton"),
    mutant("valid = (label >= 0) & (label < vocab)", "valid = (label >= 0) & (label <= vocab)", "engine", "cannot_be_looked_for and triton and logits"),
    mutant("valid = (label >= 0) & (label < vocab)", "valid = label < vocab", "engine", "cannot_be_looked_for and triton and logits"),
    mutant("tl.where(valid, at_label, 0))", "at_label)", "parts", "options and triton and plain"),
    mutant("vocab * (_finite(top) - _anchor(at_label)) - sum_z", "vocab * (top - _anchor(at_label)) - sum_z", "parts", "masked_classes_and_extreme and triton"),
    mutant("edges = tl.where(start == 0, edges, -1)", "edges = tl.where(start >= 0, edges, -1)", "ops", "memory_of_the_logits and triton"),
    mutant("in_edges = (start == 0) & (", "in_edges = (start >= 0) & (", "ops", "memory_of_the_logits and triton"),
    mutant("tl.minimum(head + start + BLOCK, head + body)", "(head + start + BLOCK)", "ops", "memory_of_the_logits and triton"),
    mutant("here = (label >= 0) & (label < vocab)", "here = (label >= 0) & (label <= vocab)", "engine", "cannot_be_looked_for and triton and logits"),
    mutant("x_label = tl.load(x_ptr + label * stride_vocab, mask=here, other=0)", "x_label = tl.load(x_ptr + label, mask=here, other=0)", "engine", "strides and triton"),
    # One pass over a chunk.
    mutant("weight = tl.where((label >= 0) & (label < vocab)", "weight = tl.where((label >= 0) & (label <= vocab)", "engine", "cannot_be_looked_for and triton and pass"),
    mutant("label = tl.where((label >= 0) & (label < vocab), label, 0)", "label = tl.where((label >= 0) & (label <= vocab), label, 0)", "engine", "cannot_be_looked_for and triton and pass"),
    mutant("tl.store(nll_ptr + row, nll * weight)", "tl.store(nll_ptr + row, nll)", "engine", "cannot_be_looked_for and triton and pass"),
    mutant("        tl.store(x_ptr + edges, tl.zeros(edges.shape, narrow), mask=edges >= 0)\n        return\n    weight", "        return\n    weight", "engine", "test_one_pass and accelerator and triton-0-plain"),
    mutant("(whole - 1 - block) * BLOCK", "block * BLOCK + BLOCK", "engine", "one_pass and triton and 0-plain"),
    mutant('loss = tl.where(loss == loss, loss, float("inf"))', "pass", "engine", "nan_comes_through and triton and 1"),
    mutant("tl.where(highest > best, highest_row, best_row)", "tl.where(highest >= best, highest_row, best_row)", "triton", "several_blocks"),
    mutant("better = best > before", "better = best >= before", "engine", "tied and triton"),
    mutant("start + best_row, index)", "best_row, index)", "engine", "one_pass and triton and 1-plain"),
    mutant("bu = tl.load(b_ptr).to(WIDE) * tl.load(u_ptr + row).to(WIDE)", "bu = tl.load(b_ptr).to(WIDE) * tl.load(u_ptr).to(WIDE)", "engine", "one_pass and triton and 1-plain"),
    # Launches.
    launching("if opt.class_weight is not None:  # the kernel", "if False:  # the kernel", "class_weight", "one_pass and triton"),
    launching("weights[..., 1].masked_fill(labels == opt.ignore_index, 0)", "weights[..., 1]", "class_weight", "both_paths and triton"),
    launching("weights = weights_of(labels, opt) if weights is None else weights", "weights = weights_of(labels, opt)", "class_weight", "vocabulary_in_parts and triton"),
    launching("for part in logits:\n        yield from _planes(part, start)\n        start += part.numel() // vocab", "for part in logits:\n        yield from _planes(part, start)", "engine", "strides and triton"),
    # The objective in one kernel.
    fused("(candidate > best) |", "(candidate >= best) |", "definition"),
    fused("((candidate != candidate) & (best == best))", "(candidate != candidate)", "no_nan"),
    fused("tl.min(tl.where(is_largest, best_at, 2147483647), 0)", "tl.max(tl.where(is_largest, best_at, -1), 0)", "definition or dispersion"),
    fused("index = tl.where(n > 0, index, -1)", "index += 0", "reads_labels or definition"),
    fused("m = tl.where(m == 0, 1.0, m)", "m += 0", "definition"),
    fused("share = _divide(n, m)", "share = _divide(some, m)", "definition"),
    fused("- (127 + 40)", "- (127 + 70)", "huge"),
    fused("noise = tl.maximum(noise, WIDE_TINY if tl.float64 == WIDE else TINY)", "noise += 0", "huge"),
    fused("deviation = tl.where(valid, scale * ell - mean, 0)", "deviation = scale * ell - mean", "definition"),
    fused("(_sign(deviation).to(WIDE) - mean_sign)", "_sign(deviation).to(WIDE)", "definition"),
    fused("_divide(slope, some * std)", "_divide(slope, n * std)", "nothing or definition"),
    fused("tl.where(at == index, at_max, 0)", "tl.where(at >= index, at_max, 0)", "definition"),
    fused("tl.where(valid, weight, 0), mask=at < tokens)", "weight, mask=at < tokens)", "definition"),
    Mutant(f"{FUSED}.py", "        and not objective.tail\n", "", "tests/test_fused.py", "cannot_judge"),
    Mutant(f"{FUSED}.py", "type(objective) is NVAMP", "isinstance(objective, NVAMP)", "tests/test_fused.py", "cannot_judge"),
    Mutant(f"{FUSED}.py", "        and ranks is ALONE\n", "", "tests/test_fused.py", "cannot_judge"),
    Mutant(f"{FUSED}.py", "        and not has_transforms()\n", "", "tests/test_fused.py", "cannot_judge"),
    Mutant(f"{FUSED}.py", "apart = apart and objective.few_weights(1) is not None", "apart = apart", "tests/test_fused.py", "definition"),
    Mutant(f"{FUSED}.py", "scalars[9]))", "1.0))", "tests/test_fused.py", "huge"),
]
