"""Objectives as text, and what they say of wrong options."""

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvamp.objectives import (
    GCE,
    OBJECTIVES,
    ClippedPolicy,
    EntropyWeighted,
    Objective,
    Tail,
    Tilted,
    TokenWeighted,
    parse,
)
from nvamp.objectives.spec import parse_loss
from tests.objectives.problems import KINDS, choices, objectives
from tests.strategies import examples

FLOATS = st.floats(0, 1) | st.floats(-100, 100) | st.floats(allow_nan=False, width=32) | st.integers(0, 3)


@pytest.mark.parametrize("name", KINDS)
@examples(100)
@given(data=st.data())
def test_text_is_the_inverse(name: str, data: st.DataObject) -> None:
    o = data.draw(objectives(KINDS[name], FLOATS))
    assert parse(str(o)) == o
    assert str(parse(str(o))) == str(o)
    assert str(o).partition(":")[0] == name
    assert pickle.loads(pickle.dumps(o)) == o
    assert eval(repr(o), vars(__import__("nvamp.objectives").objectives)) == o


@pytest.mark.parametrize(
    ("text", "o"),
    [
        ("tail", Tail()),
        (" tail : share = 0.1 , strength=2", Tail(0.1, 2.0)),
        ("tilted:t=-0.5", Tilted(-0.5)),
        ("entropy:kind=mile,gamma=0.5", EntropyWeighted("mile", 0.5)),
        ("token_weighted:normalize=true", TokenWeighted(True)),
        ("clipped_policy:clip_high=0.28", ClippedPolicy(clip_high=0.28)),
        ("clipped_policy:clip_high=none", ClippedPolicy()),
    ],
)
def test_texts(text: str, o: Objective) -> None:
    assert parse(text) == o


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tial", "'tial': unknown objective 'tial', known are ce, nvamp, tail, tilted"),
        ("tail:size=1", "unknown option 'size', tail takes share, strength, label_smoothing"),
        ("tail:share=2", r"'tail:share=2': share must be in \[0, 1\], got 2.0"),
        ("tail:share=some", "share must be a number, got 'some'"),
        ("tail:share", "expected option=value, got 'share'"),
        ("tail:share=0.1,share=0.2", "share is given twice"),
        ("tilted:t=0", "t must not be 0"),
        ("entropy:kind=neither", "kind must be one of eaft, mile, got 'neither'"),
        ("token_weighted:normalize=1", "normalize must be true or false, got '1'"),
        ("ce:label_smoothing=0.1", "expected options of an objective, got label_smoothing"),
    ],
)
def test_wrong_texts(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_options_of_the_loss_of_a_token() -> None:
    spec = parse_loss("tail:share=0.1,label_smoothing=0.1")
    assert spec == (Tail(0.1), {"label_smoothing": 0.1})
    assert parse_loss(str(spec)) == spec


FIELDS = [(kind, field) for kind in KINDS.values() for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(
    ("kind", "field"), FIELDS, ids=lambda x: getattr(x, "name", getattr(x, "__name__", ""))
)
def test_every_option_is_checked(kind: Any, field: "dataclasses.Field[Any]") -> None:
    if isinstance(field.default, str):
        with pytest.raises(
            ValueError, match=f"{field.name} must be one of {', '.join(choices(field))}, got 'no'"
        ):
            kind(**{field.name: "no"})
        return
    with pytest.raises(TypeError, match=f"{field.name} must be "):
        kind(**{field.name: "some"})
    if not isinstance(field.default, bool):
        for wrong in (torch.nan, torch.inf, -torch.inf, 1e39, 1e-39):
            with pytest.raises(ValueError, match=f"{field.name} must be "):
                kind(**{field.name: wrong})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tail(share=1.1), r"share must be in \[0, 1\], got 1.1"),
        (lambda: Tail(strength=-1), "strength must be finite and at least 0, got -1"),
        (lambda: GCE(q=-0.1), r"q must be in \[0, 1\]"),
        (lambda: Tilted(0), "t must not be 0"),
        (lambda: ClippedPolicy(clip_high=-0.1), "clip_high must be finite and at least 0"),
    ],
)
def test_options_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_options_are_kept() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Tail().share = 0.5  # type: ignore[misc]
    assert len({Tail(), Tail(0.05, 1), Tail(0.1)}) == 2


def test_the_registry_is_in_the_order_of_the_documentation() -> None:
    assert " ".join(OBJECTIVES).startswith(
        "ce nvamp tail tilted truncated focal gce dft entropy token_weighted clipped_policy"
    )
