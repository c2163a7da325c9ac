"""What a mutant is."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A text that occurs once in a file, what stands in its place, and the tests that must then fail."""

    file: str
    old: str
    new: str
    tests: str  # a file
    names: str  # those of its tests that pytest selects with `-k`; all if empty
