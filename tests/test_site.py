"""The site that `make docs` builds: nothing is dead in it, and an accessibility checker finds nothing on its pages."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser

from benchmarks.inspect_page import chromium
from tests.processes import ROOT
from tests.study.axe import violations

# A page of each kind: figure, code in Python and shell, tables that scroll, what a command has written.
PAGES: tuple[tuple[str, Literal["light", "dark"], int], ...] = (
    ("index", "light", 1400),
    ("coming-from", "dark", 390),
    ("choosing-a-mode", "light", 390),
    ("custom-losses", "dark", 1400),
    ("evidence/types", "light", 1400),
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.mark.parametrize(("name", "scheme", "width"), PAGES)
def test_axe_finds_nothing(
    site: Path, browser: Browser, name: str, scheme: Literal["light", "dark"], width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto((site / f"{name}.html").as_uri())
    page.wait_for_selector(".md-typeset__scrollwrap, .md-code__nav")  # the script of the site has run
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
