"""A batch on several ranks against the same batch in one process."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from nvamp import LinearLoss, Loss
from nvamp.objectives import (
    GRADIENTS,
    NVAMP,
    Batch,
    ClippedPolicy,
    Gradient,
    Objective,
    Tail,
    Tilted,
    TokenWeighted,
    Truncated,
)
from nvamp.objectives.hardest import hardest, most_tokens_of, tokens_of, whole_tokens_of
from nvamp.ranks import Exchange, Ranks
from tests.engine.test_parts import on_ranks as on_threads
from tests.objectives.problems import KINDS, fixed, is_exact, objectives, tokens
from tests.objectives.test_nvamp import HUGE_LOSSES
from tests.ranks import on_ranks
from tests.strategies import examples

WORLDS = st.integers(2, 4)


@st.composite
def parts(draw: st.DrawFn, n: int, world: int) -> list[slice]:
    """n tokens on so many ranks, which may have none."""
    cuts = sorted(draw(st.lists(st.integers(0, n), min_size=world - 1, max_size=world - 1)))
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, n], strict=True)]


# The hardest tokens ------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1.0, 1.0, -2.5, 1e-45, 3e38, torch.inf, torch.nan, -torch.nan]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@examples(60)
@given(data=st.data())
def test_hardest(dtype: torch.dtype, data: st.DataObject) -> None:
    numbers = data.draw(st.sampled_from([st.sampled_from(SPECIAL), st.floats(width=32), st.floats()]))
    losses = torch.tensor(data.draw(st.lists(numbers, max_size=12)), dtype=dtype)
    losses = losses.clamp(min=torch.finfo(dtype).min)  # none is −inf
    n, world = len(losses), data.draw(WORLDS)
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), dtype=torch.bool)
    count = data.draw(st.integers(0, int(valid.sum())))
    shares = data.draw(parts(n, world))

    def found(ranks: Ranks) -> Any:
        mine = shares[ranks.rank]
        return hardest(Batch(losses[mine], valid[mine], ranks=ranks), torch.tensor(count))

    # Sorted in Python: NaN first, then the largest, equals by their place.
    order = sorted(
        (i for i in range(n) if valid[i]),
        key=lambda i: (not losses[i].isnan(), 0 if losses[i].isnan() else -float(losses[i])),
    )[:count]
    among = torch.zeros(n, dtype=torch.bool)
    among[order] = True
    mean = losses[order].sum() / max(count, 1)
    alone = hardest(Batch(losses, valid), torch.tensor(count))
    assert alone.among.equal(among)
    torch.testing.assert_close(alone.mean, mean, equal_nan=True)
    together = on_threads(world, found)
    assert torch.cat([part.among for part in together]).equal(among)
    for part in together:
        assert part.k == count
        torch.testing.assert_close(part.mean, mean, equal_nan=True)


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize(
    ("losses", "order"),
    [([2.0, -torch.nan, torch.inf, torch.nan], [1, 3, 2, 0]), ([-1.0, -0.0, 0.0, -0.0], [1, 2, 3, 0])],
)
def test_every_nan_is_as_large_and_every_zero(losses: Any, order: list[int], count: int) -> None:
    """Of either sign, and a NaN of any payload."""
    losses = torch.tensor(losses)
    valid = torch.ones(4, dtype=torch.bool)

    def among(ranks: Ranks) -> Tensor:
        mine = slice(2 * ranks.rank, 2 * ranks.rank + 2)
        return hardest(Batch(losses[mine], valid[mine], ranks=ranks), torch.tensor(count)).among

    found = torch.cat(on_threads(2, among))
    assert set(found.nonzero().flatten().tolist()) == set(order[:count])


@pytest.mark.parametrize(
    ("share", "n", "k"),
    [
        (0.05, 20, 1),
        (0.05, 21, 2),
        (0.07, 100, 7),
        (0.29, 100, 29),
        (1.0, 7, 7),
        (0.1, 0, 0),
        (1 / 6, 6, 1),
        (1e-9, 3, 1),
    ],
)
def test_the_number_of_a_share_is_exact(share: float, n: int, k: int) -> None:
    assert tokens_of(share, torch.tensor(n)) == k
    assert most_tokens_of(share, n) == max(k, 1)


@pytest.mark.parametrize(
    ("share", "n", "k"), [(0.1, 0, 0), (0.1, 9, 0), (0.1, 10, 1), (1 / 3, 3, 1), (0.29, 100, 29), (1.0, 7, 7)]
)
def test_the_number_of_whole_tokens_of_a_share_is_exact(share: float, n: int, k: int) -> None:
    assert whole_tokens_of(share, torch.tensor(n)) == k


@pytest.mark.parametrize("numbers", [1, 32, 33, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_the_first_exchange_is_like_any_other(numbers: int, dtype: torch.dtype) -> None:
    x = torch.arange(2 * numbers).view(2, numbers).to(dtype)

    def found(ranks: Ranks) -> list[Tensor]:
        mine = x[ranks.rank]
        ours = [Exchange(ranks, {"a term": "text", "a number": 3}).ranks for _ in range(3)]
        return [ours[0].gather(mine), ours[1].total(mine), ours[2].maximum(mine)]

    for part in on_threads(2, found):
        assert [y.dtype for y in part] == [dtype] * 3
        torch.testing.assert_close(part, [x, x.sum(0), x[1]], rtol=0, atol=0)


def test_ranks_that_differ_get_nan_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a compiled call, which cannot raise an error."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)

    def found(ranks: Ranks) -> list[Tensor]:
        ours = [Exchange(ranks, {"a number": ranks.rank}).ranks for _ in range(2)]
        return [ours[0].total(torch.ones(3)), ours[1].total(torch.ones(3, dtype=torch.int64))]

    for numbers, counts in on_threads(2, found):
        assert numbers.isnan().all()
        assert counts.tolist() == [2, 2, 2]


# Objectives --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@examples(25)
@given(data=st.data())
def test_several_ranks_are_one(name: str, data: st.DataObject) -> None:
    o, t, world = data.draw(objectives(KINDS[name])), data.draw(tokens(junk=False)), data.draw(WORLDS)
    assume(is_exact(o, t.nll[t.valid]))
    shares = data.draw(parts(len(t.nll), world))
    items = t.items.reshape(()) if isinstance(t.items, Tensor) else t.items
    of_all = {name: torch.where(t.valid, x, 0) for name, x in t.given(o).items()}
    nll, entropy = torch.where(t.valid, t.nll, 0), torch.where(t.valid, t.entropy, 0)

    def judge(mine: slice, **ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
        inputs = {name: x[mine] for name, x in of_all.items()}
        batch = Batch(nll[mine], t.valid[mine], items, inputs=inputs, entropy=entropy[mine], **ranks)
        result = o.evaluate(batch)
        of_entropy = result.entropy_weights
        return (
            result.loss,
            torch.where(batch.valid, result.weights(), 0),
            torch.where(batch.valid, 0 if of_entropy is None else of_entropy, 0),
        )

    loss, weights, of_entropy = judge(slice(None))
    together = on_threads(world, lambda ranks: judge(shares[ranks.rank], ranks=ranks))
    for part in together:
        torch.testing.assert_close(part[0], loss, rtol=1e-10, atol=1e-11)
    for i, whole in ((1, weights), (2, of_entropy)):
        torch.testing.assert_close(torch.cat([part[i] for part in together]), whole, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", HUGE_LOSSES)
def test_huge_losses_on_several_ranks(name: str, gradient: Gradient) -> None:
    """Some ranks have only ordinary ones, one has none at all."""
    nll, o = torch.tensor([3.0, 4.0, *HUGE_LOSSES[name]]), NVAMP(gradient=gradient)
    shares = [slice(2), slice(2, 5), slice(5, None), slice(0)]

    def judge(ranks: Ranks) -> tuple[Tensor, Tensor]:
        mine = nll[shares[ranks.rank]]
        result = o.evaluate(Batch(mine, torch.ones_like(mine, dtype=torch.bool), ranks=ranks))
        return result.loss, result.weights().expand_as(mine)

    alone = o.evaluate(Batch(nll.double(), torch.ones_like(nll, dtype=torch.bool)))
    together = on_threads(4, judge)
    for loss, _ in together:
        torch.testing.assert_close(loss, alone.loss, rtol=4e-7, atol=0, check_dtype=False)
    weights = torch.cat([weights for _, weights in together])
    expected = alone.weights().expand_as(nll)
    torch.testing.assert_close(weights, expected, rtol=2e-6, atol=1e-9, check_dtype=False)


# Real processes ----------------------------------------------------------------------------------------

OBJECTIVES: list[Objective] = [
    *(kind() for kind in KINDS.values()),
    NVAMP(gamma=0.5, tail=0.2),
    NVAMP(gamma=0.5, tail=0.2, gradient="token"),
    Tail(share=0.3),
    Tilted(t=-0.7),
    Truncated(share=0.4),
    TokenWeighted(normalize=True),
    ClippedPolicy(kl=0.1, entropy=0.1),
]


def ranks_are_one_process(rank: int, world: int) -> None:
    everyone = dist.group.WORLD
    for seed, o in enumerate(OBJECTIVES):
        for dtype, items in ((torch.float64, None), (torch.float32, torch.tensor(50))):
            g = torch.Generator().manual_seed(seed)
            hidden = torch.randn(40, 6, generator=g, dtype=torch.float64).to(dtype)
            hidden[20:] = hidden[:20]  # the same losses on other ranks
            weight = torch.randn(13, 6, generator=g, dtype=torch.float64).to(dtype)
            labels = torch.randint(13, (40,), generator=g)
            labels[20:] = labels[:20].clone()
            labels[torch.rand(40, generator=g) < 0.2] = -100
            bounds = [0, 5, 17, 18, 40] if world == 4 else [0, 11, 40]
            mine = slice(*bounds[rank : rank + 2])
            if world == 4:
                labels[5:17] = -100  # a rank without tokens
            inputs = fixed(labels).given(o)
            for criterion, x in ((Loss, hidden @ weight.T), (LinearLoss, hidden)):
                rest = () if criterion is Loss else (weight,)
                a, b = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
                alone: Any = criterion(o, shift=False)
                expected = alone(a, *rest, labels, num_items_in_batch=items, **inputs)
                expected.backward()
                own = {name: i[mine] for name, i in inputs.items()}
                among: Any = criterion(o, shift=False, process_group=everyone)
                found = among(b, *rest, labels[mine], num_items_in_batch=items, **own)
                found.backward()
                same = partial(torch.testing.assert_close, msg=lambda m, o=o: f"{o}: {m}")
                same(found, expected)
                same(b.grad / world, a.grad[mine])
    one_rank_that_raises_an_error_leaves_nobody_waiting(rank)


def one_rank_that_raises_an_error_leaves_nobody_waiting(rank: int) -> None:
    for o in OBJECTIVES:
        labels = torch.arange(6)
        inputs: Any = fixed(labels).given(o)
        criterion = Loss(o, shift=False, process_group=dist.group.WORLD)
        if rank == 0:
            with pytest.raises(ValueError, match="labels must be in"):
                criterion(torch.zeros(6, 7), labels + 2, **inputs)
        else:
            loss = criterion(torch.zeros(6, 7), labels, **inputs)
            assert loss.isnan(), o
        assert criterion(torch.zeros(6, 7), labels, **inputs).isfinite(), o  # they are still in step


@pytest.mark.parametrize("world", [2, 4])
def test_real_ranks(world: int, tmp_path: Path) -> None:
    on_ranks(ranks_are_one_process, world, tmp_path)
