"""A vocabulary or a weight that ranks have in parts, against one process that has it all: real processes, gloo."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel

from nvamp import LinearNVAMPLoss, NVAMPLoss
from nvamp.functional import linear_token_nll, token_nll
from nvamp.objectives import GRADIENTS
from tests.engine.problems import IGNORED, OPTIONS
from tests.ranks import on_ranks
from tests.test_distributed import RELATIVE, WEIGHTS, D, V, assert_same, batch, fails_once

# Every backend with all options is in tests/engine/test_parts.py.
BACKENDS = [("chunked", gradient) for gradient in GRADIENTS] + [("reference", "token"), ("triton", "token")]
TOKENS = (2, 7)


def head(dtype: torch.dtype, v: int = V) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, labels; the same on all ranks."""
    hidden, labels = batch(*TOKENS, dtype)
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(v, D, generator=g, dtype=torch.float64).to(dtype)
    bias = torch.randn(v, generator=g, dtype=torch.float64).to(dtype)
    labels[0, 2:4] = IGNORED
    return hidden, weight, bias, labels.where(labels < v, 0)


def uneven(world: int) -> list[int]:
    """Sizes of the parts of the vocabulary, one of them empty where there are enough."""
    return [V - 4, 4] if world == 2 else [5, 0, 13, 1]


def as_one_process(criterion: nn.Module, *inputs: Tensor, labels: Tensor) -> tuple[Tensor, Any, list[Tensor]]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    args = (*leaves[:2], labels, *leaves[2:]) if len(leaves) > 1 else (leaves[0], labels)
    loss, stats = criterion(*args, return_stats=True)
    return loss.detach(), stats, list(torch.autograd.grad(loss, leaves))


# What the ranks do -------------------------------------------------------------------------------------


def parts_are_one_process(rank: int, world: int) -> None:
    groups = [dist.group.WORLD, init_device_mesh("cpu", (world,))]
    sizes = uneven(world)
    for dtype, (backend, gradient) in product(RELATIVE, BACKENDS):
        hidden, weight, bias, labels = head(dtype)
        options: Any = {"gradient": gradient, "backend": backend, **WEIGHTS, **OPTIONS["all"]}
        sharded: Any = {**options, "vocab_group": groups[gradient == "full"]}
        slack = 100.0 if gradient == "full" and dtype == torch.float32 else 1.0  # |ℓ − μ| has a kink

        logits = F.linear(hidden, weight, bias)
        value, stats, (grad,) = as_one_process(NVAMPLoss(**options), logits, labels=labels)
        mine = as_one_process(NVAMPLoss(**sharded), logits.split(sizes, -1)[rank], labels=labels)
        case = ("logits", dtype, gradient, backend)
        assert_same(mine[0], value, case)
        assert_same(mine[1].std, stats.std, case, slack)
        assert mine[1].max_index == stats.max_index
        assert_same(mine[2][0], grad.split(sizes, -1)[rank], case, slack)

        inputs = hidden, weight, bias
        value, _, grads = as_one_process(LinearNVAMPLoss(**options), *inputs, labels=labels)
        inputs = hidden, weight.split(sizes)[rank], bias.split(sizes)[rank]
        mine = as_one_process(LinearNVAMPLoss(**sharded), *inputs, labels=labels)
        case = ("linear", dtype, gradient, backend)
        assert_same(mine[0], value, case)
        expected = grads[0], grads[1].split(sizes)[rank], grads[2].split(sizes)[rank]
        for x, y in zip(mine[2], expected, strict=True):
            assert_same(x, y, case, slack)


