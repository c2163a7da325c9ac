"""`patch` on the causal language models of transformers, and the page that lists them."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers

from nvamp import LinearLoss
from nvamp.integrations.transformers import patch
from nvamp.objectives import NVAMP
from tests.integrations.architectures import (
    LANGUAGE,
    PAGE,
    REFUSED,
    TOKENS,
    VISION,
    VOCABULARY,
    Architecture,
    build,
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


@pytest.mark.parametrize("architecture", [*LANGUAGE, *VISION], ids=lambda a: a.name)
def test_loss_and_gradients_are_those_of_the_logits(architecture: Architecture) -> None:
    assert row(architecture) in LINES


@pytest.mark.parametrize("architecture", REFUSED, ids=lambda a: a.name)
def test_the_refused(architecture: Architecture) -> None:
    assert refusal_row(architecture) in LINES


@pytest.mark.parametrize("architecture", [a for a in REFUSED if "T5" not in a.name], ids=lambda a: a.name)
def test_the_error_names_loss_function_where_the_model_calls_it(architecture: Architecture) -> None:
    model = build(architecture)
    tokens = torch.randint(3, VOCABULARY, TOKENS)
    model.loss_function = own = mock.Mock(return_value=torch.zeros((), dtype=torch.float64))
    model(input_ids=tokens, labels=tokens)
    del model._loss_function
    patch(model, LinearLoss(NVAMP()))
    with pytest.raises(NotImplementedError, match=r"compute_loss_func\(Loss\(\.\.\.\)\)") as error:
        model(input_ids=tokens, labels=tokens)
    assert (" or loss_function(Loss(...))" in str(error.value)) == own.called


def test_the_page_is_of_these() -> None:
    rows = [line for line in LINES if line.startswith("| `")]
    assert [line.split("`")[1] for line in rows] == [a.name for a in (*LANGUAGE, *VISION, *REFUSED)]
    language, seeing = len(LANGUAGE), len(LANGUAGE) + len(VISION)
    assert (
        PAGE.format(
            version=transformers.__version__,
            language="\n".join(rows[:language]),
            vision="\n".join(rows[language:seeing]),
            refused="\n".join(rows[seeing:]),
        )
        == TEXT
    )
