"""The integration with the `Trainer` on two ranks, against one process: real processes, gloo."""

import os
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset

from nvamp import LinearNVAMPLoss, NVAMPLoss
from nvamp.integrations.transformers import Criterion, compute_loss_func, loss_function, patch, unpatch
from nvamp.study.models import quiet

WORLD, STEPS, ROWS, SEQ, V = 2, 4, 64, 12, 31
IGNORED = -100
ALL_TERMS = {"alpha": 1.0, "beta": 0.5, "gamma": 0.7}  # large enough that each shows
CROSS_ENTROPY = {"alpha": 0.0, "beta": 1.0, "gamma": 0.0}
# Arguments of a Trainer on a CPU that logs every step and leaves nothing else behind ...
LOGGED: dict[str, Any] = {
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}
# ... and of one that takes plain gradient descent, where the gradient's size shows.
DESCENT = {
    **LOGGED,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}


class Case(NamedTuple):
    """A training on the ranks: its loss, and what of it the processes share."""

    weights: dict[str, float] | None  # of NVAMPLoss; the Trainer's own loss where it is `None`
    grouped: bool = False
    accumulate: int = 1
    unequal: bool = True  # the rows have different numbers of scored tokens
    average: bool = True  # average_tokens_across_devices
    path: str = "compute_loss_func"  # or "patch", or "loss_function"

    def criterion(self, grouped: bool) -> Criterion | None:
        if self.weights is None:
            return None
        return NVAMPLoss(**self.weights, process_group=dist.group.WORLD if grouped else None)


CASES = {
    "nvamp": Case(ALL_TERMS, grouped=True),
    "nvamp, accumulated": Case(ALL_TERMS, grouped=True, accumulate=2),
    "nvamp, own numbers": Case(ALL_TERMS, grouped=True, unequal=False, average=False),
    "grouped cross-entropy, accumulated": Case(CROSS_ENTROPY, grouped=True, accumulate=2),
    "grouped cross-entropy, own numbers": Case(CROSS_ENTROPY, grouped=True, average=False),
    "nvamp, patched": Case(ALL_TERMS, grouped=True, path="patch"),
    "nvamp, patched, accumulated": Case(ALL_TERMS, grouped=True, accumulate=2, path="patch"),
    "nvamp, as loss_function": Case(ALL_TERMS, grouped=True, path="loss_function"),
    "cross-entropy": Case(CROSS_ENTROPY),
    "trainer": Case(None),
    "trainer, own numbers": Case(None, average=False),
    "cross-entropy, own numbers": Case(CROSS_ENTROPY, average=False),
    "cross-entropy, accumulated": Case(CROSS_ENTROPY, accumulate=2),
    "cross-entropy, accumulated, own numbers": Case(CROSS_ENTROPY, accumulate=2, average=False),
    "trainer, accumulated": Case(None, accumulate=2),
    "trainer, accumulated, own numbers": Case(None, accumulate=2, average=False),
}


class Outcome(NamedTuple):
    moved: Tensor  # by how much training changed the model, [parameters]
    logged: Tensor  # the loss of each step, as the Trainer logs it, [STEPS]
    evaluated: float  # eval_loss of the Trainer, after training


class Rows(Dataset[dict[str, Tensor]]):
    """Random tokens, and as labels the same, with some of them ignored where `unequal`."""

    def __init__(self, unequal: bool) -> None:
        g = torch.Generator().manual_seed(0)
        self.inputs = torch.randint(V, (ROWS, SEQ), generator=g)
        kept = torch.randint(2, SEQ + 1, (ROWS,), generator=g) if unequal else torch.full((ROWS,), SEQ)
        self.labels = torch.where(torch.arange(SEQ) < kept[:, None], self.inputs, IGNORED)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.inputs[index], "labels": self.labels[index]}


