"""The report in a browser: what fits, what an accessibility checker finds, and what is printed."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from benchmarks.inspect_page import chromium
from nvamp.study.report import write_report
from tests.study.axe import violations
from tests.study.conftest import diverge, three_losses

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def many(results: dict[str, Any]) -> None:
    """Eight losses with long names on little text, one of which diverged."""
    name = "nvamp:alpha=0.123456,gamma=0.04,tail=0.05,gradient=token,label_smoothing=0.1,z_loss=0.000"
    results["losses"] += [{**copy.deepcopy(results["losses"][1]), "name": f"{name}{i}"} for i in range(5)]
    results["text"].update(held_out_tokens=252, worst_tokens=13)
    results["command"] += " --loss " + name
    diverge(results, 1)


def alone(results: dict[str, Any]) -> None:
    del results["losses"][1:]


def lost(results: dict[str, Any]) -> None:
    for index in range(3):
        diverge(results, index)


CASES: dict[str, Change] = {"three": lambda results: None, "many": many, "alone": alone, "lost": lost}


@pytest.fixture(scope="module", params=CASES)
def path(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A report."""
    results = three_losses()
    results["pages"] = {"ce": "inspect/ce-seed0.html"}
    CASES[request.param](results)
    return write_report(results, tmp_path_factory.mktemp("report") / "report.html")


def opened(browser: Browser, path: Path, width: int, scheme: Any) -> Page:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(20_000)
    page.goto(path.as_uri())
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, path: Path, scheme: str) -> None:
    page = opened(browser, path, 1400, scheme)
    assert violations(page) == []
    page.set_viewport_size({"width": 390, "height": 900})
    assert violations(page) == []
    page.close()


# Elements that reach beyond the window, except in the table, which scrolls.
CUT = """[...document.querySelectorAll("main *:not(.scroll *, svg *)")]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("width", [1400, 390, 320])
def test_nothing_is_cut(browser: Browser, path: Path, width: int) -> None:
    page = opened(browser, path, width, "light")
    assert page.evaluate(CUT) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    table = page.evaluate(
        "(({scrollWidth, clientWidth}) => scrollWidth > clientWidth)(document.querySelector('.scroll'))"
    )
    assert page.locator(".cue").is_visible() == (width < 700)
    assert table or width == 1400 or page.locator("thead th").count() == 2  # what the cue is about
    page.close()


def test_what_is_printed(browser: Browser, path: Path) -> None:
    """On white, with its colours; what belongs together is on one page."""
    page = opened(browser, path, 1400, "dark")
    page.emulate_media(media="print")
    style = page.evaluate(
        """() => [...document.querySelectorAll("main, figure, tr, h2, .together")].map(e => [
            e.tagName, getComputedStyle(e).breakInside, getComputedStyle(e).breakAfter,
            getComputedStyle(e).printColorAdjust])"""
    )
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert {adjust for *_, adjust in style} == {"exact"}
    assert {inside for tag, inside, *_ in style if tag in ("FIGURE", "TR", "SECTION")} == {"avoid"}
    assert {after for tag, _, after, _ in style if tag == "H2"} == {"avoid"}
    assert not page.locator(".cue").is_visible()
    page.close()
