"""The integration with the `Trainer` on two ranks, against one process: real processes, gloo."""

from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from nvamp import LinearLoss, LinearNVAMPLoss, Loss, NVAMPLoss
from nvamp.integrations.transformers import Criterion, compute_loss_func, loss_function, patch, unpatch
from nvamp.objectives import parse
from nvamp.study.models import quiet
from tests.integrations.tiny import (
    DESCENT,
    SEQ,
    Rows,
    V,
    assert_same,
    logged_losses,
    tiny,
    trainer_of,
    weights_of,
)
from tests.ranks import on_ranks

WORLD, STEPS = 2, 4


class Case(NamedTuple):
    """A training on the ranks: its loss, and what of it the processes share."""

    objective: str | None  # as a text; `None` for the Trainer's own loss
    grouped: bool = False
    accumulate: int = 1
    unequal: bool = True  # the rows have different numbers of scored tokens
    average: bool = True  # average_tokens_across_devices
    path: str = "compute_loss_func"  # or "patch", or "loss_function"

    def criterion(self, grouped: bool) -> Criterion | None:
        if self.objective is None:
            return None
        group = dist.group.WORLD if grouped else None
        kind = LinearLoss if self.path == "patch" else Loss
        return kind(parse(self.objective), process_group=group)


NVAMP = "nvamp:beta=0.5,gamma=0.7"  # large enough that each term shows
CASES = {
    "nvamp": Case(NVAMP, grouped=True),
    "nvamp, accumulated": Case(NVAMP, grouped=True, accumulate=2),
    "nvamp, own numbers": Case(NVAMP, grouped=True, unequal=False, average=False),
    "grouped cross-entropy, accumulated": Case("ce", grouped=True, accumulate=2),
    "grouped cross-entropy, own numbers": Case("ce", grouped=True, average=False),
    "nvamp, patched": Case(NVAMP, grouped=True, path="patch"),
    "nvamp, patched, accumulated": Case(NVAMP, grouped=True, accumulate=2, path="patch"),
    "nvamp, as loss_function": Case(NVAMP, grouped=True, path="loss_function"),
    "tail": Case("tail:share=0.2", grouped=True, accumulate=2),
    "weights of tokens, patched": Case("token_weighted", accumulate=2, path="patch"),
    "weights of tokens, as loss_function": Case("token_weighted", grouped=True, path="loss_function"),
    "normalized weights, patched": Case("token_weighted:normalize=true", grouped=True, path="patch"),
    "cross-entropy": Case("ce"),
    "trainer": Case(None),
    "trainer, own numbers": Case(None, average=False),
    "cross-entropy, own numbers": Case("ce", average=False),
    "cross-entropy, accumulated": Case("ce", accumulate=2),
    "cross-entropy, accumulated, own numbers": Case("ce", accumulate=2, average=False),
    "trainer, accumulated": Case(None, accumulate=2),
    "trainer, accumulated, own numbers": Case(None, accumulate=2, average=False),
}


class Outcome(NamedTuple):
    moved: Tensor  # by how much training changed the model, [parameters]
    logged: Tensor  # the loss of each step, as the Trainer logs it, [STEPS]
    evaluated: float  # eval_loss of the Trainer, after training


def trained(case: Case, batch: int, accumulate: int, grouped: bool, folder: Path) -> Outcome:
    """What a Trainer makes of a model; with plain gradient descent, where the gradient's size shows."""
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "average_tokens_across_devices": case.average,
        "ddp_find_unused_parameters": False,
        "ddp_backend": "gloo" if dist.is_initialized() else None,
        "remove_unused_columns": False,
        **DESCENT,
    }
    model = tiny()
    start = weights_of(model)
    criterion, by_trainer = case.criterion(grouped), None
    if isinstance(criterion, LinearLoss):
        patch(model, criterion)
    elif criterion and case.path == "loss_function":
        model.loss_function = loss_function(criterion, model)
    elif criterion:
        by_trainer = compute_loss_func(criterion)
    rows = Rows(case.unequal, weighted="weight" in (case.objective or ""))
    trainer = trainer_of(model, rows, folder, arguments, eval_dataset=rows, compute_loss_func=by_trainer)
    trainer.train()
    # Not before: the Trainer of transformers 5.23 then trains without DDP, each rank a model of its own.
    evaluated = trainer.evaluate()["eval_loss"]
    return Outcome(weights_of(model) - start, logged_losses(trainer), evaluated)


def every_case(rank: int, world: int, folder: Path) -> dict[str, Outcome]:
    """What one of the ranks does."""
    quiet()
    outcomes = {name: trained(case, 2, case.accumulate, case.grouped, folder) for name, case in CASES.items()}
    without_a_number_nothing_is_divided()
    a_sharded_model_has_the_gradient_of_the_whole_batch()
    a_model_in_fsdp1_is_patched_and_restored()
    return outcomes


