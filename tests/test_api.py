"""What is public is what `tests/api.txt` says: a change of it is made on purpose. See docs/stability.md."""

import difflib
from pathlib import Path

from tools.api import api

FILE = Path(__file__).with_name("api.txt")


def test_the_public_api_is_what_was_written_down() -> None:
    difference = difflib.unified_diff(
        FILE.read_text().splitlines(), api().splitlines(), "tests/api.txt", "now", lineterm=""
    )
    said = "\n".join(difference)
    assert not said, (
        f"the public API has changed; if that is meant, make api, and see docs/stability.md:\n{said}"
    )
