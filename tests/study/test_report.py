import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nvamp.study import StudyError, report
from nvamp.study.metrics import METRICS, TIMES
from nvamp.study.report import GLANCE, curves, panels, settings, styled, write_report
from tests.study.conftest import diverge

VOID = {"meta", "wbr", "br", "img", "link", "input"}


class Page(HTMLParser):
    """A page's elements and text; fails where elements do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def render(results: dict[str, Any], tmp_path: Path) -> str:
    return write_report(results, tmp_path / "report.html").read_text()


def test_the_page_needs_nothing_but_itself(results: dict[str, Any], tmp_path: Path) -> None:
    page = render(results, tmp_path)
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    for tag, attributes in Page(page).elements:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href", "srcset"):
            assert (attributes.get(name) or "#").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_figures_refer_to_their_own_parts(results: dict[str, Any], tmp_path: Path) -> None:
    page = render(results, tmp_path)
    elements = Page(page).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]*)\)", page)
    used += [(attributes["xlink:href"] or "")[1:] for _, attributes in elements if "xlink:href" in attributes]
    assert used
    assert set(used) <= set(ids)


def test_the_page_says_it_all(results: dict[str, Any], tmp_path: Path) -> None:
    page = Page(render(results, tmp_path))
    labels = [
        attributes.get("aria-label") for _, attributes in page.elements if attributes.get("role") == "img"
    ]
    assert len(labels) == 5
    assert all(labels)
    text = " ".join(page.text.split())
    for expected in (
        "The loss nvamp and the loss nvamp:gamma=0.05,gradient=token against the loss ce",
        "the loss nvamp: tail 1% lighter, mean alike.",
        "the loss nvamp:gamma=0.05,gradient=token: tail 2% lighter, mean alike.",
        "4.00 ± 0.50",
        "−2.00 ± 0.50",
        "7,000 (6,000 to 8,000)",
        "1,234,567 tokens, over which each run passes 0.1 times",
        "nvamp compare --text '<script>' --seeds 3",
        "2.13.0",
        "the built-in Llama, from scratch",
        *(metric.label for metric in (*METRICS, *TIMES)),
    ):
        assert expected in text, expected
    assert page.text.partition("Held-out metrics")[2].count("better\n") == 2 * len(METRICS)
    assert "default" not in text
    assert "Caution" not in text


def test_the_plot_of_intervals(results: dict[str, Any]) -> None:
    tail, _, _, accuracy, *_ = found = panels(results)
    assert [panel.metric.key for panel in found] == list(GLANCE)
    assert (tail.reach, accuracy.reach) == ("2.5%", "2.5 points")
    first, second = tail.rows
    assert (first["low"], first["middle"], first["high"]) == ("23.00", "32.00", "41.00")
    assert (second["low"], second["high"], second["text"]) == ("5.00", "23.00", "−2.00 ± 0.50%")


def test_where_the_distributions_are_drawn(results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[float], list[float]]] = []
    monkeypatch.setattr(
        report, "_draw", lambda axes, x, values, style: drawn.append(([*x], [*values["mean"]]))
    )
    report.density(results)
    report.tail(results)
    assert drawn[:3] == [([1.0, 3.0, 5.0], [0.25, 0.25, 0.0])] * 3  # in the middle of the bins
    assert drawn[3:] == [([0.0, 3.0], [1.0, 0.5])] * 3  # a logarithm has no zero


def test_a_default_is_shown_as_what_it_was(results: dict[str, Any]) -> None:
    given = {
        "sequence": None,
        "loss_on": None,
        "lora": None,
        "bf16": False,
        "text": [],
        "dataset": [],
        "model": None,
        "lr": 5e-5,
        "loss": ["a", "b"],
    }
    assert dict(settings({**results, "settings": given})) == {
        "sequence": "64 tokens",
        "loss-on": "all",
        "lora": "none",
        "bf16": "no",
        "text": "<script>",
        "dataset": "none",
        "model": "the built-in Llama, from scratch",
        "lr": "5e-05",
        "loss": "a, b",
    }
    given["dataset"] = ["rows.csv"]
    results["text"]["examples"] = 300
    found = dict(settings({**results, "settings": given}))
    assert (found["text"], found["loss-on"]) == ("none", "completions")


def test_little_held_out_text_is_said(results: dict[str, Any], tmp_path: Path) -> None:
    results["text"].update(held_out_tokens=252, worst_tokens=13)
    text = " ".join(Page(render(results, tmp_path)).text.split())
    assert "Caution: The held-out text is small, 252 tokens, and its worst 5% are 13." in text


HOSTILE = "<b onx='1'>\"&lt;"


def hostile(x: Any, key: str = "") -> Any:
    """The results with something to run in every text but those that the report looks up."""
    if isinstance(x, dict):
        return {k: hostile(v, k) for k, v in x.items()}
    if isinstance(x, list):
        return [hostile(v) for v in x]
    return x + HOSTILE if isinstance(x, str) and key not in ("created", *METRIC_KEYS) else x


METRIC_KEYS = [metric.key for metric in METRICS]


def test_no_text_is_markup(results: dict[str, Any], tmp_path: Path) -> None:
    results["settings"]["model"] = "a/model"
    results["pages"] = {"ce": "inspect/ce-seed0.html"}
    page = Page(render(hostile(results), tmp_path))
    tags = {tag for tag, _ in Page(render(results, tmp_path)).elements}
    assert {tag for tag, _ in page.elements} == tags
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    for expected in (
        "ce",
        "the loss nvamp",
        "tail 1% lighter",
        "nvamp compare --text '<script>' --seeds 3",
        "2.13.0",
        "a/model",
    ):
        assert expected + HOSTILE in page.text, expected


def test_pages_of_token_losses_are_linked(results: dict[str, Any], tmp_path: Path) -> None:
    assert "Token by token" not in render(results, tmp_path)
    results["pages"] = {"ce": "inspect/ce-seed0.html", "nvamp": "inspect/nvamp-seed0.html"}
    page = Page(render(results, tmp_path))
    assert [a["href"] for tag, a in page.elements if tag == "a"] == list(results["pages"].values())
    assert "held-out text as the models of seed 0 read it: ce, nvamp." in " ".join(page.text.split())


def test_the_page_asks_for_nothing_and_runs_nothing(results: dict[str, Any], tmp_path: Path) -> None:
    page = Page(write_report(results, tmp_path / "report.html").read_text())
    (policy,) = (attrs["content"] for tag, attrs in page.elements if "http-equiv" in attrs)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert not {"script", "img", "image", "link", "iframe"} & {tag for tag, _ in page.elements}


def test_one_loss_is_compared_to_nothing(results: dict[str, Any], tmp_path: Path) -> None:
    del results["losses"][1:]
    page = Page(render(results, tmp_path))
    _, title, text = " ".join(page.text.split()).partition("The loss ce on held-out text")
    assert title
    for word in ("differen", "better or worse", "against"):
        assert word not in text, word
    assert sum(attributes.get("role") == "img" for _, attributes in page.elements) == 4


def test_a_page_that_cannot_be_written(results: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(StudyError, match=f"^{tmp_path / 'report.html'}: Is a directory$"):
        write_report(results, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_one_seed_is_said(results: dict[str, Any], tmp_path: Path) -> None:
    note = "One seed gives no interval"
    assert note not in render(results, tmp_path)
    results["settings"]["seeds"] = 1
    assert note in render(results, tmp_path)


def test_one_seed_has_no_bands(results: dict[str, Any], tmp_path: Path) -> None:
    def bare(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: (blank(v) if k == "half_width" else bare(v)) for k, v in x.items()}
        return [bare(v) for v in x] if isinstance(x, list) else x

    def blank(x: Any) -> Any:
        return [None] * len(x) if isinstance(x, list) else None

    with_bands = curves(results)
    one = bare(results)
    one["settings"]["seeds"] = 1
    without = curves(one)
    assert with_bands is not None
    assert without is not None
    assert with_bands.count("FillBetween") == len(results["losses"])
    assert without.count("FillBetween") == 0
    assert "there are no bands" in render(one, tmp_path)


def test_a_diverged_loss_and_many_losses_are_drawn(results: dict[str, Any], tmp_path: Path) -> None:
    more = [{**copy.deepcopy(results["losses"][1]), "name": f"focal:gamma={i}"} for i in range(6)]
    results["losses"] += more
    diverge(results, 1)
    page = Page(render(results, tmp_path))
    text = " ".join(page.text.split())
    assert "8 losses against the loss ce" in text
    assert "the loss nvamp: diverged on seed 0 of 3." in text
    assert "–" in page.text
    assert sum(attributes.get("role") == "img" for _, attributes in page.elements) == 5
    styles = [style for _, style in styled(results)]
    assert len(set(styles)) == len(styles)


def test_if_every_loss_diverges_all_are_named(results: dict[str, Any], tmp_path: Path) -> None:
    for index in range(3):
        diverge(results, index)
    page = Page(render(results, tmp_path))
    text = " ".join(page.text.split())
    assert text.count("diverged on seed 0 of 3.") == 3
    assert "There are no figures: every loss diverged." in text
    assert not any(attributes.get("role") == "img" for _, attributes in page.elements)
