"""One round of what `make fuzz` does to the commands for an hour."""

from tests.processes import python


def test_a_round_of_kills_and_damages() -> None:
    ended = python("-m", "tools.soak", "--seconds", "1", "--seed", "3", OMP_NUM_THREADS="1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.startswith("soak: seeds 3 to 3, 1 rounds, ")
    assert ended.stdout.endswith(", no failure\n")
