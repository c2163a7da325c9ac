"""`patch` on the language models of transformers, and the page that lists them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from tests.integrations.architectures import (
    AGREEING,
    REFUSED,
    Architecture,
    page,
    refusal_row,
    row,
)
from tests.study.conftest import one_thread

__all__ = ["one_thread"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning"),  # EncoderDecoderModel
    pytest.mark.filterwarnings("ignore:Casting complex values to real:UserWarning"),  # Llama 4
]

TEXT = Path(__file__, "../../../docs/architectures.md").resolve().read_text()
LINES = TEXT.splitlines()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("architecture", AGREEING, ids=lambda a: a.name)
def test_loss_and_gradients_are_those_of_the_logits(architecture: Architecture) -> None:
    assert row(architecture) in LINES


@pytest.mark.parametrize("architecture", REFUSED, ids=lambda a: a.name)
def test_the_refused(architecture: Architecture) -> None:
    assert refusal_row(architecture) in LINES


def test_the_page_is_of_these() -> None:
    rows = [line for line in LINES if line.startswith("| `")]
    agreeing, refused = rows[: len(AGREEING)], rows[len(AGREEING) : len(AGREEING) + len(REFUSED)]
    assert [line.split("`")[1] for line in agreeing] == [a.name for a in AGREEING]
    assert [line.split("`")[1] for line in refused] == [a.name for a in REFUSED]
    assert page(agreeing, refused) == TEXT
