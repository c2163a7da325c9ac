"""The time that a page of `nvamp inspect` takes to be made, opened and redrawn. Needs Chromium.

python -m benchmarks.inspect_page --model runs/compare/models/nvamp-seed0
"""

import argparse
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from statistics import median
from time import perf_counter

from playwright.sync_api import Browser, sync_playwright

from nvamp.study.inspect.page import Inspected, write_page
from nvamp.study.inspect.score import inspect_text
from nvamp.study.losses import MODES, parse_losses
from nvamp.study.models import load_model, load_tokenizer

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
FILES = ("argparse", "typing", "subprocess", "inspect", "tarfile", "turtle", "zipfile", "doctest")
REPEATS = 7

# Milliseconds from a new slider value to the page that shows it, including layout.
REDRAW = """alpha => {
    const begin = performance.now(), slider = document.getElementById("alpha");
    slider.value = alpha;
    slider.dispatchEvent(new Event("input"));
    document.body.offsetHeight;
    return performance.now() - begin;
}"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """The Chromium of this machine, or the one that CHROMIUM names."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        raise FileNotFoundError(f"none of {', '.join(NAMES)} is installed: `make browser`, or set CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


def text_of(tokens: int, tokenizer: object) -> str:
    """Python source of `tokens` tokens."""
    library = Path(sysconfig.get_path("stdlib"))
    text = "".join((library / f"{name}.py").read_text() for name in FILES)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]  # type: ignore[operator]
    assert len(offsets) >= tokens, f"the files have {len(offsets)} tokens"
    end: int = offsets[tokens - 1][1]
    return text[:end]


def opened(browser: Browser, path: Path) -> tuple[float, list[float]]:
    """Seconds from navigation until the page answers, and the milliseconds of its redraws."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    begin = perf_counter()
    page.goto(path.as_uri())
    page.evaluate("new Promise(requestAnimationFrame)")
    seconds = perf_counter() - begin
    redraws = [page.evaluate(REDRAW, alpha) for alpha in (0.5, 0.7, 1.1, 1.3)]
    page.close()
    return seconds, redraws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory or hub id")
    parser.add_argument("--tokens", type=int, default=100_000)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    text = text_of(arguments.tokens, tokenizer)
    with tempfile.TemporaryDirectory() as directory, chromium() as browser:
        path = Path(directory) / "page.html"
        begin = perf_counter()
        found = inspect_text(model, tokenizer, text, parse_losses(MODES))
        scored = perf_counter()
        write_page([Inspected("model", found)], "text", path)
        made = perf_counter()
        times, redraws = zip(*(opened(browser, path) for _ in range(REPEATS)), strict=True)
        print(f"{len(found.tokens.ids):,} tokens, {len(text):,} characters")
        print(f"scored in {scored - begin:.1f} s, written in {made - scored:.1f} s")
        print(f"page: {path.stat().st_size / 1e6:.2f} MB")
        print(f"open after {median(times):.2f} s, a slider's move drawn in {median(chain(*redraws)):.0f} ms")


if __name__ == "__main__":
    main()
