"""What the tests of objectives draw from: any objective of the registry, and tokens to judge."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from nvamp.apply import TokenInputs
from nvamp.objectives import OBJECTIVES, Objective

KINDS = {name: kind for name, kind in OBJECTIVES.items() if kind.__module__.startswith("nvamp.")}
NUMBERS = [0.0, 0.05, 0.2, 0.25, 1 / 3, 0.5, 0.7, 1.0, 2.0, 3.5, -0.5, -1.0]
LOSSES = [0.0, 0.25, 0.5, 0.5, 1.0, 1.0, 2.5, 7.0]  # often equal


# Objectives --------------------------------------------------------------------------------------------


def accepts(field: "dataclasses.Field[Any]", value: object) -> bool:
    try:
        field.metadata["check"](field.name, value)
    except (TypeError, ValueError):
        return False
    return True


def choices(field: "dataclasses.Field[Any]") -> list[str]:
    """What an option that is one of several texts may be, as its error says."""
    try:
        field.metadata["check"](field.name, "?")
    except ValueError as error:
        found = re.search("one of (.*), got", str(error))
        assert found is not None
        return found[1].split(", ")
    raise AssertionError(f"{field.name} takes anything")


def values(field: "dataclasses.Field[Any]", numbers: st.SearchStrategy[float]) -> st.SearchStrategy[Any]:
    """Everything that an option may be."""
    if isinstance(field.default, bool):
        return st.booleans()
    if isinstance(field.default, str):
        return st.sampled_from(choices(field))
    accepted = numbers.filter(lambda x: accepts(field, x))
    return st.none() | accepted if field.default is None else accepted


def objectives(
    kind: type[Objective], numbers: st.SearchStrategy[float] | None = None
) -> st.SearchStrategy[Any]:
    """Objectives of this kind, with any options; a new kind needs nothing more to be drawn."""
    some = st.sampled_from(NUMBERS) if numbers is None else numbers
    fields = {field.name: values(field, some) for field in dataclasses.fields(kind)}
    return st.fixed_dictionaries({}, optional=fields).map(lambda options: kind(**options))


def is_exact(o: Objective, nll: Tensor) -> bool:
    """Whether rounding cannot change what the gradient is: "full" has the sign of each deviation in it."""
    deviation = (nll - nll.mean()).abs()
    return getattr(o, "gradient", "") != "full" or bool((deviation > 1e-9).all() or (deviation == 0).all())


# Tokens ------------------------------------------------------------------------------------------------


@dataclass
class Tokens:
    """Tokens of a batch; those that are not valid hold junk."""

    nll: Tensor  # [N]
    valid: Tensor  # [N] bool
    entropy: Tensor  # [N]
    inputs: dict[str, Tensor]  # [N] each, all that there are
    items: Any

    def given(self, o: Objective, optional: bool = True) -> dict[str, Tensor]:
        """The inputs for this objective, with or without the optional ones."""
        return {name: self.inputs[name] for name in (*o.inputs, *(o.optional_inputs if optional else ()))}


@st.composite
def tokens(draw: st.DrawFn, junk: bool = True, most: int = 9) -> Tokens:
    n = draw(st.integers(0, most))

    def column(numbers: Any, where: Tensor | None = None) -> Tensor:
        x = torch.tensor(draw(st.lists(numbers, min_size=n, max_size=n)), dtype=torch.float64)
        if where is None or not junk:
            return x
        return x.masked_fill(~where, draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, 0.0, 1e300])))

    some = draw(st.sampled_from([0.0, 0.3, 1.0]))
    valid = column(st.floats(0, 1, exclude_max=True)) < some
    losses = draw(st.sampled_from([st.sampled_from(LOSSES), st.floats(0, 30, width=16), st.just(1.5)]))
    signed = st.sampled_from([-1.5, -0.25, 0.0, 0.25, 1.0])
    return Tokens(
        column(losses, valid),
        valid,
        column(st.sampled_from([0.0, 0.3, 1.0, 2.9, 5.0]), valid),
        {
            "token_weight": column(st.sampled_from([0.0, 0.25, 1.0, 3.0]), valid),
            "advantage": column(signed, valid),
            "old_logprob": column(losses, valid).neg(),
            "ref_logprob": column(losses, valid).neg(),
        },
        draw(st.none() | st.sampled_from([0, 1, 7, 7.5, 30, torch.tensor(9), torch.tensor([4.5])])),
    )


def fixed(labels: Tensor, seed: int = 0) -> Tokens:
    """Tokens on the grid of labels, of which −100 are not valid; their losses are to be computed."""
    g = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(labels.shape, generator=g, dtype=torch.float64)

    inputs = {name: normal() for name in TokenInputs.__annotations__}
    inputs["token_weight"] = inputs["token_weight"].abs()
    for name in ("old_logprob", "ref_logprob"):
        inputs[name] = inputs[name] / 2 - 3
    return Tokens(torch.empty(0), labels != -100, torch.empty(0), inputs, None)
