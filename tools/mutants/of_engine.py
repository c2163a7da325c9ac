"""Mutants of the engine: losses of single tokens and their gradients."""

from tools.mutants.mutant import Mutant

ENGINE, TESTS = "src/nvamp/engine", "tests/engine"


def mutant(file: str, old: str, new: str, tests: str, names: str = "") -> Mutant:
    return Mutant(f"{ENGINE}/{file}.py", old, new, f"{TESTS}/test_{tests}.py", names)


def elsewhere(file: str, old: str, new: str, tests: str, names: str) -> Mutant:
    return Mutant(f"{ENGINE}/{file}.py", old, new, f"tests/{tests}.py", names)


# fmt: off
MUTANTS = [
    # Checks: one past the end of the vocabulary, and a part of it that is empty.
    mutant("checks", "(labels >= vocab))\n    if invalid.any()", "(labels > vocab))\n    if invalid.any()", "engine", "out_of_range"),
    mutant("checks", "((labels < 0) | (labels >= vocab))\n    if", "((labels < -1) | (labels >= vocab))\n    if", "engine", "out_of_range"),
    mutant("checks", "(logits.shape[-1] == 0 and not part)", "logits.shape[-1] == 0", "parts", "may_be_empty"),
    elsewhere("checks", "labels.long() if labels.dtype == torch.uint8 else labels", "labels", "test_losses", "uint8"),
    mutant("checks", "isinstance(vocab, Tensor) and (", "isinstance(vocab, Tensor) or (", "class_weight", "does_not_fit"),
    elsewhere("checks", "{TransformType.Grad, TransformType.Jvp}", "{TransformType.Jvp}", "test_transforms", "refuse_derivatives"),
    # What is asked for, and which backend does it.
    mutant("__init__", 'if name == "triton" and o["class_weight"] is not None and o["label_smoothing"]', 'if name == "triton" and o["class_weight"] is not None and False', "class_weight", "both_paths and triton"),
    mutant("__init__", "correct = (prediction == labels) & valid", "correct = prediction == labels", "entropy", "all_metrics"),
    mutant("__init__", "torch.where(valid, lse, 0)", "lse", "entropy", "all_metrics and chunked"),
    elsewhere("__init__", "and not half and", "and", "test_losses", "float16_sums"),
    mutant("__init__", "if on and x.dtype != torch.float64", "if on", "ops", "autocast"),
    mutant("__init__", "if mean_logit and not return_metrics:", "if False:", "entropy", "one_of_the_metrics"),
    mutant("__init__", "    if few < 0:\n", "    if few < -1:\n", "engine", "errors_name"),
    mutant("backends", '(name for name in candidates if name != "triton" or HAS_TRITON)', "iter(candidates)", "triton", "without_triton"),
    mutant("backends", 'if backend == "triton" and not HAS_TRITON:', "if False:", "triton", "without_triton"),
    mutant("options", "labels.clamp(0, len(opt.class_weight) - 1)", "labels.clamp(0)", "class_weight", "cannot_be_looked_for"),
    mutant("options", "* (1 - opt.label_smoothing)\n", "\n", "class_weight", "both_paths and chunked"),
    # One softmax at a time on any device.
    mutant("chunked", "opt.logit_scale == 1 and opt.softcap is None:", "opt.softcap is None:", "engine", "token_nll and logit_scale and chunked and not linear"),
    mutant("chunked", "(labels >= vocab))\n    return Targets", "(labels > vocab))\n    return Targets", "engine", "cannot_be_looked_for"),
    mutant("chunked", "((labels < 0) | (labels >= vocab))\n    return Targets", "(labels >= vocab)\n    return Targets", "engine", "cannot_be_looked_for"),
    mutant("chunked", "labels.masked_fill(ignored | invalid, 0), ignored, invalid", "labels.masked_fill(ignored, 0), ignored, invalid", "engine", "cannot_be_looked_for"),
    mutant("chunked", "z = torch.sub(z, top[:, None], out=out)", "z = z - 0", "engine", "smoothing_keeps_its_digits"),
    mutant("chunked", "norm[at, 1] += total - 1\n", "pass\n", "entropy", "as_accurate and chunked"),
    mutant("chunked", "below.clamp_(min=-1e4)", "below", "entropy", "masked_classes and chunked"),
    mutant("chunked", "if targets.invalid is not None and classes is None:", "if targets.invalid is not None:", "parts", "blocks_chunks and chunked"),
    mutant("chunked", "if classes is not None and targets.invalid is not None:", "if False:", "parts", "options and chunked and plain"),
    mutant("chunked", "(p.shape[1] if classes is None else classes)", "p.shape[1]", "parts", "options and chunked and smoothing"),
    mutant("chunked", "torch.where(top == -torch.inf, 0, top)[:, None], out=room", "top[:, None], out=room", "parts", "masked_classes_and_extreme and chunked"),
    mutant("chunked", "better = loss > best", "better = loss >= best", "engine", "tied and chunked"),
    mutant("chunked", "row + chunk.start, largest", "row, largest", "engine", "one_pass and chunked and 1-plain"),
    mutant("chunked", "        return [matrix for part in x for matrix in _matrices(part)]", "        return [x.reshape(-1, x.shape[-1])]", "ops", "cannot_be_merged"),
    # A vocabulary in parts.
    mutant("parts", "(local >= 0) & (local < size)", "(local >= 0) & (local <= size)", "parts", "options and reference and plain"),
    mutant("parts", "(labels >= classes))", "(labels > classes))", "parts", "labels_out_of_range and chunked"),
    mutant("parts", "sizes[: ranks.rank].sum()", "sizes[: ranks.rank + 1].sum()", "parts", "options and chunked and plain"),
    mutant("parts", "lower = torch.where(top == -torch.inf, 0, largest - top)", "lower = largest - top", "parts", "keeps_its_digits and chunked"),
    mutant("parts", "sums.append(s.sum_below + size * lower)", "sums.append(s.sum_below)", "parts", "keeps_its_digits and chunked"),
    mutant("parts", "some = torch.where(total == 0, 1, total)", "some = total", "parts", "masked_classes_and_ignored and chunked"),
    mutant("parts", "torch.where(has_largest, targets.start + prediction, none)", "targets.start + prediction", "parts", "first_of_equals and chunked"),
    mutant("parts", ".masked_fill(targets.invalid, torch.nan)\n    norm", "\n    norm", "parts", "labels_out_of_range"),
    mutant("parts", "through = ranks._replace(total=lambda x: _Sum.apply(x, ranks))", "through = ranks", "parts", "options and reference and plain"),
    # The linear path.
    mutant("linear", "return whole if 8 * TILE <= whole <= most else rows", "return whole if 8 * TILE <= whole else rows", "triton", "no_larger"),
    mutant("linear", "return whole if 8 * TILE <= whole <= most else rows", "return rows", "triton", "no_larger"),
    mutant("linear", "and dtype != torch.float16 else 1", "else 1", "engine", "float16_sums"),
    mutant("linear", "hidden.masked_fill(self.ignored[at][:, None], 0)", "hidden", "engine", "hidden_states_may_hold_anything and chunked"),
    mutant("linear", "            self.scale = 1.0\n", "", "engine", "one_pass and chunked and 0-plain"),
    mutant("linear", "        if self.scale == 0:\n            self.weight.zero_()", "        if False:\n            self.weight.zero_()", "engine", "no_rows_at_all and chunked"),
    mutant("linear", "rows.where is not None and len(rows.where):\n        index = rows.where[index]", "False:\n        index = rows.where[index]", "engine", "one_pass and chunked and 1-plain"),
    mutant("linear", "index = rows.where[index]", "pass", "engine", "one_pass and chunked and 1-plain"),
    mutant("linear", "return unit if in_place and unit.dtype == dtype else", "return unit if unit.dtype == dtype else", "ops", "backward_twice"),
    mutant("linear", "weight = units.grad_weight if in_place else units.grad_weight.clone()", "weight = units.grad_weight", "ops", "backward_twice"),
    mutant("linear", "weight *= grad_sum\n", "pass\n", "engine", "test_one_pass and accelerator and chunked-3-plain"),
    mutant("linear", "torch.promote_types(held, _sum_dtype(", "(lambda a, b: a)(held, _sum_dtype(", "engine", "many_chunks_in_float32"),
    # Operators, and the conditions under which they write over what they were given.
    mutant("ops", "ctx.inplace = inplace and not saving_is_hooked()\n    entropy", "ctx.inplace = inplace\n    entropy", "ops", "pytorch_would_not_see"),
    mutant("ops", "and not is_of_leaf(logits) and no_overlap(logits)", "and no_overlap(logits)", "ops", "left_alone"),
    mutant("ops", "and not is_of_leaf(logits) and no_overlap(logits)", "and not is_of_leaf(logits)", "ops", "overlap"),
    mutant("ops", "    torch.autograd.graph.increment_version(grad)\n", "", "ops", "overwritten_logits_gets_an_error"),
    mutant("ops", "0 < labels.numel() <= FEW_ROWS", "0 < labels.numel() < FEW_ROWS", "few_rows", "few_rows"),
    elsewhere("ops", "grad_nll.masked_fill(labels == ctx.ignore_index, 0)", "grad_nll", "objectives/test_paths", "do_not_matter"),
    mutant("ops", "return entropy if metrics else None", "return entropy", "entropy", "what_is_saved"),
    mutant("inplace", "if size > 1 and stride < extent:", "if size > 1 and stride == 0:", "ops", "overlap"),
    mutant("inplace", "extent = max(extent, stride * size)", "extent = stride", "ops", "overlap"),
    mutant("inplace", "x.is_leaf or (x._base is not None and x._base.is_leaf)", "x.is_leaf", "ops", "left_alone"),
    mutant("inplace", "return not _graph_is_kept() and not torch.is_grad_enabled()", "return not torch.is_grad_enabled()", "ops", "left_alone or backward_twice"),
    mutant("operator", "or x.is_neg()\n", "\n", "ops", "negative_views"),
    mutant("operator", "ctx.set_materialize_grads(False)\n", "pass\n", "entropy", "losses_alone"),
    # Memory in huge pages.
    mutant("hugepages", '_LIBC is not None and fresh.device.type == "cpu" and', "_LIBC is not None and", "hugepages", "left_alone"),
    mutant("hugepages", "fresh.nbytes >= _WORTHWHILE", "fresh.nbytes > 0", "hugepages", "small"),
    mutant("hugepages", "fresh.nbytes >= _WORTHWHILE", "fresh.nbytes > _WORTHWHILE", "hugepages", "inside"),
    mutant("hugepages", "-(-fresh.data_ptr() // mmap.PAGESIZE)", "(fresh.data_ptr() // mmap.PAGESIZE)", "hugepages", "inside"),
    mutant("hugepages", "fresh.data_ptr() + fresh.nbytes - start", "fresh.nbytes", "hugepages", "inside"),
    mutant("hugepages", "mmap.MADV_HUGEPAGE", "mmap.MADV_NOHUGEPAGE", "hugepages", "is_advised"),
    # The oracle.
    mutant("reference", "torch.where(valid, weight * opt.z_loss * z.logsumexp(-1).square(), 0)", "weight * opt.z_loss * z.logsumexp(-1).square()", "engine", "token_nll and reference and z_loss and not linear"),
    mutant("reference", "torch.where(labelled, head.hidden, 0)", "head.hidden", "engine", "hidden_states_may_hold_anything and reference"),
    # Which devices may be asked, and the largest loss so far.
    mutant("devices", 'return x.device.type == "cpu"', "return not x.is_cuda", "triton", "nothing_looks"),
    mutant("backend", "new_zeros(head.hidden.shape[1])", "new_zeros(head.hidden.shape[0])", "triton", "every_class"),
    mutant("backend", "dtype=accumulate_dtype(head.hidden.dtype))", "dtype=head.hidden.dtype)", "triton", "compared_in"),
]
