"""The example for Accelerate; and on two ranks Accelerate, TRL, torchtitan's loss and logs, against one process."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import trl
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, PrinterCallback

from examples import accelerate_loop
from nvamp import Loss, NVAMPLoss, TokenLoss
from nvamp.functional import nvamp_loss
from nvamp.integrations.stats import log_stats
from nvamp.integrations.transformers import compute_loss_func
from nvamp.integrations.trl import SFTTrainer
from nvamp.objectives import DFT, NVAMP, CrossEntropy, Objective, Tail
from nvamp.study.models import quiet
from tests.integrations.tiny import (
    ALL_TERMS,
    DESCENT,
    IGNORED,
    LOGGED,
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

WORLD, STEPS = 2, 3
OBJECTIVES = (NVAMP(**ALL_TERMS), Tail(share=0.2))
TITAN = "nvamp:alpha=1,beta=0.5,gamma=0.7,gradient=token"  # ALL_TERMS


def forget_accelerators() -> None:
    """Accelerate keeps its settings for the whole process, and so does the next test's Trainer."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()


def looped(criterion: Loss, accumulate: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """By how much the example's loop moves the tiny model, and the losses that it yields."""
    forget_accelerators()
    monkeypatch.setattr(accelerate_loop, "MICRO_BATCH", 8 // accumulate)
    accelerator = Accelerator(
        gradient_accumulation_steps=accumulate,
        cpu=True,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    model = tiny()
    start = weights_of(model)
    blocks = torch.randint(V, (64, SEQ), generator=torch.Generator().manual_seed(0))
    curve = accelerate_loop.train(
        accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1), blocks, criterion, STEPS
    )
    losses = torch.stack([loss for loss, _ in curve])
    forget_accelerators()
    return weights_of(model) - start, losses


class Own(Loss):
    """What transformers computes of the same logits."""

    def forward(self, logits: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        return tiny().loss_function(logits, labels, V, **kwargs)


class OwnDFT(Loss):
    def forward(self, logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
        return ((-nll).exp().detach() * nll).sum() / num_items_in_batch


@pytest.mark.parametrize(("objective", "own"), [(CrossEntropy(), Own), (DFT(), OwnDFT)])
def test_a_sum_over_tokens_is_the_one_by_hand(
    objective: Objective, own: type[Loss], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any number of micro-batches, in the loader's order."""
    moved, losses = looped(Loss(objective), 1, monkeypatch)
    for accumulate in (2, 4):
        assert_same(looped(Loss(objective), accumulate, monkeypatch)[0], moved)
    expected, expected_losses = looped(own(objective), 1, monkeypatch)
    assert_same(moved, expected)
    assert_same(losses, expected_losses)


# Two ranks -----------------------------------------------------------------------------------------------


def every_loop(rank: int, world: int, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """What one of the ranks does."""
    quiet()
    with pytest.MonkeyPatch.context() as monkeypatch:
        outcome = {
            f"accelerate, {objective}": looped(
                Loss(objective, process_group=dist.group.WORLD), 2, monkeypatch
            )
            for objective in OBJECTIVES
        }
    outcome["stats"] = logged_stats(NVAMPLoss(), 2, 1, folder)
    outcome["stats of a group"] = logged_stats(NVAMPLoss(process_group=dist.group.WORLD), 2, 1, folder)
    for objective in OBJECTIVES:
        criterion = TokenLoss(objective, process_group=dist.group.WORLD)
        outcome[f"trl, {objective}"] = with_trl(criterion, 2, folder)
    if sys.version_info >= (3, 11):
        outcome |= {"sharded rows": titan_rows(), "sharded vocabulary": titan_vocabulary()}
    return outcome


def logged_stats(criterion: NVAMPLoss, batch: int, accumulate: int, folder: Path) -> tuple[Tensor, Tensor]:
    """What `log_stats` logs of each step, [STEPS, 4]; and the share of the hardest, [STEPS]."""
    forget_accelerators()
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "ddp_backend": "gloo" if dist.is_initialized() else None,
        **LOGGED,
    }
    loss = compute_loss_func(criterion)
    trainer = trainer_of(tiny(), Rows(unequal=True), folder, arguments, compute_loss_func=loss)
    log_stats(trainer, criterion)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    forget_accelerators()
    names = ("cross_entropy", "dispersion", "std", "max")
    table = torch.tensor([[entry[f"nvamp_{name}"] for name in names] for entry in logs])
    return table, torch.tensor([entry["nvamp_hardest_share"] for entry in logs])


def with_trl(criterion: TokenLoss, batch: int, folder: Path) -> tuple[Tensor, Tensor]:
    """By how much TRL's trainer moves the tiny model, and the losses that it logs."""
    forget_accelerators()
    model = tiny()
    start = weights_of(model)
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        bf16=False,
        ddp_backend="gloo" if dist.is_initialized() else None,
        **DESCENT,
    )
    blocks = torch.randint(V, (64, SEQ), generator=torch.Generator().manual_seed(0)).tolist()
    labels = [
        block[: 3 + i % (SEQ - 2)] for i, block in enumerate(blocks)
    ]  # unequal numbers of scored tokens
    rows = {"input_ids": blocks, "labels": [row + [IGNORED] * (SEQ - len(row)) for row in labels]}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<eos>": 0})), eos_token="<eos>"
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        criterion=criterion,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    forget_accelerators()
    return weights_of(model) - start, logged_losses(trainer)


def titan_problem() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (4, SEQ), generator=g)
    labels[0, 3:] = IGNORED
    return torch.randn(4, SEQ, V, generator=g).requires_grad_(), labels


def titan_loss() -> Any:
    from nvamp.integrations import torchtitan

    return torchtitan.TitanLoss.Config(loss=TITAN).build(compile_config=None)


def titan_rows() -> tuple[Tensor, Tensor]:
    """The part of this rank in loss and gradient, which torchtitan sums: the rows of the other are the other's."""
    logits, labels = titan_problem()
    loss_fn = titan_loss()
    loss_fn.criterion.process_group = dist.group.WORLD
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    loss, _ = loss_fn(logits[mine], labels[mine], (labels != IGNORED).sum())
    loss.backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def titan_vocabulary() -> tuple[Tensor, Tensor]:
    """Loss and gradient of logits of which each rank has a part of the vocabulary: tensor parallel."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    logits, labels = titan_problem()
    mesh = init_device_mesh("cpu", (WORLD,))
    sharded: Any = distribute_tensor(logits.detach(), mesh, [Shard(2)]).requires_grad_()
    loss, _ = titan_loss()(sharded, labels, (labels != IGNORED).sum())
    loss.backward()
    return loss.detach(), sharded.grad.full_tensor()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[Tensor, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(partial(every_loop, folder=folder), WORLD, folder)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_accelerate_on_two_ranks_is_one_process(
    objective: Objective, of_ranks: list[dict[str, tuple[Tensor, Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved, losses = looped(Loss(objective), 2, monkeypatch)
    for outcome in of_ranks:
        assert_same(outcome[f"accelerate, {objective}"][0], moved)
        assert_same(outcome[f"accelerate, {objective}"][1], losses)


def test_statistics_of_two_ranks(of_ranks: list[dict[str, tuple[Tensor, Tensor]]], tmp_path: Path) -> None:
    """Of a group they are those of one process; without one, those of its two micro-batches."""
    whole, _ = logged_stats(NVAMPLoss(), 2 * WORLD, 1, tmp_path)
    halves, share = logged_stats(NVAMPLoss(), 2, WORLD, tmp_path)
    assert whole.shape == (STEPS, 4)
    assert not torch.allclose(whole, halves, rtol=1e-3)  # else nothing is told
    for outcome in of_ranks:
        torch.testing.assert_close(outcome["stats of a group"][0], whole, rtol=1e-5, atol=0)
        torch.testing.assert_close(outcome["stats"], (halves, share), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_trl_on_two_ranks_is_one_process(
    objective: Objective, of_ranks: list[dict[str, tuple[Tensor, Tensor]]], tmp_path: Path
) -> None:
    moved, losses = with_trl(TokenLoss(objective), 2 * WORLD, tmp_path)
    assert len(losses) == STEPS
    for outcome in of_ranks:
        assert_same(outcome[f"trl, {objective}"][0], moved)
        assert_same(outcome[f"trl, {objective}"][1], losses)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="torchtitan needs Python 3.11")
def test_torchtitan_on_two_ranks(of_ranks: list[dict[str, tuple[Tensor, Tensor]]]) -> None:
    logits, labels = titan_problem()
    loss = nvamp_loss(logits, labels, shift=False, **ALL_TERMS, gradient="token")
    (gradient,) = torch.autograd.grad(loss, logits)
    parts = [outcome["sharded rows"] for outcome in of_ranks]
    torch.testing.assert_close(sum(value for value, _ in parts), loss.detach())
    torch.testing.assert_close(sum(part for _, part in parts), gradient)
    for outcome in of_ranks:
        torch.testing.assert_close(outcome["sharded vocabulary"], (loss.detach(), gradient))
