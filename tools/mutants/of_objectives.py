"""Mutants of the objectives, of the bridge from the engine to a loss, and of the losses themselves."""

from tools.mutants.mutant import Mutant

OBJECTIVES, TESTS = "src/nvamp/objectives", "tests/objectives"


def objective(file: str, old: str, new: str, tests: str, names: str) -> Mutant:
    return Mutant(f"{OBJECTIVES}/{file}.py", old, new, f"{TESTS}/test_{tests}.py", names)


def mutant(file: str, old: str, new: str, tests: str, names: str) -> Mutant:
    return Mutant(f"src/nvamp/{file}.py", old, new, f"tests/{tests}.py", names)


# fmt: off
MUTANTS = [
    objective("base", "return n.clamp(min=1), 1.0", "return n, 1.0", "nvamp", "no_valid"),
    objective("base", "else m or 1\n", "else m\n", "nvamp", "empty_step"),
    objective("base", "torch.where(m == 0, 1, m.to(n.dtype))", "m.to(n.dtype)", "nvamp", "empty_step"),
    objective("base", "torch.where(self.valid, each, 0).sum()", "each.sum()", "values", "does_not_count"),
    objective("statistics", "some = n.clamp(min=1)\n", "some = n\n", "nvamp", "no_valid"),
    objective("statistics", "mean = scale * largest + below / some", "mean = total / some", "nvamp", "equal_losses"),
    objective("statistics", "index = index.masked_fill(elsewhere, -1)", "pass", "nvamp", "no_valid"),
    objective("statistics", ".clamp(min=torch.finfo(nll.dtype).tiny)", "", "nvamp", "huge"),
    objective("statistics", "exponent - (bias + 40)", "exponent - (bias + 70)", "nvamp", "huge"),
    objective("statistics", "    if ranks is not ALONE:\n        moments = 3\n", "", "ranks", "several_ranks"),
    objective("statistics", "again = scale / scales", "again = torch.ones_like(scales)", "ranks", "huge"),
    objective("statistics", "belows = torch.where(counts > 0, belows, 0).sum()", "belows = belows.sum()", "ranks", "several_ranks"),
    objective("statistics", "~((n > 0) & (owner == ranks.rank))", "~(owner == ranks.rank)", "ranks", "several_ranks"),
    objective("nvamp", 'return 3 if self.mode == "full" else 2', "return 2", "nvamp", "derivative"),
    objective("nvamp", 'return self.gradient if self.alpha or self.gradient == "detached" else "scalar"', "return self.gradient", "nvamp", "without_alpha or derivative"),
    objective("nvamp", "s.scale * batch.nll - s.scale * s.mean, s.scale * s.std", "batch.nll - s.mean, s.std", "nvamp", "huge"),
    objective("nvamp", "if self.moments else statistics(batch, self.eps)", "", "nvamp", "without_alpha"),
    mutant("objectives/nvamp", "option(1e-6, between(TINY))", "option(1e-6, between(0))", "test_losses", "bad_options"),
    objective("hardest", "_ceil(share, n).clamp(min=1).minimum(n)", "_ceil(share, n).minimum(n)", "nvamp", "never_empty"),
    objective("hardest", "_ceil(share, n).clamp(min=1).minimum(n)", "_ceil(share, n).clamp(min=1)", "ranks", "share_is_exact"),
    objective("hardest", "(n * (1 - _parts(share)))", "(n * -_parts(share))", "ranks", "share_is_exact"),
    objective("hardest", "(_parts(share) + 1)", "_parts(share)", "ranks", "share_is_exact"),
    objective("hardest", "return max(_ceil(share, n), 1)", "return _ceil(share, n)", "ranks", "share_is_exact"),
    objective("hardest", "tied.cumsum(0) <= left - before", "tied.cumsum(0) < left - before", "ranks", "hardest"),
    objective("hardest", "torch.arange(ranks.size, device=nll.device) < ranks.rank", "torch.arange(ranks.size, device=nll.device) <= ranks.rank", "ranks", "hardest"),
    objective("hardest", "torch.where(x == 0, 0.0, x)", "x", "ranks", "every_zero"),
    objective("hardest", "torch.where(x.isnan(), torch.nan, ", "torch.where(x.isnan(), x, ", "ranks", "every_nan"),
    objective("hardest", "torch.where(left > 0, loss * left, 0)", "loss * left", "ranks", "hardest"),
    objective("clipped_policy", "1 + high)", "1 + self.clip)", "values", "clipped_on_both_sides"),
    objective("clipped_policy", "torch.where(free > clipped, 0, free)", "torch.where(free >= clipped, 0, free)", "values", "definition"),
    objective("clipped_policy", "-self.entropy * w\n", "-self.entropy * torch.ones_like(w)\n", "values", "definition and clipped"),
    objective("entropy_weighted", "batch.entropy.clamp(min=0)", "batch.entropy", "values", "below_zero"),
    objective("entropy_weighted", ".clamp(max=1)", "", "values", "definition"),
    objective("focal", "torch.where(miss > 0, ell * power / miss, power)", "ell * power / miss", "values", "sure"),
    objective("focal", "batch.nll.clamp(min=0)", "batch.nll", "values", "sure"),
    objective("gce", "        if not self.q:\n            return batch.mean(batch.nll, torch.ones_like(batch.nll))\n", "", "values", "limit"),
    objective("tilted", "torch.where(below_1 > -0.5, below_1.log1p(), (exps / n).log())", "below_1.log1p()", "values", "float32"),
    objective("tilted", "torch.where(below_1 > -0.5, below_1.log1p(), (exps / n).log())", "(exps / n).log()", "values", "float32"),
    objective("tilted", "x = torch.where(batch.valid, self.t * (batch.nll - extreme), -torch.inf)", "x = self.t * (batch.nll - extreme)", "values", "does_not_count"),
    objective("token_weighted", "scale = torch.where(weights == 0, 0, share / weights)", "scale = share / weights", "values", "without_weight"),
    objective("truncated", ".minimum(count - 1)", "", "values", "definition or results or truncated"),
    objective("truncated", "torch.where(kept, batch.nll, 0)", "batch.nll * kept", "values", "truncated"),
    objective("tail", "shared = torch.ones_like(n) / m", "shared = torch.ones_like(n) / n", "values", "micro"),
    objective("spec", "name in options and options[name] != option.default", "name in options", "spec", "loss_of_a_token"),
    objective("spec", "        if option in found:\n", "        if False:\n", "spec", "wrong_texts"),
    objective("spec", "value + 0.0:g", "value:g", "spec", "inverse or texts"),
    objective("spec", "short if float(short) == value else repr(float(value))", "short", "spec", "inverse"),
    # Options.
    mutant("options", "(low < value if open_low else low <= value)", "(low <= value)", "test_losses", "bad_options"),
    mutant("options", "not value <= high or", "not value < high or", "test_losses", "boundaries"),
    mutant("options", "not TINY <= abs(value) <= HUGE", "not TINY < abs(value) <= HUGE", "test_losses", "boundaries"),
    mutant("options", "not TINY <= abs(value) <= HUGE", "not TINY <= abs(value) < HUGE", "test_losses", "boundaries"),
    mutant("options", "-(2**31) <= index < 2**31", "-(2**31) < index < 2**31", "test_losses", "boundaries"),
    mutant("options", "-(2**31) <= index < 2**31", "-(2**31) <= index <= 2**31", "test_losses", "bad_options"),
    mutant("options", "    if not number:\n", "    if False:\n", "test_losses", "bad_options"),
    mutant("options", "if isinstance(value, bool) or not isinstance(value, Real):", "if not isinstance(value, Real):", "test_losses", "another_type"),
    mutant("options", "    if value.requires_grad:\n", "    if False:\n", "engine/test_class_weight", "refused"),
    # From losses to the loss.
    mutant("apply", "if not num_items_in_batch >= 0:", "if num_items_in_batch < 0:", "test_losses", "bad_number"),
    mutant("apply", "if num_items_in_batch.numel() != 1:", "if False:", "test_losses", "bad_number"),
    mutant("apply", "targets = _shifted(labels, shift, ignore_index)", "targets = _shifted(labels, shift)", "test_losses", "matter_of_labels"),
    mutant("apply", "if shift and labels.dim() == 1", "if shift and labels.dim() == 0", "test_losses", "flattened"),
    mutant("apply", "(valid.sum() + 99) // 100", "valid.sum() // 100", "test_losses", "hundredth"),
    mutant("apply", "return torch.where(some, extreme(padded), 0)", "return extreme(padded)", "test_losses", "nothing_to_learn"),
    mutant("apply", "return value.detach()  # an input", "return value  # an input", "objectives/test_nvamp", "changed_in_place"),
    mutant("apply", "torch.where(weight == 0, 0, x * weight).sum()", "(x * weight).sum()", "objectives/test_paths", "in_a_graph"),
    mutant("apply", "torch.where(losses.valid, w, 0)) for x, w in terms]", "w) for x, w in terms]", "objectives/test_paths", "do_not_matter"),
    mutant("apply", "return torch.where(losses.valid, weights, 0).view(nll.shape)", "return weights.expand(nll.shape)", "objectives/test_values", ""),
    mutant("apply", "else torch.where(valid, x.to(dtype), 0)).flatten()", "else x.to(dtype)).flatten()", "test_losses", "elsewhere"),
    mutant("apply", "times = ranks.size if shared.of_mean else 1", "times = ranks.size", "test_sharded", "dtensors and 4"),
    mutant("apply", "times = ranks.size if shared.of_mean else 1", "times = 1", "objectives/test_ranks", "real_ranks"),
    mutant("apply", "if call.wants_stats:\n                _statistics_of(batch, result)\n", "pass\n", "test_distributed", "ranks"),
    # The losses as modules and functions.
    mutant("losses", '("process_group", "vocab_group", "on_stats")', '("process_group", "vocab_group")', "test_losses", "like_any_other"),
    mutant("losses", '("process_group", "vocab_group", "on_stats")', '("process_group", "on_stats")', "test_distributed", "copy_shares"),
    mutant("losses", "persistent=False", "persistent=True", "engine/test_class_weight", "moves_with"),
    mutant("losses", '{"on_stats": None, **defaults, **state}', "state", "test_saving", "before_an_option"),
    mutant("losses", "if name not in buffers}", "}", "test_saving", ""),
    mutant("losses", "elif not hasattr(type(self), name) and hasattr(", "elif False and hasattr(", "test_losses", "not_set_beside"),
    mutant("losses", "if value != default]\n        return", "]\n        return", "test_losses", "like_any_other"),
    mutant("losses", "_replace(metrics=self.token_metrics)", "_replace(metrics=False)", "integrations/test_stats", "accuracy_and"),
    mutant("functional", 'for name in ("softcap", "logit_scale"):', 'for name in ("logit_scale",):', "engine/test_logprobs", "definition"),
    mutant("functional", "with torch.no_grad():\n        found", "with torch.enable_grad():\n        found", "engine/test_logprobs", ""),
    mutant("functional", '    check_options(TokenLossOptions, {"process_group": process_group}, "token_weights")\n', "", "test_distributed", "group_is_checked"),
    # Ranks.
    mutant("ranks", "& (heads != UNKNOWN + 1)", "", "test_distributed", "ranks"),
    mutant("ranks", "rows.sum(0, dtype=x.dtype)", "rows.sum(0)", "objectives/test_ranks", "first_exchange"),
    mutant("ranks", "if self._failed and x.is_floating_point():", "if False:", "test_distributed", "ranks"),
    mutant("distributed", "calls.number += 1\n", "calls.number += 0\n", "test_distributed", "ranks"),
    mutant("distributed", "if group.ndim != 1:", "if False:", "test_distributed", "group_is_checked"),
    mutant("dtensors", "dim not in possible or dim in found", "dim not in possible", "test_sharded", "dtensors and 4"),
    mutant("dtensors", "Partial() if i == of_batch else p", "p", "test_sharded", "dtensors and 4"),
    mutant("dtensors", "lambda grad: grad / mesh.size()", "lambda grad: grad", "test_sharded", "fsdp and 2"),
    mutant("dtensors", "(of_batch == of_vocab or weight", "(weight", "test_sharded", "dtensors and 4"),
    mutant("dtensors", "labels.placements != wanted or", "", "test_sharded", "dtensors and 4"),
]