def metrics_are_those_of_one_process(rank: int, world: int) -> None:
    """With a differentiable entropy, from plain tensors and from DTensors."""
    mesh = init_device_mesh("cpu", (world,))
    sizes = uneven(world)

    def results(function: Any, leaves: list[Tensor], *labels: Tensor, **options: Any) -> list[Tensor]:
        nll, metrics = function(
            *leaves[:2], *labels, *leaves[2:], return_metrics=True, mean_logit=True, **options
        )
        grads = torch.autograd.grad((nll - 0.7 * metrics.entropy).sum(), leaves)
        return [*(t.detach() for t in (nll, *metrics)), *grads]

    def part(x: Tensor) -> Tensor:
        """Of logits or of a weight or bias; hidden states are the same on all ranks."""
        dim = [i for i, size in enumerate(x.shape) if size == V]
        return x.split(sizes, dim[0])[rank] if dim else x

    for dtype, backend in product(RELATIVE, ("reference", "chunked")):  # triton is in test_parts.py
        hidden, weight, bias, labels = head(dtype)
        options: Any = {"backend": backend, **OPTIONS["all"]}
        logits = F.linear(hidden, weight, bias)
        for function, whole in ((token_nll, [logits]), (linear_token_nll, [hidden, weight, bias])):
            expected = results(function, [x.clone().requires_grad_() for x in whole], labels, **options)
            mine = [part(x).clone().requires_grad_() for x in whole]
            got = results(function, mine, labels, vocab_group=dist.group.WORLD, **options)
            for i, (x, y) in enumerate(zip(got, expected, strict=True)):
                case = (function, dtype, backend, i)
                if i in (1, 2):  # correct and prediction
                    assert torch.equal(x, y), case
                else:
                    assert_same(x, part(y), case)
        x = distribute_tensor(logits, mesh, [Shard(2)]).requires_grad_()
        expected = results(token_nll, [logits.clone().requires_grad_()], labels, **options)
        got = results(token_nll, [x], labels, **options)
        assert_same(got[3], expected[3], ("DTensor", dtype, backend))
        assert_same(got[-1].full_tensor(), expected[-1], ("DTensor", dtype, backend))


def the_sum_of_hidden_gradients_can_be_left_to_the_caller(rank: int, world: int) -> None:
    hidden, weight, _, labels = head(torch.float64)
    weight = weight.split(uneven(world))[rank]
    grads = []
    for reduce in (True, False):
        h = hidden.clone().requires_grad_()
        loss = linear_token_nll(
            h, weight, labels, vocab_group=dist.group.WORLD, reduce_grad_hidden=reduce
        ).sum()
        grads.append(torch.autograd.grad(loss, h)[0])
    assert (grads[0] - grads[1]).norm() > 0.1 * grads[0].norm()
    dist.all_reduce(grads[1])
    assert_same(grads[1], grads[0], "hidden")


