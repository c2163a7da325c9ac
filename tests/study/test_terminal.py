"""What a study prints."""

import io

import pytest
from rich.console import Console

from nvamp.study.terminal import Terminal


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=80)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


RECORD = {"loss": "ce", "seed": 0, "seconds": 1.0, "metrics": {"cross_entropy": 2.0}, "logits_because": None}


def test_names_are_not_markup(console: Console) -> None:
    Terminal(console).finished({**RECORD, "loss": "x[/b] [red]y"})
    assert shown(console) == "x[/b] [red]y, seed 0: held-out cross-entropy 2.000 nats (1 s)\n"


def test_a_report_that_is_replaced(console: Console) -> None:
    Terminal(console).replacing(3)
    assert shown(console) == "results and report replace earlier ones of 3 runs more; these runs are kept\n"


def test_logits_in_memory_are_reported_once(console: Console) -> None:
    terminal = Terminal(console)
    for seed in range(2):
        terminal.finished({**RECORD, "seed": seed, "logits_because": "of [this]"})
    assert shown(console).splitlines()[1:] == [
        "this model trains with all of its logits in memory: of [this]",
        "ce, seed 1: held-out cross-entropy 2.000 nats (1 s)",
    ]
