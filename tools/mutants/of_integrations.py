"""Mutants of the integrations with trainers and models."""

from tools.mutants.mutant import Mutant

INTEGRATIONS, TESTS = "src/nvamp/integrations", "tests/integrations"


def mutant(file: str, old: str, new: str, tests: str, names: str = "") -> Mutant:
    return Mutant(f"{INTEGRATIONS}/{file}.py", old, new, f"{TESTS}/test_{tests}.py", names)


def of_transformers(file: str, old: str, new: str, tests: str, names: str = "") -> Mutant:
    return mutant(f"transformers/{file}", old, new, tests, names)


# fmt: off
MUTANTS = [
    mutant("check", "    if not calls:\n", "    if False:\n", "check", "test_trainers"),
    mutant("check", "        criterion.on_stats = before\n", "        pass\n", "check", "test_models"),
    mutant("check", "torch.random.fork_rng(gpus), ", "", "check", "same_after_it"),
    mutant("check", "trainer._metrics = copy.deepcopy(trainer._metrics)", "pass", "check", "test_trl"),
    mutant("check", "    if own:\n", "    if False:\n", "check", "replace_the_criterion"),
    mutant("columns", "if inputs.get(name) is None:", "if False:", "patch", "columns_that_do_not_fit"),
    mutant("modes", "            module.training = mode\n", "            pass\n", "alignment", "as_it_was"),
    mutant("sequences", 'if config is None and os.environ', "if False and os.environ", "transformers", "split_sequences"),
    mutant("stats", "torch.maximum(before[-1:], table[-1:])", "table[-1:]", "stats", "what_is_logged"),
    mutant("stats", "    if tokens == 0:\n        return {}\n", "", "stats", "without_tokens"),
    mutant("torchtitan", "items = 1 if global_valid_tokens is None else global_valid_tokens", "items = global_valid_tokens", "torchtitan", "every_loss"),
    mutant("trl", "if installed_loss(self.model) is not None:", "if False:", "guard", "sft_trainer_is_refused and train"),
    mutant("axolotl", '("compute_loss_func", "label_smoother")', '("compute_loss_func",)', "axolotl", "label_smoothing"),
    # A loss in a Trainer or a model.
    of_transformers("__init__", "if value is not None]:", "]:", "transformers", "other_trainers_pass"),
    of_transformers("__init__", "        check_whole_sequences(criterion)\n        if given", "        if given", "transformers", "split_sequences"),
    of_transformers("__init__", "    watch(model)\n    return loss", "    return loss", "guard", "ignores_its_loss"),
    of_transformers("model_loss", "shifted = shift_labels is not None or not self.shifts", "shifted = not self.shifts", "patch", "shifted_labels"),
    of_transformers("model_loss", "if ignore_index not in (-100, own_index):", "if False:", "patch", "errors_of_loss_function"),
    of_transformers("model_loss", "labels if shift_labels is None else shift_labels", "labels if labels is not None else shift_labels", "patch", "shifted_labels"),
    of_transformers("model_loss", "            if call.loss is self:\n", "            if True:\n", "patch", "another_loss"),
    of_transformers("alignment", "tolerance = 0.1 *", "tolerance = 2 *", "alignment", "of_neither"),
    of_transformers("guard", "could_train = model.training and not", "could_train = not", "guard", "calls_for_logits"),
    of_transformers("guard", "model.training and not loss.logits_without_labels and", "model.training and", "guard", "calls_for_logits"),
    of_transformers("guard", "        if _caller_in_trl() == _SFT:\n", "        if True:\n", "guard", "trainers_with_another_loss"),
    of_transformers("guard", "elif could_train and _caller_in_trl() in (None, _SFT):", "elif could_train:", "guard", "trainers_with_another_loss"),
    of_transformers("guard", "in (None, _SFT):", "is None:", "guard", "trl_calls"),
    of_transformers("guard", " and logits.requires_grad", "", "guard", "calls_for_logits"),
    of_transformers("guard", "labels is not None and isinstance(outputs, tuple)", "isinstance(outputs, tuple)", "guard", "calls_for_logits"),
    of_transformers("guard", 'outputs.get("loss") is not None', "False", "guard", "ignores_its_loss"),
    # Logits that are not computed.
    of_transformers("deferred", "self._cap is not None and number <= 0", "self._cap is not None and number < 0", "alignment", "refused"),
    of_transformers("deferred", 'reduction == "mean" and not label_smoothing', 'reduction == "mean"', "alignment", "refused"),
    of_transformers("deferred", 'weight is None and reduction == "mean" and', "weight is None and", "alignment", "refused"),
    of_transformers("deferred", 'plain = weight is None and reduction', "plain = reduction", "alignment", "refused"),
    of_transformers("deferred", "if sizes[-1:] != (self.shape[-1],):", "if False:", "alignment", "refused"),
    of_transformers("deferred", "or vocabulary not in (..., slice(None)):", ":", "alignment", "refused"),
    of_transformers("deferred", "plain = self._is_sum and self.products[0].scale == 1", "plain = self._is_sum", "alignment", "refused"),
    of_transformers("deferred", '"logit_scale": scale * self._cap', '"logit_scale": scale', "alignment", "a_bias_is"),
    of_transformers("deferred", "p._replace(scale=p.scale * factor)", "p._replace(scale=factor)", "alignment", "a_bias_is"),
    of_transformers("heads", "scaled = [(p, p.scale / first.scale)", "scaled = [(p, p.scale)", "heads", "several_scales"),
    of_transformers("heads", "biases = [p.layer.bias * scale for", "biases = [p.layer.bias for", "heads", "several_scales"),
    of_transformers("heads", "torch.cat([w.to(dtype) for w in weights], 1)", "torch.cat(weights, 1)", "heads", "half_precision"),
    of_transformers("heads", "if vocab_group is not None and (_is_split", "if False and (_is_split", "heads", "tp_plan"),
    of_transformers("patching", 'index("labels") - 1', 'index("labels")', "patch", "by_position"),
    of_transformers("patching", "return following if following.shape == labels.shape else column.flatten()", "return column.flatten()", "alignment", "columns_go"),
    of_transformers("patching", "return tuple(value for value in outputs if not isinstance(value, DeferredLogits))", "return outputs", "patch", "tuples"),
    of_transformers("patching", "        _state.calls = before\n", "        pass\n", "patch", "refused_in_training"),
    of_transformers("patching", '                changed["shift"] = False\n', "                pass\n", "patch", "shifted_labels or does_not_shift"),
    of_transformers("patching", "    del forward.__wrapped__\n", "", "patch", "accelerate_keeps"),
]