def dtensors_are_one_process(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for dtype, v, gradient in product(RELATIVE, (V, 5), ("scalar", "token")):
        hidden, weight, bias, labels = head(dtype, v)  # of 5 classes 4 ranks have 2, 2, 1 and 0
        options: Any = {"gradient": gradient, **WEIGHTS}
        case = (dtype, v, gradient)
        logits = F.linear(hidden, weight, bias)
        value, _, (grad,) = as_one_process(NVAMPLoss(**options), logits, labels=labels)
        x = distribute_tensor(logits, mesh, [Shard(2)]).requires_grad_()
        for y in (labels, distribute_tensor(labels, mesh, [Replicate()])):
            loss = NVAMPLoss(**options)(x, y)
            assert type(loss) is Tensor
            assert_same(loss.detach(), value, case)
            (got,) = torch.autograd.grad(loss, x)
            assert isinstance(got, DTensor)
            assert got.placements == (Shard(2),)
            assert_same(got.full_tensor(), grad, case)
        inputs = hidden, weight, bias
        value, _, grads = as_one_process(LinearNVAMPLoss(**options), *inputs, labels=labels)
        w, b = (distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (weight, bias))
        h = distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_()
        loss = LinearNVAMPLoss(**options)(h, w, labels, b)
        assert_same(loss.detach(), value, case)
        for x, y in zip(torch.autograd.grad(loss, (h, w, b)), grads, strict=True):
            assert isinstance(x, DTensor)
            assert_same(x.full_tensor(), y, case)
        # Hidden states as plain tensors: that they are the same on all ranks the group says.
        plain = hidden.clone().requires_grad_()
        loss = LinearNVAMPLoss(**options, vocab_group=mesh)(plain, w, labels, b)
        for x, y in zip(torch.autograd.grad(loss, (plain, w, b)), grads, strict=True):
            assert_same(x.full_tensor() if isinstance(x, DTensor) else x, y, case)


def cross_entropy_is_that_of_loss_parallel(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for dtype in RELATIVE:
        hidden, weight, _, labels = head(dtype, 20)
        x = distribute_tensor(hidden @ weight.T, mesh, [Shard(2)]).requires_grad_()
        loss = NVAMPLoss(0.0, 1.0, 0.0, shift=False)(x, labels)
        (grad,) = torch.autograd.grad(loss, x)
        with loss_parallel():
            expected = F.cross_entropy(x.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
            (expected_grad,) = torch.autograd.grad(expected, x)
        assert isinstance(expected, DTensor)
        assert_same(loss.detach(), expected.full_tensor().detach(), dtype)
        assert_same(grad.full_tensor(), expected_grad.full_tensor(), dtype)


def data_and_vocabulary(rank: int, world: int) -> None:
    """Half of the ranks share a vocabulary, each half has other rows of the batch."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "vocabulary"))
    hidden, weight, bias, labels = head(torch.float64)
    rows = slice(mesh["data"].get_local_rank(), None, world // 2)
    part = mesh["vocabulary"].get_local_rank()
    groups: Any = {"process_group": mesh["data"], "vocab_group": mesh["vocabulary"]}
    for gradient in GRADIENTS:
        options: Any = {"gradient": gradient, **WEIGHTS}
        value, _, grads = as_one_process(LinearNVAMPLoss(**options), hidden, weight, bias, labels=labels)
        inputs = hidden[rows], weight.split([12, 7])[part], bias.split([12, 7])[part]
        mine = as_one_process(LinearNVAMPLoss(**options, **groups), *inputs, labels=labels[rows])
        assert_same(mine[0], value, gradient)
        expected = grads[0][rows], grads[1].split([12, 7])[part], grads[2].split([12, 7])[part]
        for i, (x, y) in enumerate(zip(mine[2], expected, strict=True)):
            if i:
                dist.all_reduce(x, group=mesh["data"].get_group())
            assert_same(x / (world // 2), y, (gradient, i))


def dtensors_on_a_mesh_of_data_and_vocabulary(rank: int, world: int) -> None:
    """A batch of three rows in parts of two and one, and 19 classes in parts of 10 and 9."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocabulary"))
    by_rows, of_classes = [Shard(0), Replicate()], [Replicate(), Shard(0)]
    g = torch.Generator().manual_seed(4)
    class_weight = torch.rand(V, generator=g, dtype=torch.float64)
    results: Any = {"return_metrics": True, "mean_logit": True}

    def scalar(nll: Tensor, metrics: Any) -> Tensor:
        return nll.square().sum() - 0.7 * metrics.entropy.sum()

    def local(x: Tensor) -> Tensor:
        return distribute_tensor(x.detach(), mesh, by_rows).to_local()

    for dtype, backend in product(RELATIVE, ("reference", "chunked", "triton")):
        hidden, labels = batch(3, 7, dtype)
        _, weight, bias, _ = head(dtype)
        labels[0, 2:4] = IGNORED
        y = distribute_tensor(labels, mesh, by_rows)
        paths: Any = {
            token_nll: {F.linear(hidden, weight, bias): [Shard(0), Shard(2)]},
            linear_token_nll: {hidden: by_rows, weight: of_classes, bias: of_classes},
        }
        for (function, placed), more in product(paths.items(), ({}, {"class_weight": class_weight})):
            options: Any = {"backend": backend, **OPTIONS["all"], **more, **results}
            whole = [x.detach().double().requires_grad_() for x in placed]
            nll, metrics = function(*whole[:2], labels, *whole[2:], **options | {"backend": "reference"})
            expected = torch.autograd.grad(scalar(nll, metrics), whole)
            mine = [distribute_tensor(x.detach(), mesh, p).requires_grad_() for x, p in placed.items()]
            with CommDebugMode() as forward:
                got, got_metrics = function(*mine[:2], y, *mine[2:], **options)
            assert forward.get_total_counts() == 4
            case = (function, dtype, backend)
            assert_same(got.detach(), local(nll).to(dtype), case)
            for name, x, truth in zip(metrics._fields, got_metrics, metrics, strict=True):
                if x.is_floating_point():
                    assert_same(x.detach(), local(truth).to(dtype), (*case, name))
                else:
                    assert torch.equal(x, local(truth)), (*case, name)
            grads = torch.autograd.grad(scalar(got, got_metrics), mine)
            for x, truth in zip(grads, expected, strict=True):
                assert isinstance(x, DTensor)
                assert_same(x.full_tensor(), truth.to(dtype), case, slack=10)


def losses_on_a_mesh_of_data_and_vocabulary(rank: int, world: int) -> None:
    """The loss of the whole batch and its gradient, as it is: nothing takes a mean over the ranks."""
    mesh = init_device_mesh("cpu", (2, 2))
    by_rows, of_classes = [Shard(0), Replicate()], [Replicate(), Shard(0)]
    hidden, labels = batch(3, 7, torch.float64)
    _, weight, bias, _ = head(torch.float64)
    logits, y = F.linear(hidden, weight, bias), distribute_tensor(labels, mesh, by_rows)
    for gradient in GRADIENTS:
        options: Any = {"gradient": gradient, **WEIGHTS}
        for whole, placements in (
            ([logits], [[Shard(0), Shard(2)]]),
            ([hidden, weight, bias], [by_rows, of_classes, of_classes]),
        ):
            loss: Any = NVAMPLoss(**options) if len(whole) == 1 else LinearNVAMPLoss(**options)
            value, _, grads = as_one_process(loss, *whole, labels=labels)
            mine = [
                distribute_tensor(x, mesh, p).requires_grad_() for x, p in zip(whole, placements, strict=True)
            ]
            got = loss(*mine[:2], y, *mine[2:])
            assert_same(got.detach(), value, gradient)
            for x, truth in zip(torch.autograd.grad(got, mine), grads, strict=True):
                assert_same(x.full_tensor(), truth, (gradient, len(whole)))
    # Rows alone: each rank has the whole vocabulary, and one pass gives part of the gradient of the weight.
    h = distribute_tensor(hidden, mesh, by_rows).requires_grad_()
    w = distribute_tensor(weight, mesh, [Replicate(), Replicate()]).requires_grad_()
    value, _, grads = as_one_process(LinearNVAMPLoss(**WEIGHTS), hidden, weight, labels=labels)
    got = LinearNVAMPLoss(**WEIGHTS)(h, w, y)
    assert_same(got.detach(), value, "rows")
    for x, truth in zip(torch.autograd.grad(got, (h, w)), grads, strict=True):
        assert_same(x.full_tensor(), truth, "rows")


def collectives_are_those_documented(rank: int, world: int) -> None:
    hidden, weight, bias, labels = head(torch.float32)
    sizes = uneven(world)
    group: Any = {"vocab_group": dist.group.WORLD}
    inputs = [hidden, weight.split(sizes)[rank], bias.split(sizes)[rank]]
    h, w, b = (x.clone().requires_grad_() for x in inputs)
    x = F.linear(hidden, weight, bias).split(sizes, -1)[rank].clone().requires_grad_()

    def with_entropy(nll: Tensor, metrics: Any) -> Tensor:
        return nll + metrics.entropy

    metrics: Any = {"return_metrics": True, **group}
    for loss, there, backward in (
        (lambda: token_nll(x, labels, **group), 3, 0),
        (lambda: with_entropy(*token_nll(x, labels, **metrics)), 4, 0),
        (lambda: linear_token_nll(h, w, labels, b, **group), 3, 1),
        (lambda: with_entropy(*linear_token_nll(h, w, labels, b, **metrics)), 4, 1),
        (lambda: linear_token_nll(h, w, labels, b, reduce_grad_hidden=False, **group), 3, 0),
    ):
        with CommDebugMode() as forward:
            nll = loss()
        with CommDebugMode() as back:
            nll.sum().backward()
        assert forward.get_total_counts() == there
        assert back.get_total_counts() == backward


def ranks_that_differ_are_told_so(rank: int, world: int) -> None:
    """Gloo would abort the process."""
    hidden, weight, _, labels = head(torch.float32)
    logits, last = hidden @ weight.T, rank == world - 1

    def refused(match: str, x: Tensor = logits, y: Tensor = labels, **options: Any) -> None:
        for compute in (
            lambda: token_nll(x, y, vocab_group=dist.group.WORLD, **options),
            lambda: linear_token_nll(x, torch.eye(V).to(x), y, vocab_group=dist.group.WORLD, **options),
        ):
            with pytest.raises(RuntimeError, match=match):
                compute()
        assert token_nll(logits, labels, vocab_group=dist.group.WORLD).isfinite().all()  # still in step

    few = slice(None, 6) if last else slice(None)
    refused(r"the number of tokens is \[14, .*12\] on ranks 0 to", logits[:, few], labels[:, few])
    refused("the dtype is torch.float", logits.double() if last else logits)
    refused("options is .*label_smoothing=0.[12]", label_smoothing=0.1 if last else 0.2)
    refused("options is .*return_metrics=", return_metrics=last)


def an_error_anywhere_leaves_nobody_waiting(rank: int, world: int) -> None:
    hidden, weight, _, labels = head(torch.float32)
    logits = hidden @ weight.T
    for metrics, before in product((False, True), range(4)):
        options: Any = {"return_metrics": metrics, "vocab_group": dist.group.WORLD, "label_smoothing": 0.1}
        fails = before < 3 + metrics
        with pytest.MonkeyPatch.context() as patch:
            if rank == world - 1:
                patch.setattr(dist, "all_reduce", fails_once(dist.all_reduce, before))
            try:
                found = token_nll(logits, labels, **options)
            except torch.OutOfMemoryError:
                assert rank == world - 1
            else:
                nll = found[0] if metrics else found
                assert nll[labels != IGNORED].isnan().all() == (fails and before < 3)
        assert token_nll(logits, labels, vocab_group=dist.group.WORLD).isfinite().all()


def compiled_is_eager(rank: int, world: int) -> None:
    hidden, weight, bias, labels = head(torch.float32)
    sizes = uneven(world)
    inputs = [x.split(sizes)[rank] for x in (weight, bias)]
    logits = F.linear(hidden, weight, bias).split(sizes, -1)[rank]
    group: Any = {"gradient": "token", "vocab_group": dist.group.WORLD, **WEIGHTS}
    for criterion, args in (
        (NVAMPLoss(**group), (logits,)),
        (LinearNVAMPLoss(**group), (hidden, *inputs)),
    ):
        expected = as_one_process(criterion, *args, labels=labels)
        compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
        got = as_one_process(compiled, *args, labels=labels)
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[2], expected[2])


