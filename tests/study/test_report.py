import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nvamp.study import StudyError
from nvamp.study.metrics import METRICS
from nvamp.study.report import write_report

VOID = {"meta", "br", "img", "link", "input"}


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


def loss(name: str, index: int, baseline: bool) -> dict[str, Any]:
    estimates = {metric.key: {"mean": 4.0 + index, "half_width": 0.5} for metric in METRICS}
    return {
        "name": name,
        "diverged_seeds": [],
        "metrics": estimates,
        "differences": {}
        if baseline
        else {key: {"mean": -float(index), "half_width": 0.5} for key in estimates},
        "verdicts": {} if baseline else dict.fromkeys(estimates, "better"),
        "sentence": f"{name}, in plain words.",
        "curve": [{"step": s, "mean": 7.0 - s, "low": 6.5 - s, "high": 7.5 - s} for s in range(4)],
        "density": [0.25, 0.25, 0.0],
        "survival": [1.0, 0.5, 0.0],
    }


@pytest.fixture
def results() -> dict[str, Any]:
    names = ["ce", "nvamp", "nvamp:gamma=0.05,gradient=token"]
    return {
        "command": "nvamp compare --text '<script>' --seeds 3",
        "created": "2026-01-01T00:00:00+00:00",
        "versions": {"nvamp": "0.1.0", "torch": "2.13.0"},
        "settings": {"losses": names, "seeds": 3, "steps": 3, "text": ["<script>"], "model": None},
        "text": {
            "source": "<script>",
            "sequence": 64,
            "vocabulary": 2048,
            "train_tokens": 1234567,
            "held_out_tokens": 32256,
            "unigram_cross_entropy": 6.35,
        },
        "baseline": "ce",
        "parameters": 2_000_000,
        "grid": {"bin_edges": [0.0, 2.0, 4.0, 6.0], "thresholds": [0.0, 3.0, 6.0]},
        "losses": [loss(name, index, index == 0) for index, name in enumerate(names)],
        "pages": {},
        "runs": [],
    }


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
    assert sum(tag == "svg" for tag, _ in page.elements) == 4
    labels = [
        attributes.get("aria-label") for _, attributes in page.elements if attributes.get("role") == "img"
    ]
    assert len(labels) == 4
    assert all(labels)
    for expected in (
        "nvamp, in plain words.",
        "nvamp:gamma=0.05,gradient=token, in plain words.",
        "4.000 ± 0.500",
        "−2.000 ± 0.500",
        "nvamp compare --text '<script>' --seeds 3",
        "2.13.0",
        "1,234,567",
        *(metric.label for metric in METRICS),
    ):
        assert expected in page.text
    assert page.text.count("better\n") == 2 * len(METRICS)


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
        "nvamp, in plain words.",
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


def test_one_loss_has_no_list_of_verdicts(results: dict[str, Any], tmp_path: Path) -> None:
    def lists() -> int:
        page = Page(write_report(results, tmp_path / "report.html").read_text())
        return sum(tag == "ul" for tag, _ in page.elements)

    assert lists() == 1
    del results["losses"][1:]
    assert lists() == 0


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


def test_a_diverged_loss_and_many_losses_are_drawn(results: dict[str, Any], tmp_path: Path) -> None:
    gone = copy.deepcopy(results["losses"][1])
    gone.update(
        name="gone", density=None, survival=None, curve=[], diverged_seeds=[0], sentence="gone diverged."
    )
    gone["metrics"] = dict.fromkeys(gone["metrics"])
    gone["differences"] = dict.fromkeys(gone["differences"])
    gone["verdicts"] = dict.fromkeys(gone["verdicts"], "no value")
    more = [{**copy.deepcopy(results["losses"][1]), "name": f"focal:gamma={i}"} for i in range(6)]
    page = Page(render({**results, "losses": [*results["losses"], gone, *more]}, tmp_path))
    assert "gone diverged." in page.text
    assert "–" in page.text
    assert sum(tag == "svg" for tag, _ in page.elements) == 4
