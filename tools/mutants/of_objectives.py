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
    objective("statistics", "exponent - (bias + 40)", "exponent - (bias + 70)", "nvamp", "huge"),
    objective("statistics", "again = scale / scales", "again = torch.ones_like(scales)", "ranks", "huge"),
    objective("dft", "batch.mean(p * batch.nll, p)", "batch.mean(p * batch.nll, p * (1 - batch.nll))", "values", "definition"),
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
    objective("hardest", "torch.where(left > 0, loss * left, 0)", "loss * left", "ranks", "hardest"),
    objective("clipped_policy", "torch.where(free > clipped, 0, free)", "torch.where(free >= clipped, 0, free)", "values", "definition"),
    objective("entropy_weighted", "batch.entropy.clamp(min=0)", "batch.entropy", "values", "below_zero"),
    objective("gce", "        if not self.q:\n            return batch.mean(batch.nll, torch.ones_like(batch.nll))\n", "", "values", "limit"),
    objective("tilted", "torch.where(below_1 > -0.5, below_1.log1p(), (exps / n).log())", "(exps / n).log()", "values", "float32"),
    objective("tilted", "x = torch.where(batch.valid, self.t * (batch.nll - extreme), -torch.inf)", "x = self.t * (batch.nll - extreme)", "values", "does_not_count"),
    objective("truncated", ".minimum(count - 1)", "", "values", "definition or results or truncated"),
    objective("tail", "shared = torch.ones_like(n) / m", "shared = torch.ones_like(n) / n", "values", "micro"),
    objective("spec", "        if option in found:\n", "        if False:\n", "spec", "wrong_texts"),
    objective("spec", "short if float(short) == value else repr(float(value))", "short", "spec", "inverse"),
    # Options.
    mutant("options", "not TINY <= abs(value) <= HUGE", "not TINY < abs(value) <= HUGE", "test_losses", "boundaries"),
    mutant("options", "-(2**31) <= index < 2**31", "-(2**31) < index < 2**31", "test_losses", "boundaries"),
    mutant("options", "-(2**31) <= index < 2**31", "-(2**31) <= index <= 2**31", "test_losses", "bad_options"),
    mutant("options", "if isinstance(value, bool) or not isinstance(value, Real):", "if not isinstance(value, Real):", "test_losses", "another_type"),
    # From losses to the loss.
    mutant("apply", "if not num_items_in_batch >= 0:", "if num_items_in_batch < 0:", "test_losses", "bad_number"),
    mutant("apply", "targets = _shifted(labels, shift, ignore_index)", "targets = _shifted(labels, shift)", "test_losses", "matter_of_labels"),
    mutant("apply", "torch.where(weight == 0, 0, x * weight).sum()", "(x * weight).sum()", "objectives/test_paths", "in_a_graph"),
    mutant("apply", "torch.where(losses.valid, w, 0)) for x, w in terms]", "w) for x, w in terms]", "objectives/test_paths", "do_not_matter"),
    mutant("apply", "return torch.where(losses.valid, weights, 0).view(nll.shape)", "return weights.expand(nll.shape)", "objectives/test_values", ""),
    mutant("apply", "else torch.where(valid, x.to(dtype), 0)).flatten()", "else x.to(dtype)).flatten()", "test_losses", "elsewhere"),
    # The losses as modules and functions.
    mutant("losses", "elif not hasattr(type(self), name) and hasattr(", "elif False and hasattr(", "test_losses", "not_set_beside"),
    mutant("losses", "if value != default]\n        return", "]\n        return", "test_losses", "like_any_other"),
    mutant("functional", 'for name in ("softcap", "logit_scale"):', 'for name in ("logit_scale",):', "engine/test_logprobs", "definition"),
    mutant("functional", "with torch.no_grad():\n        found", "with torch.enable_grad():\n        found", "engine/test_logprobs", ""),
    # Ranks.
    objective("focal", "batch.nll.clamp(min=0)", "batch.nll", "values", "sure"),
    objective("statistics", ".clamp(min=torch.finfo(nll.dtype).tiny)", "", "nvamp", "huge and equal"),
    objective("token_weighted", "scale = torch.where(weights == 0, 0, share / weights)", "scale = share / weights", "values", "without_weight"),
    objective("cross_entropy", "shared=torch.ones_like(n) / m", "shared=torch.ones_like(n) / n", "values", "micro_batches_add_up and ce"),
    mutant("losses", '("process_group", "vocab_group", "on_stats")', '("process_group", "on_stats")', "test_distributed", "copy_shares"),
    mutant("distributed", "if group.ndim != 1:", "if False:", "test_distributed", "group_is_checked"),
    mutant("ranks", "rows.sum(0, dtype=x.dtype)", "rows.amax(0)", "objectives/test_ranks", "first_exchange"),
    mutant("dtensors", "dim not in possible or dim in found", "dim not in possible", "test_sharded", "dtensors-2"),
    # Ranks in step.
    mutant("ranks", "self.skip, self._failed = self.made, True", "self.skip, self._failed = 0, True", "test_distributed", "an_error_anywhere and 2"),
    mutant("ranks", "self.skip, self._failed = self.made, True", "self.skip, self._failed = self.made, False", "test_distributed", "an_error_anywhere and 2"),
    mutant("ranks", "self.terms = dict.fromkeys(self.terms, UNKNOWN)", "pass", "test_distributed", "a_bad_argument or an_error_anywhere"),
    mutant("ranks", " & (heads != UNKNOWN + 1)", "", "test_distributed", "a_bad_argument and 2"),
    mutant("ranks", "self.in_step = False", "pass", "test_distributed", "that_differ and 2"),
    mutant("ranks", "numbers = [word - 1 for word in words]", "numbers = words", "test_distributed", "different_steps and 2"),
    mutant("ranks", "if word != words[self._others.rank]]", "if word]", "test_distributed", "that_differ and 2"),
    mutant("ranks", "fits = len(words) <= ROOM", "fits = True", "objectives/test_ranks", "first_exchange"),
    mutant("ranks", "return torch.where(wrong, torch.nan, x) if x.is_floating_point() else x", "return x", "objectives/test_ranks", "nobody_looks"),
]
