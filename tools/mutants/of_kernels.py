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
    # z, its slope, and sums that keep their digits.
    mutant('return tl.where(x == float("-inf"), 0, x)', "return x", "engine", "masked_vocabulary and triton"),
    # The loss and its gradient.
    mutant("(a + d * tl.maximum(below, -1e4))", "(a + d * below)", "entropy", "masked_classes and triton"),
    mutant("valid = (label >= 0) & (label < vocab)", "valid = (label >= 0) & (label <= vocab)", "engine", "cannot_be_looked_for and triton and logits"),
    mutant("valid = (label >= 0) & (label < vocab)", "valid = label < vocab", "engine", "cannot_be_looked_for and triton and logits"),
    mutant("here = (label >= 0) & (label < vocab)", "here = (label >= 0) & (label <= vocab)", "engine", "cannot_be_looked_for and triton and logits"),
    # One pass over a chunk.
    mutant("tl.store(nll_ptr + row, nll * weight)", "tl.store(nll_ptr + row, nll)", "engine", "cannot_be_looked_for and triton and pass"),
    mutant("        tl.store(x_ptr + edges, tl.zeros(edges.shape, narrow), mask=edges >= 0)\n        return\n    weight", "        return\n    weight", "engine", "test_one_pass and accelerator and triton-0-plain"),
    mutant("        tl.store(norm_ptr + 2 * row, 0)\n        tl.store(norm_ptr + 2 * row + 1, 0)\n        if METRICS", "        if METRICS", "engine", "norm_of_ignored"),
    mutant("            tl.store(entropy_ptr + row, 0)\n", "            pass\n", "entropy", "ignored_rows_may and triton"),
    mutant("            tl.store(prediction_ptr + row, 0)\n", "            pass\n", "entropy", "all_metrics and triton"),
    mutant("vocab * (_finite(top) - _anchor(at_label)) - sum_z", "vocab * _finite(top) - sum_z", "parts", "keeps_its_digits and triton"),
    mutant("tl.where(valid, at_label, 0)", "at_label", "parts", "options and triton and plain"),
    # Launches.
    launching("// (1 + capped)", "// 1", "triton", "takes_half"),
    launching("max(triton.next_power_of_2(columns), 16 // dtype.itemsize)", "triton.next_power_of_2(columns)", "triton", "sizes_of_programs"),
    launching("max(threads * block // most_columns // WARP, 1)", "threads * block // most_columns // WARP", "triton", "sizes_of_programs"),
    launching("    vector = 16 // dtype.itemsize\n        return", "    vector = 8 // dtype.itemsize\n        return", "triton", "sizes_of_programs"),
    launching("like.new_full((), x) if like.dtype == torch.float64 else x", "x", "engine", "token_nll and triton and logit_scale"),
    launching('"SCALED": opt.logit_scale != 1', '"SCALED": False', "engine", "token_nll and triton and logit_scale"),
    launching('"Z_LOSS": opt.z_loss != 0', '"Z_LOSS": False', "engine", "token_nll and triton and z_loss"),
    launching('if device.type == "cpu" and not INTERPRETED:', "if False:", "triton", "tensors_on_the_cpu"),
    launching("        if programs:\n", "        if True:\n", "triton", "no_program"),
    launching("start += part.numel() // vocab", "start += len(part)", "triton", "planes"),
    launching("x.shape[0] * x.shape[1])\n", "x.shape[1])\n", "engine", "test_strides and triton"),
    launching("return 0 if len(x) == 1 else x.stride(0), x", "return x.stride(0), x", "triton", "compile_nothing_again"),
    launching("    bytes_apart += [", "    [", "triton", "what_is_alike"),
    launching("bytes_apart = [x.data_ptr() - out.data_ptr()]", "bytes_apart = [0]", "triton", "what_is_alike"),
    launching("norm[..., 0] - sum_below / logits.shape[-1]", "norm[..., 0] + sum_below / logits.shape[-1]", "entropy", "mean_of_logits"),
    launching("opt.label_smoothing or metrics > 2\n", "opt.label_smoothing\n", "parts", "test_metrics and triton and plain"),
    launching("*([sum_below.clone()]", "*([sum_below]", "ops", "operators_on_parts and triton"),
    launching("nll *= weights[..., 1]", "pass", "class_weight", "both_paths and triton"),
    launching("grad_nll = grad_nll * weights[..., 1]", "grad_nll = grad_nll + 0", "class_weight", "both_paths and triton"),
    launching("labels if classes is None else classes", "labels", "parts", "test_options and triton and smoothing"),
    launching("ADJACENT=x.stride(-1) == 1,\n", "ADJACENT=True,\n", "engine", "test_strides and triton"),
    launching("ADJACENT=x.stride(-1) == 1,  #", "ADJACENT=True,  #", "engine", "test_strides and triton"),
    launching("    if opt.class_weight is not None:  #", "    if False:  #", "class_weight", "one_pass and triton"),
    launching("triton.cdiv(max(vocab, features), sizes.block)", "triton.cdiv(vocab, sizes.block)", "triton", "every_feature"),
    launching("a if b is None else b,", "a,", "engine", "test_one_pass and triton"),
    # The objective in one kernel.
    fused("(candidate > best) |", "(candidate >= best) |", "first_of_equal"),
    Mutant(f"{FUSED}.py", "        and not objective.tail\n", "", "tests/test_fused.py", "cannot_judge"),
]