def a_bad_label_is_an_error_on_all_ranks(rank: int, world: int) -> None:
    hidden, weight, _, labels = head(torch.float32)
    labels[1, 3] = V
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"labels must be in \[0, {V}\) for a vocabulary of {V}"):
            NVAMPLoss(vocab_group=dist.group.WORLD)(
                (hidden @ weight.T).split(uneven(world), -1)[rank], labels
            )


def what_does_not_fit_is_refused(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    hidden, weight, _, labels = head(torch.float32, 20)
    x = distribute_tensor(hidden @ weight.T, mesh, [Shard(2)])
    with pytest.raises(ValueError, match="vocab_group must be None if logits are a DTensor"):
        token_nll(x, labels, vocab_group=mesh)
    several = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("a", "b"))
    for wrong in (
        x.redistribute(placements=[Shard(1)]),
        distribute_tensor(hidden @ weight.T, several, [Shard(2), Shard(2)]),
    ):
        with pytest.raises(
            ValueError, match=r"logits must be replicated, or Shard\(2\) and Shard\(0\) over one"
        ):
            token_nll(wrong, labels)
    by_rows = x.redistribute(placements=[Shard(0)])
    with pytest.raises(TypeError, match="labels must be a DTensor, sharded as logits over the batch"):
        token_nll(by_rows, labels)
    with pytest.raises(
        ValueError, match=r"labels must be Shard\(dim=0\) on the mesh of logits, got Replicate"
    ):
        token_nll(by_rows, distribute_tensor(labels, mesh, [Replicate()]))
    with pytest.raises(
        ValueError, match="process_group must be None if logits is a DTensor sharded over the"
    ):
        NVAMPLoss(process_group=mesh)(by_rows, distribute_tensor(labels, mesh, [Shard(0)]))
    h, w = (distribute_tensor(t, mesh, [Replicate()]) for t in (hidden, weight))
    with pytest.raises(TypeError, match="weight must be a DTensor if hidden is one"):
        linear_token_nll(h, weight, labels)
    with pytest.raises(ValueError, match=r"hidden must be replicated, or Shard\(0\) over one"):
        linear_token_nll(h.redistribute(placements=[Shard(1)]), w, labels)
    of_classes = w.redistribute(placements=[Shard(0)])
    with pytest.raises(ValueError, match="weight must be on the mesh of hidden and replicated where that is"):
        linear_token_nll(h.redistribute(placements=[Shard(0)]), of_classes, labels)
    with pytest.raises(ValueError, match=r"weight must be replicated, or Shard\(0\)"):
        linear_token_nll(h, w.redistribute(placements=[Shard(1)]), labels)


