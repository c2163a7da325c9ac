"""What a study prints."""

import io
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from nvamp.study.chats import Encoded
from nvamp.study.corpus import Corpus
from nvamp.study.metrics import METRICS
from nvamp.study.packing import pack_examples
from nvamp.study.terminal import Terminal, show_results
from tests.study.conftest import diverge


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


@pytest.mark.parametrize(("width", "tables"), [(37, 3), (40, 3), (50, 3), (60, 2), (70, 1)])
def test_a_narrow_terminal_keeps_every_number(results: dict[str, Any], width: int, tables: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    show_results(console, results)
    text = shown(console)
    assert all(len(line) <= width for line in text.splitlines())
    assert text.count("0 ± 0.50") == 3 * len(METRICS)
    assert text.count("perplexity") == tables
    for expected in ("Nvamp:gamma=0.05,gradient=token, in plain words.", "ce 7,000 (6,000 to 8,000)"):
        assert expected in " ".join(text.split())
    assert "Ce, in plain words" not in text
    assert "…" not in text


def test_the_terminal_names_all_that_diverged_and_little_text(results: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), width=200)
    for index in range(3):
        diverge(results, index)
    results["text"].update(held_out_tokens=252, worst_tokens=13)
    show_results(console, results)
    text = shown(console)
    assert text.count(", in plain words.") == 3
    assert "Caution: The held-out text is small, 252 tokens, and its worst 5% are 13." in text


@pytest.mark.parametrize(("tokens", "said"), [(99, True), (100, False)])
def test_how_much_text_is_little(results: dict[str, Any], console: Console, tokens: int, said: bool) -> None:
    results["text"]["worst_tokens"] = tokens
    show_results(console, results)
    assert ("Caution" in shown(console)) is said


def test_one_seed_is_said(results: dict[str, Any], console: Console) -> None:
    many = "mean ± 95% interval over 3 seeds", "median (lowest to highest)"
    one = "Held-out text, one seed", "Tokens per second: "
    for seeds, said, unsaid in ((3, many, one), (1, one, many)):
        results["settings"]["seeds"] = seeds
        at = len(shown(console))
        show_results(console, results)
        text = " ".join(shown(console)[at:].split())
        assert all(words in text for words in said)
        assert not any(words in text for words in unsaid)


def test_progress_counts_the_steps_that_are_left(corpus: Corpus) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    with Terminal(console) as terminal:
        terminal.prepared(corpus, steps=20, runs=4, kept=1)
        terminal.finished(RECORD)
        terminal.run("ce", 1)(5, 1.0)
    text = shown(console)
    assert "25/60 loss 1.000" in text
    assert "1 of 4 runs are already finished" in text


def test_padding_is_no_text(console: Console, corpus: Corpus, tokenizer: Any) -> None:
    padded = pack_examples([Encoded([1, 2, 3], [True] * 3, 0)] * 2, 5, 0, together=False)
    Terminal(console).prepared(replace(corpus, training=padded, counts={"examples": 2}), 1, 1, 0)
    assert "words: 6 tokens to train on (4 of them to learn)" in shown(console)


@pytest.mark.parametrize("width", [50, 70, 99, 100, 120])
def test_progress_on_a_narrow_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    with Terminal(console) as terminal:
        terminal.run("nvamp:gradient=token,label_smoothing=0.1", 1)(30, 6.1234)
    assert "30/? loss 6.123 " in shown(console)
    assert ("━" in shown(console)) == (width >= 100)
    assert "nvamp:" in shown(console)
