"""What a study prints."""

import io
from typing import Any

import pytest
from rich.console import Console

from nvamp.study.metrics import METRICS, TIMES
from nvamp.study.terminal import Terminal, show_results


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=80)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_names_are_not_markup(console: Console) -> None:
    record = {"loss": "x[/b] [red]y", "seed": 0, "seconds": 1.0, "metrics": {"cross_entropy": 2.0}}
    Terminal(console, 1).finished(record)
    assert shown(console) == "x[/b] [red]y, seed 0: held-out cross-entropy 2.000 nats (1 s)\n"


def test_a_report_that_is_replaced(console: Console) -> None:
    Terminal(console, 1).replacing(3)
    assert shown(console) == "results and report replace earlier ones of 3 runs more; these runs are kept\n"


@pytest.fixture
def results() -> dict[str, Any]:
    def loss(name: str) -> dict[str, Any]:
        return {
            "name": name,
            "sentence": f"what {name} did",
            "diverged_seeds": [],
            "verdicts": {},
            "metrics": {metric.key: {"mean": 5.12345, "half_width": 0.0123} for metric in METRICS},
            "times": {time.key: {"median": 7e3, "low": 6e3, "high": 8e3} for time in TIMES},
        }

    return {
        "baseline": "ce",
        "settings": {"seeds": 3},
        "text": {"held_out_tokens": 32256, "worst_tokens": 1613},
        "losses": [loss("ce"), loss("nvamp:gamma=0.04,tail=0.05"), loss("focal:gamma=3,label_smoothing=0.1")],
    }


@pytest.mark.parametrize(("width", "tables"), [(50, 3), (70, 2), (80, 1)])
def test_a_narrow_terminal_keeps_every_number(results: dict[str, Any], width: int, tables: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    show_results(console, results)
    text = shown(console)
    assert all(len(line) <= width for line in text.splitlines())
    assert text.count("5.123 ± 0.012") == 3 * len(METRICS)
    assert text.count("perplexity") == tables
    for expected in ("What nvamp:gamma=0.04,tail=0.05 did.", "ce 7,000 (6,000 to 8,000)"):
        assert expected in " ".join(text.split())
    assert "What ce did." not in text
    assert "…" not in text


def test_the_terminal_names_all_that_diverged_and_little_text(results: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), width=200)
    for loss in results["losses"]:
        loss.update(diverged_seeds=[0], metrics=dict.fromkeys(loss["metrics"]))
        loss["times"] = dict.fromkeys(loss["times"])
    results["text"].update(held_out_tokens=252, worst_tokens=13)
    show_results(console, results)
    text = shown(console)
    assert text.count("What ") == 3
    assert "Caution: the held-out text is small, 252 tokens; its worst 5% are 13 tokens." in text