def without_a_number_nothing_is_divided() -> None:
    g = torch.Generator().manual_seed(dist.get_rank())
    logits, labels = torch.randn(2, SEQ, V, generator=g), torch.randint(V, (2, SEQ), generator=g)
    criterion = NVAMPLoss(process_group=dist.group.WORLD)
    assert compute_loss_func(criterion)({"logits": logits}, labels) == criterion(logits, labels)


def a_sharded_model_has_the_gradient_of_the_whole_batch() -> None:
    """FSDP2, with the output layer in the root's unit or one of its own, and patched before or after."""
    criterion = LinearNVAMPLoss(process_group=dist.group.WORLD)
    g = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randint(V, (2, SEQ), generator=g)
    alone = tiny()
    NVAMPLoss(process_group=dist.group.WORLD)(alone(tokens).logits, tokens).backward()
    for weight in alone.parameters():
        dist.all_reduce(weight.grad)
    for first, apart in product((True, False), repeat=2):
        model = tiny()
        if first:
            patch(model, criterion)
        for part in (*model.model.layers, *([model.lm_head] if apart else []), model):
            fully_shard(part)
        if not first:
            patch(model, criterion)
        outputs = model(input_ids=tokens, labels=tokens)
        outputs.loss.backward()
        assert outputs.logits is None
        if first:
            with pytest.raises(TypeError, match="FSDPLlamaForCausalLM is sharded: unpatch a model before"):
                unpatch(model)
        for weight, expected in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(weight.grad.full_tensor(), expected.grad / WORLD)


def a_model_in_fsdp1_is_patched_and_restored() -> None:
    """Its wrapper shows the attributes of the model as its own."""
    tokens = torch.arange(SEQ)[None]
    own = float(tiny()(input_ids=tokens, labels=tokens).loss.detach())
    for first in (True, False):
        model = tiny()
        if first:
            patch(model, LinearNVAMPLoss())
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        if not first:
            patch(wrapped, LinearNVAMPLoss())
        assert wrapped(input_ids=tokens, labels=tokens).logits is None
        unpatch(wrapped)
        outputs = wrapped(input_ids=tokens, labels=tokens)
        assert float(outputs.loss.detach()) == pytest.approx(own)
        assert outputs.logits is not None


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    """The outcomes of all cases on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(partial(every_case, folder=folder), WORLD, folder)


def in_one_process(name: str, folder: Path, accumulate: int | None = None) -> Outcome:
    """The same rows in the same order, in one process with the batches of all ranks."""
    case = CASES[name]
    batch = 2 * WORLD * case.accumulate // (accumulate or case.accumulate)
    quiet()
    return trained(case, batch, accumulate or case.accumulate, False, folder)


def assert_same_outcome(a: Outcome, b: Outcome) -> None:
    assert len(a.logged) == STEPS
    assert_same(a.moved, b.moved)
    assert_same(a.logged, b.logged)
    assert a.evaluated == pytest.approx(b.evaluated, rel=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in CASES if name.startswith(("nvamp", "tail")) or "weights" in name),
        "cross-entropy",
        "trainer",
    ],
)
def test_two_ranks_are_one_process(name: str, of_ranks: list[dict[str, Outcome]], tmp_path: Path) -> None:
    expected = in_one_process(name, tmp_path)
    for outcomes in of_ranks:
        assert_same_outcome(outcomes[name], expected)


@pytest.mark.parametrize("name", ["nvamp, patched", "nvamp, patched, accumulated", "nvamp, as loss_function"])
def test_every_path_trains_the_same(name: str, of_ranks: list[dict[str, Outcome]]) -> None:
    outcomes = of_ranks[0]
    assert_same_outcome(outcomes[name], outcomes["nvamp, accumulated" if "accumulated" in name else "nvamp"])


def test_micro_batches_of_two_ranks_add_up(of_ranks: list[dict[str, Outcome]], tmp_path: Path) -> None:
    name = "grouped cross-entropy, accumulated"
    whole, parts = in_one_process(name, tmp_path, accumulate=1), of_ranks[0][name]
    assert_same(parts.moved, whole.moved)
    assert_same(parts.logged, whole.logged)


@pytest.mark.parametrize("how", ["", ", own numbers", ", accumulated", ", accumulated, own numbers"])
def test_without_a_group_it_is_the_trainers_own(how: str, of_ranks: list[dict[str, Outcome]]) -> None:
    assert_same_outcome(of_ranks[0]["cross-entropy" + how], of_ranks[0]["trainer" + how])


def test_own_numbers_weigh_ranks_as_the_trainer_does(of_ranks: list[dict[str, Outcome]]) -> None:
    ours, trainers = (
        of_ranks[0][name].moved for name in ("grouped cross-entropy, own numbers", "trainer, own numbers")
    )
    assert_same(ours, trainers)
    shared = of_ranks[0]["trainer"].moved
    assert float((trainers - shared).norm() / shared.norm()) > 0.1  # it is another gradient
