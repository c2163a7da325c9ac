"""Pictures of the report of `nvamp compare` and of the page of `nvamp inspect`, light and dark, from a study.

make compare && python -m docs.screenshots      writes docs/figures/{report,inspect}-{light,dark}.png
"""

import argparse
from pathlib import Path
from typing import Literal

from benchmarks.inspect_page import chromium

FIGURES = Path(__file__).parent / "figures"
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=Path, default=Path("runs/compare"), help="a folder of nvamp compare")
    parser.add_argument("--loss", default="nvamp-gamma=0.04-tail=0.05", help="whose page to show")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the pictures")
    args = parser.parse_args()
    pages = {
        "report": args.study / "report.html",
        "inspect": args.study / "inspect" / f"{args.loss}-seed0.html",
    }
    for path in pages.values():
        if not path.exists():
            parser.error(f"{path} does not exist: make compare first, or name a study and one of its losses")
    with chromium() as browser:
        for name, path in pages.items():
            for scheme in SCHEMES:
                page = browser.new_page(viewport={"width": 1100, "height": 820}, color_scheme=scheme)
                page.goto(path.resolve().as_uri())
                page.evaluate("new Promise(requestAnimationFrame)")
                page.screenshot(path=args.out / f"{name}-{scheme}.png")
                page.close()


if __name__ == "__main__":
    main()
