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
    # Launches.
    # The objective in one kernel.
    fused("(candidate > best) |", "(candidate >= best) |", "first_of_equal"),
    Mutant(f"{FUSED}.py", "        and not objective.tail\n", "", "tests/test_fused.py", "cannot_judge"),
]
