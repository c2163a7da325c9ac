"""A batch on several ranks against the same batch in one process: real processes, gloo."""

import copy
from collections.abc import Callable, Iterator
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import nvamp
from nvamp import LinearLoss, LinearNVAMPLoss, Loss, NVAMPLoss
from nvamp.functional import token_nll, token_weights
from nvamp.objectives import GRADIENTS, NVAMP, CrossEntropy, Tail, Tilted
from tests.engine.problems import IGNORED
from tests.ranks import on_ranks

D, V = 6, 19
RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-6}
LOSSES: list[Any] = [NVAMPLoss, LinearNVAMPLoss]
# Large enough that each term of the loss shows.
WEIGHTS: Any = {"alpha": 1.0, "beta": 0.5, "gamma": 0.7}


# What the ranks do -------------------------------------------------------------------------------------


class Model(nn.Module):
    """Hidden states, a head, and a loss on either."""

    def __init__(self, criterion: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(D, D, dtype=dtype)
        self.head = nn.Linear(D, V, bias=False, dtype=dtype)
        self.criterion = criterion

    def forward(self, x: Tensor, labels: Tensor, **options: Any) -> Any:
        hidden = self.body(x).tanh()
        if isinstance(self.criterion, LinearNVAMPLoss):
            return self.criterion(hidden, self.head.weight, labels, **options)
        return self.criterion(3 * self.head(hidden), labels, **options)


def batch(rows: int, seq: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, seq, D, dtype=torch.float64, generator=g).to(dtype)
    return x, torch.randint(V, (rows, seq), generator=g)


def assert_same(a: Tensor, b: Tensor, what: object, slack: float = 1.0) -> None:
    error = float((a - b).norm() / b.norm().clamp(min=1e-12))
    assert error <= slack * RELATIVE[a.dtype], (what, error)


def splits(labels: Tensor, world: int) -> Iterator[tuple[str, Tensor]]:
    """Labels with tokens ignored in several ways, for a batch whose rows go to the ranks in equal parts."""
    yield "all valid", labels
    unequal = labels.clone()
    unequal[1, 2:] = unequal[-1, :4] = IGNORED
    yield "unequal", unequal
    one_without = labels.clone()
    one_without[len(labels) // world * (world - 1) :] = IGNORED
    yield "a rank without", one_without
    yield "none", torch.full_like(labels, IGNORED)


def ddp_is_one_process(rank: int, world: int) -> None:
    group = dist.group.WORLD
    for loss, dtype, gradient, items in product(LOSSES, RELATIVE, GRADIENTS, (None, 57)):
        x, y = batch(2 * world, 7, dtype)
        for kind, labels in splits(y, world):
            case = (loss.__name__, dtype, gradient, items, kind)
            options: Any = {"gradient": gradient, **WEIGHTS}
            alone = Model(loss(**options), dtype)
            alone.criterion.token_metrics = True
            expected, expected_stats = alone(x, labels, num_items_in_batch=items, return_stats=True)
            expected.backward()
            mine = slice(2 * rank, 2 * rank + 2)
            ddp = DistributedDataParallel(Model(loss(**options, process_group=group), dtype))
            ddp.module.criterion.token_metrics = True
            value, stats = ddp(x[mine], labels[mine], num_items_in_batch=items, return_stats=True)
            value.backward()
            assert_same(value.detach(), expected.detach(), case)
            assert stats.min_weight <= stats.max_weight
            assert stats.max_weight.isfinite()  # of a rank without tokens too
            names = "cross_entropy", "mean", "std", "dispersion", "max", "num_tokens", "accuracy", "entropy"
            for name in names:
                assert_same(
                    getattr(stats, name).to(dtype), getattr(expected_stats, name).to(dtype), (*case, name)
                )
            for (name, p), q in zip(ddp.module.named_parameters(), alone.parameters(), strict=True):
                assert p.grad is not None
                assert q.grad is not None
                if gradient == "full" and dtype == torch.float32:  # |ℓ − μ| has a kink, rounding a side of it
                    torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
                else:
                    assert_same(p.grad, q.grad, (*case, name))


def any_split_is_one_process(rank: int, world: int) -> None:
    """Tokens of a batch handed out at random, as sequence and context parallelism may: labels are shifted before."""
    mesh = init_device_mesh("cpu", (world,))
    for seed, gradient in product(range(12), GRADIENTS):
        g = torch.Generator().manual_seed(seed)
        n = int(torch.randint(1, 12 * world, (1,), generator=g))
        x, y = (t[0] for t in batch(1, n, torch.float64, seed))
        y[torch.rand(n, generator=g) < 0.3] = IGNORED
        mine = torch.randint(world, (n,), generator=g) == rank
        logits = (4 * x @ torch.ones(D, V, dtype=torch.float64).cumsum(1).sin()).requires_grad_()
        options: Any = {"gradient": gradient, "shift": False, **WEIGHTS}
        expected = NVAMPLoss(**options)(logits, y)
        (grad,) = torch.autograd.grad(expected, logits)
        value = NVAMPLoss(**options, process_group=mesh)(logits[mine], y[mine])
        (shard,) = torch.autograd.grad(value, logits)
        dist.all_reduce(shard)
        assert_same(value.detach(), expected.detach(), (seed, gradient))
        assert_same(shard / world, grad, (seed, gradient))
        nll, valid = token_nll(logits, y), y != IGNORED
        weights = token_weights(NVAMP(gradient=gradient, **WEIGHTS), nll, valid)
        part = token_weights(NVAMP(gradient=gradient, **WEIGHTS), nll[mine], valid[mine], process_group=mesh)
        assert_same(part, weights[mine], (seed, gradient))


def one_of_equal_maxima_gets_the_penalty(rank: int, world: int) -> None:
    logits = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)  # all losses of all ranks are ln 4
    criterion = NVAMPLoss(0.0, 0.0, 1.0, shift=False, process_group=dist.group.WORLD)
    loss, stats = criterion(logits, torch.zeros(2, dtype=torch.int64), return_stats=True)
    loss.backward()
    assert logits.grad is not None
    assert int(stats.max_index) == (0 if rank == 0 else -1)
    assert bool((logits.grad[0] != 0).all()) == (rank == 0)
    assert not logits.grad[1].any()


def one_rank_may_have_all_of_the_hardest(rank: int, world: int) -> None:
    """Its own share of the tail would be a single token."""
    g = torch.Generator().manual_seed(0)
    hidden, y = torch.randn(100, D, dtype=torch.float64, generator=g), torch.randint(V, (100,), generator=g)
    weight = torch.randn(V, D, dtype=torch.float64, generator=g)
    order = token_nll(hidden @ weight.T, y).argsort(descending=True)
    hidden, y = hidden[order], y[order]
    mine = slice(8) if rank == 0 else slice(8, None) if rank == 1 else slice(0)
    for objective in (NVAMP(gamma=0.7, tail=0.05), Tail(share=0.05, strength=2.0)):
        w = weight.clone().requires_grad_()
        LinearLoss(objective, shift=False)(hidden, w, y).backward()
        part = weight.clone().requires_grad_()
        group = dist.group.WORLD
        LinearLoss(objective, shift=False, process_group=group)(hidden[mine], part, y[mine]).backward()
        assert w.grad is not None
        assert part.grad is not None
        dist.all_reduce(part.grad)
        assert_same(part.grad / world, w.grad, objective)


def a_bad_argument_leaves_nobody_waiting(rank: int, world: int) -> None:
    for loss, dtype in product(LOSSES, RELATIVE):
        x, labels = batch(2, 7, dtype)
        if rank == world - 1:
            labels[1, 3] = V
        model = Model(loss(process_group=dist.group.WORLD), dtype)
        model.criterion.on_stats = lambda stats: None
        model.criterion.token_metrics = True
        if rank == world - 1:
            with pytest.raises(ValueError, match=rf"labels must be in \[0, {V}\)"):
                model(x, labels)
        else:
            assert model(x, labels).isnan()
        labels.clamp_(max=V - 1)
        if rank == world - 1:
            with pytest.raises(ValueError, match="labels must have shape"):
                model(x, labels[:1])
            with pytest.raises(TypeError, match="labels must be int64, int32 or uint8"):
                model(x, labels.double())
            with pytest.raises(ValueError, match="num_items_in_batch must be at least 0"):
                model(x, labels, num_items_in_batch=-1)
        else:
            assert all(model(x, labels).isnan() for _ in range(3))
        # They are still in step.
        assert model(x, labels).isfinite()


def an_error_anywhere_leaves_nobody_waiting(rank: int, world: int) -> None:
    """Even between two exchanges, and even one of the machine; the caller goes on with the next batch."""
    x, labels = torch.randn(2, 7, V, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 7).long()
    for objective, exchanges in ((CrossEntropy(), 1), (NVAMP(gamma=0.1, tail=0.3), 5), (Tilted(), 2)):
        criterion = Loss(objective, process_group=dist.group.WORLD)
        expected = criterion(x, labels)
        for before in range(exchanges + 2):  # two more are for the statistics, or there is no error
            with pytest.MonkeyPatch.context() as patch:
                if rank == world - 1:
                    patch.setattr(dist, "all_reduce", fails_once(dist.all_reduce, before))
                try:
                    loss, stats = criterion(x, labels, return_stats=True)
                except torch.OutOfMemoryError:
                    assert rank == world - 1
                else:
                    numbers = (loss, stats.cross_entropy, stats.dispersion)
                    assert any(n.isnan() for n in numbers) or (isinstance(objective, NVAMP) and before >= 5)
            assert criterion(x, labels) == expected


def fails_once(function: Any, before: int) -> Any:
    """The function, which fails before it has been called so many times."""
    calls = count()

    def called(*args: Any, **kwargs: Any) -> None:
        if next(calls) == before:
            raise torch.OutOfMemoryError
        function(*args, **kwargs)

    return called


def ranks_that_differ_are_told_so(rank: int, world: int) -> None:
    group = dist.group.WORLD
    last = rank == world - 1
    x, labels = torch.randn(2, 7, V), torch.zeros(2, 7).long()

    def refused(match: str, criterion: Any, x: Tensor = x, **options: Any) -> None:
        with pytest.raises(RuntimeError, match=match):
            criterion(x, labels, **options)
        assert Loss(CrossEntropy(), process_group=group)(x.float(), labels).isfinite()  # still in step

    others = [*range(world - 1)] if last else [world - 1]
    refused(
        rf"the objective is {'Tail' if last else 'NVAMP'}.* and another on ranks \[{str(others)[1:-1]}\]",
        Loss(Tail() if last else NVAMP(), process_group=group),
    )
    refused("the objective is", Loss(NVAMP(gamma=0.5 if last else 0.1), process_group=group))
    refused(
        "the dtype is torch.float64" if last else "the dtype is torch.float32",
        Loss(NVAMP(), process_group=group),
        x.double() if last else x,
    )
    refused("return_stats is", Loss(CrossEntropy(), process_group=group), return_stats=last)
    refused(
        f"'softcap': {30.0 if last else 50.0}.* and another on ranks",
        Loss(Tail(), softcap=30.0 if last else 50.0, process_group=group),
    )
    for o in (CrossEntropy(), NVAMP(), Tail(), Tilted()):
        items = {"num_items_in_batch": torch.tensor(7)} if last else {}
        refused("num_items_in_batch is (not )?given here and another", Loss(o, process_group=group), **items)


def ranks_of_different_steps_do_not_mix(rank: int, world: int) -> None:
    x, labels = torch.randn(2, 7, V), torch.zeros(2, 7).long()
    criterion = Loss(CrossEntropy(), process_group=dist.group.WORLD)
    if rank == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "detach", interrupt)
            with pytest.raises(KeyboardInterrupt):
                criterion(x, labels)
    with pytest.raises(RuntimeError, match=r"the number of the call is \[2, 1.*\] on ranks 0 to"):
        criterion(x, labels)


