"""`patch` on the language models of transformers, and the page that lists them."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import transformers

from nvamp import LinearLoss
from nvamp.integrations.transformers import patch
from nvamp.objectives import NVAMP
from tests.integrations.architectures import (
    AGREEING,
    REFUSED,
    Architecture,
    batch_of,
    build,
    page,
    refusal_row,
    row,
)
from tests.study.conftest import one_thread

__all__ = ["one_thread"]

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


@pytest.mark.parametrize("architecture", [a for a in REFUSED if "FSMT" not in a.name], ids=lambda a: a.name)
def test_the_error_names_loss_function_where_the_model_calls_it(architecture: Architecture) -> None:
    model = build(architecture)
    model.loss_function = own = mock.Mock(wraps=model.loss_function)
    model(**batch_of(model))
    del model._loss_function
    patch(model, LinearLoss(NVAMP()))
    with pytest.raises(NotImplementedError, match=r"compute_loss_func\(Loss\(\.\.\.\), model\)") as error:
        model(**batch_of(model))
    assert (" or loss_function(Loss(...), model)" in str(error.value)) == own.called


def test_the_page_is_of_these() -> None:
    rows = [line for line in LINES if line.startswith("| `")]
    agreeing, refused = rows[: len(AGREEING)], rows[len(AGREEING) : len(AGREEING) + len(REFUSED)]
    assert [line.split("`")[1] for line in agreeing] == [a.name for a in AGREEING]
    assert [line.split("`")[1] for line in refused] == [a.name for a in REFUSED]
    assert page(agreeing, refused) == TEXT