class Model(nn.Module):
    """A body, and a head that may be the embedding; the loss is taken inside or outside."""

    def __init__(self, criterion: nn.Module, tied: bool, inside: bool, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(V, D, dtype=dtype)
        self.body = nn.Linear(D, D, dtype=dtype)
        self.head = nn.Linear(D, V, bias=not tied, dtype=dtype)
        if tied:
            self.head.weight = self.embedding.weight
        self.criterion, self.inside = criterion, inside

    def forward(self, tokens: Tensor) -> Any:
        hidden = self.body(self.embedding(tokens)).tanh()
        return self.loss(hidden, tokens) if self.inside else hidden

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.criterion(hidden, self.head.weight, labels, self.head.bias)
        return loss


def fsdp_is_one_process(rank: int, world: int) -> None:
    tokens = batch(2 * world, 7, torch.float32)[1]
    mine = tokens[2 * rank : 2 * rank + 2]
    for gradient, dtype, tied, inside, apart, compile in (
        ("scalar", torch.float64, False, True, False, False),
        ("token", torch.float64, False, False, True, False),
        ("scalar", torch.float64, False, False, True, False),
        ("scalar", torch.float32, True, True, False, False),
        ("token", torch.float64, True, False, False, False),
        ("scalar", torch.float32, False, True, False, True),
    ):
        case = (gradient, dtype, tied, inside, apart, compile)
        options: Any = {"gradient": gradient, **WEIGHTS}
        alone = Model(LinearNVAMPLoss(**options), tied, True, dtype)
        expected = alone(tokens)
        expected.backward()
        model = Model(LinearNVAMPLoss(**options, process_group=dist.group.WORLD), tied, inside, dtype)
        fully_shard(model.body)
        if apart:
            fully_shard(model.head)  # its weight is a part whenever its own forward does not run
        fully_shard(model)
        assert isinstance(model, FSDPModule)
        run = torch.compile(model, backend="aot_eager") if compile else model
        gathers = CommDebugMode()
        with gathers:
            loss = run(mine)
            if not inside:
                loss = model.loss(loss, mine)
            loss.backward()
        assert_same(loss.detach(), expected.detach(), case)
        for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert isinstance(p.grad, DTensor), (name, case)
            assert q.grad is not None
            assert_same(p.grad.full_tensor(), q.grad, (name, *case))
        if apart:  # once by FSDP for its own forward? no: it never runs. Weight and bias, by the loss
            counts = {str(op): n for op, n in gathers.get_comm_counts().items()}
            # Before 2.13 PyTorch may gather a gradient of uneven parts to add it to none.
            adding = (0, 2) if torch.__version__ < "2.13" else (0,)
            assert sum(n for op, n in counts.items() if "all_gather_into_tensor" in op) - 2 in adding, counts


def vocabulary(rank: int, world: int) -> None:
    parts_are_one_process(rank, world)
    metrics_are_those_of_one_process(rank, world)
    the_sum_of_hidden_gradients_can_be_left_to_the_caller(rank, world)
    collectives_are_those_documented(rank, world)
    a_bad_label_is_an_error_on_all_ranks(rank, world)
    compiled_is_eager(rank, world)
    if world == 4:
        data_and_vocabulary(rank, world)


def out_of_step(rank: int, world: int) -> None:
    ranks_that_differ_are_told_so(rank, world)
    an_error_anywhere_leaves_nobody_waiting(rank, world)


def dtensors(rank: int, world: int) -> None:
    dtensors_are_one_process(rank, world)
    if world == 4:
        dtensors_on_a_mesh_of_data_and_vocabulary(rank, world)
        losses_on_a_mesh_of_data_and_vocabulary(rank, world)
    cross_entropy_is_that_of_loss_parallel(rank, world)
    what_does_not_fit_is_refused(rank, world)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "check", [vocabulary, out_of_step, dtensors, fsdp_is_one_process], ids=lambda check: check.__name__
)
def test_ranks(check: Callable[[int, int], None], world: int, tmp_path: Path) -> None:
    on_ranks(check, world, tmp_path)
