"""What the property tests draw from, and how many examples they draw: few in `make test`, many in `make fuzz`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.engine.conftest import at_a_time
from tests.engine.problems import DTYPES, layouts

BACKENDS = ["reference", "chunked", "triton"]
FUZZ = int(os.environ.get("NVAMP_FUZZ", "0"))  # so many times the examples; `tools.fuzz` sets it


def examples(count: int) -> Callable[[Any], Any]:
    """Draws `count` examples of what `given` says, or `NVAMP_FUZZ` times as many."""
    if not FUZZ:
        return settings(max_examples=count, deadline=None)
    unhurried = [HealthCheck.too_slow, HealthCheck.data_too_large]
    # What fails is told by its seed: no memory of earlier runs.
    return settings(max_examples=FUZZ * count, deadline=None, database=None, suppress_health_check=unhurried)


@dataclass
class Case:
    """A batch, the output layer, and the options and the backend of the engine."""

    hidden: Tensor  # [B, S, D], in memory of any layout
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    labels: Tensor  # [B, S]
    logits: Tensor  # [B, S, V], in the dtype of hidden
    token_weights: Tensor  # [B, S], of either sign, in the dtype of losses
    ignore_index: int
    options: dict[str, Any]
    backend: str
    rows: int  # of a block; a chunk has twice as many

    @property
    def valid(self) -> Tensor:
        return self.labels != self.ignore_index

    @property
    def engine(self) -> dict[str, Any]:
        return {"ignore_index": self.ignore_index, "backend": self.backend, **self.options}

    @property
    def head(self) -> list[Tensor]:
        return [self.hidden, self.weight, *([] if self.bias is None else [self.bias])]

    def exact(self, logits: Tensor) -> Tensor:
        """Losses [B, S] in float64 by the definition; 0 where ignored."""
        losses = oracle.token_losses(
            logits.double()[self.valid], self.labels[self.valid].long(), **self.options
        )
        return torch.zeros(self.labels.shape, dtype=torch.float64).index_put((self.valid,), losses)

    def with_small_blocks(self, run: Callable[[], Any]) -> Any:
        """run(), with so few rows at a time that even a small batch has many blocks and chunks."""
        with pytest.MonkeyPatch.context() as patch:
            at_a_time(self.rows, patch)
            return run()


def linear(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(h, w, b)


ENGINE = st.fixed_dictionaries(
    {},
    optional={
        "label_smoothing": st.sampled_from([0.1, 0.9]),
        "z_loss": st.sampled_from([1e-4, 0.1]),
        "softcap": st.sampled_from([4.0, 30.0]),
        "logit_scale": st.sampled_from([0.25, -0.5, 2.0]),
    },
)
LOSS = st.fixed_dictionaries(
    {},
    optional={
        "alpha": st.sampled_from([0.0, 0.5, 3.0]),
        "beta": st.sampled_from([0.0, 1.0]),
        "gamma": st.sampled_from([0.0, 0.5]),
        "eps": st.sampled_from([1e-3, 1.0]),
    },
)
ITEMS = st.none() | st.integers(1, 40) | st.sampled_from([0.5, 7.5, torch.tensor(9)])


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: Sequence[torch.dtype] = DTYPES,
    backends: Sequence[str] = BACKENDS,
    engine: st.SearchStrategy[dict[str, Any]] = ENGINE,
) -> Case:
    b, s, d = draw(st.integers(0, 3)), draw(st.integers(0, 6)), draw(st.integers(1, 5))
    v = draw(st.integers(1, 20) | st.sampled_from([31, 32, 33, 70]))
    dtype, ignored = draw(st.sampled_from(dtypes)), draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    ignore_index = draw(st.sampled_from([-100, -1, 0, v, 2**31 - 1]))
    spread = draw(st.sampled_from([1.0, 0.01, 8.0]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    hidden, weight = (spread * normal(b, s, d)).to(dtype), (normal(v, d) / 2).to(dtype)
    bias = normal(v).to(dtype) if draw(st.booleans()) else None
    labels = torch.randint(v, (b, s), generator=g)
    labels[torch.rand(b, s, generator=g) < ignored] = ignore_index
    layout = draw(st.sampled_from(list(layouts(hidden))))
    return Case(
        hidden=layouts(hidden)[layout],
        weight=weight.T.contiguous().T if draw(st.booleans()) else weight,
        bias=bias,
        labels=labels.to(draw(st.sampled_from([torch.int64, torch.int32]))),
        logits=layouts(linear(hidden, weight, bias))[layout],
        token_weights=normal(b, s).to(torch.float64 if dtype == torch.float64 else torch.float32),
        ignore_index=ignore_index,
        options=draw(engine),
        backend=draw(st.sampled_from(backends)),
        rows=draw(st.sampled_from([1, 3, 1000])),
    )
