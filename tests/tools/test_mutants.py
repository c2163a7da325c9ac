"""The mutants of the code: each can be made. `make mutants` shows that some test sees it."""

import ast
from pathlib import Path

from tools.mutants.__main__ import MUTANTS

ROOT = Path(__file__).parents[2]


def test_every_mutant_can_be_made() -> None:
    for mutant in MUTANTS:
        text = (ROOT / mutant.file).read_text()
        assert text.count(mutant.old) == 1, mutant
        ast.parse(text.replace(mutant.old, mutant.new))
        assert mutant.new != mutant.old, mutant
        assert (ROOT / mutant.tests).is_file(), mutant
    assert len(set(MUTANTS)) == len(MUTANTS)