def trained(case: Case, batch: int, accumulate: int, grouped: bool, folder: Path) -> Outcome:
    """What a Trainer makes of a model; with plain gradient descent, where the gradient's size shows."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        average_tokens_across_devices=case.average,
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if dist.is_initialized() else None,
        **DESCENT,
    )
    model = tiny()
    start = weights_of(model)
    criterion = case.criterion(grouped)
    if case.path == "patch":
        group = dist.group.WORLD if grouped else None
        patch(model, LinearNVAMPLoss(**(case.weights or {}), process_group=group))
    elif case.path == "loss_function" and criterion:
        model.loss_function = loss_function(criterion)
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=Rows(case.unequal),
        eval_dataset=Rows(case.unequal),
        compute_loss_func=compute_loss_func(criterion)
        if criterion and case.path == "compute_loss_func"
        else None,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    # Not before: the Trainer of transformers 5.23 then trains without DDP, each rank a model of its own.
    evaluated = trainer.evaluate()["eval_loss"]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Outcome(weights_of(model) - start, torch.tensor(logged), evaluated)


def tiny() -> Any:
    transformers.set_seed(1)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=SEQ,
        )
    )


def weights_of(model: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def rank_of_all(rank: int, folder: Path) -> None:
    """Every case, on one of the ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # not used: they meet at a file
    quiet()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        outcomes = {
            name: trained(case, 2, case.accumulate, case.grouped, folder)._asdict()
            for name, case in CASES.items()
        }
        torch.save(outcomes, folder / f"{rank}.pt")
        without_a_number_nothing_is_divided()
        a_sharded_model_has_the_gradient_of_the_whole_batch()
    finally:
        dist.destroy_process_group()


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


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    """The outcomes of all cases on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_of_all, (folder,), nprocs=WORLD)  # type: ignore[no-untyped-call]
    saved = [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]
    return [{name: Outcome(**fields) for name, fields in outcomes.items()} for outcomes in saved]


def in_one_process(name: str, folder: Path, accumulate: int | None = None) -> Outcome:
    """The same rows in the same order, in one process with the batches of all ranks."""
    case = CASES[name]
    batch = 2 * WORLD * case.accumulate // (accumulate or case.accumulate)
    quiet()
    return trained(case, batch, accumulate or case.accumulate, False, folder)


def assert_same(a: Tensor, b: Tensor) -> None:
    assert float((a - b).norm() / b.norm()) <= 1e-5


def assert_same_outcome(a: Outcome, b: Outcome) -> None:
    assert len(a.logged) == STEPS
    assert_same(a.moved, b.moved)
    assert_same(a.logged, b.logged)
    assert a.evaluated == pytest.approx(b.evaluated, rel=1e-5)


@pytest.mark.parametrize(
    "name", [*(name for name in CASES if name.startswith("nvamp")), "cross-entropy", "trainer"]
)
def test_two_ranks_are_one_process(name: str, on_ranks: list[dict[str, Outcome]], tmp_path: Path) -> None:
    expected = in_one_process(name, tmp_path)
    for outcomes in on_ranks:
        assert_same_outcome(outcomes[name], expected)


@pytest.mark.parametrize("name", ["nvamp, patched", "nvamp, patched, accumulated", "nvamp, as loss_function"])
def test_every_path_trains_the_same(name: str, on_ranks: list[dict[str, Outcome]]) -> None:
    outcomes = on_ranks[0]
    assert_same_outcome(outcomes[name], outcomes["nvamp, accumulated" if "accumulated" in name else "nvamp"])


def test_micro_batches_of_two_ranks_add_up(on_ranks: list[dict[str, Outcome]], tmp_path: Path) -> None:
    name = "grouped cross-entropy, accumulated"
    whole, parts = in_one_process(name, tmp_path, accumulate=1), on_ranks[0][name]
    assert_same(parts.moved, whole.moved)
    assert_same(parts.logged, whole.logged)


@pytest.mark.parametrize("how", ["", ", own numbers", ", accumulated", ", accumulated, own numbers"])
def test_without_a_group_it_is_the_trainers_own(how: str, on_ranks: list[dict[str, Outcome]]) -> None:
    assert_same_outcome(on_ranks[0]["cross-entropy" + how], on_ranks[0]["trainer" + how])


def test_own_numbers_weigh_ranks_as_the_trainer_does(on_ranks: list[dict[str, Outcome]]) -> None:
    ours, trainers = (
        on_ranks[0][name].moved for name in ("grouped cross-entropy, own numbers", "trainer, own numbers")
    )
    assert_same(ours, trainers)
    shared = on_ranks[0]["trainer"].moved
    assert float((trainers - shared).norm() / shared.norm()) > 0.1  # it is another gradient