def interrupt(x: Tensor) -> Tensor:
    raise KeyboardInterrupt


def compiled_is_eager(rank: int, world: int) -> None:
    for loss in LOSSES:
        x, labels = batch(2, 7, torch.float32, seed=rank)
        model = Model(loss(process_group=dist.group.WORLD), torch.float32)
        expected = model(x, labels)
        grads = torch.autograd.grad(expected, list(model.parameters()))
        value = torch.compile(model, fullgraph=True, backend="aot_eager")(x, labels)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, list(model.parameters())), grads)


CHECKS = [
    ddp_is_one_process,
    any_split_is_one_process,
    one_of_equal_maxima_gets_the_penalty,
    one_rank_may_have_all_of_the_hardest,
    a_bad_argument_leaves_nobody_waiting,
    an_error_anywhere_leaves_nobody_waiting,
    ranks_that_differ_are_told_so,
    ranks_of_different_steps_do_not_mix,
    compiled_is_eager,
]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_ranks(check: Callable[[int, int], None], world: int, tmp_path: Path) -> None:
    on_ranks(check, world, tmp_path)


# What one process can tell -----------------------------------------------------------------------------


def test_a_group_is_checked_when_it_is_given(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup or a DeviceMesh, got str"):
        NVAMPLoss(process_group="world")  # type: ignore[arg-type]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
        with pytest.raises(
            ValueError, match=r"must be a DeviceMesh of one dimension, got 2 \('data', 'tensor'\)"
        ):
            NVAMPLoss(process_group=mesh)
        assert NVAMPLoss(process_group=mesh["data"])
    finally:
        dist.destroy_process_group()


def test_a_copy_shares_the_group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        criterion = NVAMPLoss(gamma=0.5, process_group=dist.group.WORLD, vocab_group=dist.new_group([0]))
        twin = copy.deepcopy(nn.Sequential(criterion))[0]
        assert twin is not criterion
        assert twin.gamma == 0.5
        assert twin.process_group is criterion.process_group
        assert twin.vocab_group is criterion.vocab_group
        x, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
        assert twin(x, labels) == criterion(x, labels)
        # A vocabulary in parts, one of them here, adds up in another order.
        torch.testing.assert_close(twin(x, labels), nvamp.NVAMPLoss(gamma=0.5)(x, labels))
    finally:
        dist.destroy_process_group()
