"""The integration with the `Trainer`."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from nvamp import LinearLoss, LinearNVAMPLoss, Loss, NVAMPLoss, TokenLoss
from nvamp.integrations.transformers import compute_loss_func, loss_function, patch
from nvamp.objectives import CrossEntropy, TokenWeighted
from nvamp.study.corpus import Corpus
from nvamp.study.losses import parse_loss
from nvamp.study.models import build_model, quiet
from nvamp.study.packing import plain
from nvamp.study.training import Recipe, training_arguments
from tests.integrations.tiny import (
    CROSS_ENTROPY,
    DESCENT,
    IGNORED,
    SEQ,
    V,
    assert_same,
    logged_losses,
    tiny,
    trainer_of,
    weights_of,
)


@pytest.mark.parametrize(
    "wrap", [lambda x: CausalLMOutput(logits=x), lambda x: {"logits": x}, lambda x: (x, "more")]
)
def test_logits_of_every_kind_of_output(wrap: Any) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    criterion = NVAMPLoss(gradient="token")
    loss = compute_loss_func(criterion)(wrap(logits), labels, num_items_in_batch=torch.tensor(11))
    torch.testing.assert_close(loss, criterion(logits, labels, num_items_in_batch=11), rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", [compute_loss_func, loss_function])
@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (NVAMPLoss, "must be an instance, got the class NVAMPLoss"),
        (LinearNVAMPLoss(), r"of logits, such as Loss\(NVAMP\(\)\), got LinearNVAMPLoss, which patch\(model"),
        (TokenLoss(CrossEntropy()), r"got TokenLoss, which nvamp\.integrations\.trl\.SFTTrainer takes"),
        ("nvamp", "must be a loss of logits, .*got str$"),
    ],
)
def test_what_is_no_loss_of_logits(criterion: Any, message: str, way: Any) -> None:
    with pytest.raises(TypeError, match=message):
        way(criterion, None)


def test_what_other_trainers_pass() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    loss = compute_loss_func(NVAMPLoss())
    found = loss({"logits": logits}, labels, num_items_in_batch=11, loss_scale=None, trainer="of ms-swift")
    assert found == NVAMPLoss()(logits, labels, num_items_in_batch=11)
    with pytest.raises(TypeError, match="loss_scale: compute_loss_func has no use for it"):
        loss({"logits": logits}, labels, loss_scale=torch.ones(2, 5))


def test_split_sequences_exclude_a_loss_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    loss, unshifted = (compute_loss_func(NVAMPLoss(shift=shift)) for shift in (True, False))
    split = {"parallelism_config": accelerate.ParallelismConfig(cp_size=2)}
    monkeypatch.setattr(AcceleratorState, "_shared_state", split)
    with pytest.raises(ValueError, match=r"context parallelism, cp_size=2, .*: use patch\(model, LinearLoss"):
        loss({"logits": logits}, labels)
    unshifted({"logits": logits}, labels)
    split["parallelism_config"] = accelerate.ParallelismConfig(sp_size=2)
    with pytest.raises(ValueError, match="sequence parallelism, sp_size=2, a Trainer ignores"):
        unshifted({"logits": logits}, labels)
    split.clear()
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")  # as `accelerate launch` sets them
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "4")
    with pytest.raises(ValueError, match="sequence parallelism, sp_size=4"):
        compute_loss_func(NVAMPLoss())


def test_missing_labels_are_named() -> None:
    with pytest.raises(ValueError, match="a column named 'labels'"):
        compute_loss_func(NVAMPLoss())({"logits": torch.zeros(1, 2, 3)}, None)


# Batches, each as a row of its own -----------------------------------------------------------------------


Batch = dict[str, Tensor]


def documents_of(seed: int, count: int) -> list[Tensor]:
    """Token ids of documents of 2 to 6 tokens."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (count,), generator=g)
    return [torch.randint(V, (int(length),), generator=g) for length in lengths]


def padded(rows: list[Batch]) -> Batch:
    """Documents side by side, each filled up to a row of SEQ."""

    def filled(x: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, SEQ - len(x)), value=value)

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": torch.stack([filled(x, 0) for x in ids]),
        "attention_mask": torch.stack([filled(torch.ones_like(x), 0) for x in ids]),
        "labels": torch.stack([filled(x, IGNORED) for x in ids]),
    }


def packed(rows: list[Batch]) -> Batch:
    """A document and its reverse in each row: they begin where the position is 0, and are not scored there."""
    pairs = [torch.cat((row["input_ids"], row["input_ids"].flip(0))) for row in rows]
    starts = [torch.arange(len(pair)) % (len(pair) // 2) for pair in pairs]

    def filled(xs: list[Tensor], value: int) -> Tensor:
        return torch.stack([torch.nn.functional.pad(x, (0, SEQ - len(x)), value=value) for x in xs])

    ids, positions = filled(pairs, 0), filled(starts, 0)
    scored = (positions > 0) & (torch.arange(SEQ) < torch.tensor([len(pair) for pair in pairs])[:, None])
    return {"input_ids": ids, "position_ids": positions, "labels": torch.where(scored, ids, IGNORED)}


COLLATORS = {
    "padded": padded,
    "packed": packed,
    "padding-free": transformers.DataCollatorWithFlattening(),
}


def run(
    collator: Any, accumulate: int, loss: Any, folder: Path, model: Any = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """By how much four steps of plain gradient descent move the tiny model, and the losses they log."""
    model = tiny() if model is None else model
    start = weights_of(model)
    arguments = {
        "max_steps": 4,
        "per_device_train_batch_size": 8 // accumulate,
        "gradient_accumulation_steps": accumulate,
        **DESCENT,
        **options,
    }
    documents = documents_of(0, 32)
    rows = [{"input_ids": ids, "token_weight": weight_of(ids)} for ids in documents]
    trainer = trainer_of(model, rows, folder, arguments, data_collator=collator, compute_loss_func=loss)
    trainer.train()
    return weights_of(model) - start, logged_losses(trainer)


@pytest.mark.parametrize("criterion", [Loss(CrossEntropy()), NVAMPLoss(**CROSS_ENTROPY)])
@pytest.mark.parametrize("layout", COLLATORS)
def test_cross_entropy_is_the_trainers_own(layout: str, criterion: Loss, tmp_path: Path) -> None:
    """Step for step, in any number of micro-batches."""
    quiet()
    loss = compute_loss_func(criterion)
    for accumulate in (1, 2, 4):
        moved, logged = run(COLLATORS[layout], accumulate, loss, tmp_path)
        expected, expected_log = run(COLLATORS[layout], accumulate, None, tmp_path)
        assert len(logged) == 4
        assert_same(moved, expected)
        assert_same(logged, expected_log)
        if accumulate == 1:
            whole, whole_log = moved, logged
        assert_same(moved, whole)
        assert_same(logged, whole_log)


def test_layouts_are_the_same_documents(tmp_path: Path) -> None:
    """Without padding as with it: no token of one document sees, or is scored by, another."""
    quiet()
    loss = compute_loss_func(NVAMPLoss(gradient="token"))
    with_padding, log = run(padded, 1, loss, tmp_path)
    without, its_log = run(COLLATORS["padding-free"], 1, loss, tmp_path)
    assert_same(without, with_padding)
    assert_same(its_log, log)


# Weights of tokens ---------------------------------------------------------------------------------------


def weight_of(ids: Tensor) -> Tensor:
    """A weight for each token of a document."""
    return 0.5 + (ids % 3).float()


def padded_with_weights(rows: list[Batch]) -> Batch:
    weights = [
        torch.nn.functional.pad(row["token_weight"], (0, SEQ - len(row["token_weight"]))) for row in rows
    ]
    return {**padded(rows), "token_weight": torch.stack(weights)}


def descended(batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """What `run` returns, by hand and with the weights of the tokens, of these batches."""
    model = tiny()
    start, losses = weights_of(model), []
    for batch in batches:
        labels, weight = batch["labels"][:, 1:], batch["token_weight"][:, 1:]
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
        losses.append((weight * nll).sum() / (labels != IGNORED).sum())
        model.zero_grad()
        losses[-1].backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= DESCENT["learning_rate"] * parameter.grad
    return weights_of(model) - start, torch.stack(losses).detach()


@pytest.mark.parametrize("way", ["patch", "loss_function"])
def test_weights_of_the_batch_reach_the_loss(way: str, tmp_path: Path) -> None:
    """Through a Trainer, in any number of micro-batches."""
    quiet()
    batches: list[Batch] = []

    def collate(rows: list[Batch]) -> Batch:
        batches.append(padded_with_weights(rows))
        return batches[-1]

    for accumulate in (1, 2, 4):
        model = tiny()
        if way == "patch":
            patch(model, LinearLoss(TokenWeighted()))
        else:
            model.loss_function = loss_function(Loss(TokenWeighted()), model)
        moved, logged = run(collate, accumulate, None, tmp_path, model, remove_unused_columns=False)
        if accumulate == 1:
            expected, expected_log = descended(batches)
            assert len(logged) == 4
        assert_same(moved, expected)
        assert_same(logged, expected_log)


def test_a_dropped_column_is_named(tmp_path: Path) -> None:
    quiet()
    model = tiny()
    patch(model, LinearLoss(TokenWeighted()))
    with pytest.raises(
        TypeError, match=r"token_weight is missing: .*unless TrainingArguments has remove_unused"
    ):
        run(padded, 1, None, tmp_path, model)


# Blocks of the study -------------------------------------------------------------------------------------


def weights_after(model_dir: Any, corpus: Corpus, criterion: Any, batch: int, accumulate: int) -> Tensor:
    model = build_model(str(model_dir), corpus)
    arguments = training_arguments(
        Recipe(3, batch, 1e-2, model=str(model_dir)), 0, torch.device("cpu"), "unused"
    )
    arguments.gradient_accumulation_steps = accumulate
    transformers.Trainer(
        model,
        arguments,
        train_dataset=plain(corpus.train[:24]),
        compute_loss_func=compute_loss_func(criterion),
    ).train()
    return weights_of(model)


def test_micro_batches_add_up_to_the_batch(model_dir: Any, corpus: Corpus) -> None:
    criterion = parse_loss("ce").criterion
    whole = weights_after(model_dir, corpus, criterion, batch=8, accumulate=1)
    parts = weights_after(model_dir, corpus, criterion, batch=2, accumulate=4)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)


def test_the_model_computes_no_loss_of_its_own(
    model_dir: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("the model computed its loss as well")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "loss_function", property(lambda self: forbidden))
    seen: list[Tensor] = []

    def criterion(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        seen.append(torch.as_tensor(num_items_in_batch))
        return NVAMPLoss()(logits, labels, num_items_in_batch=num_items_in_batch)

    weights_after(model_dir, corpus, criterion, batch=4, accumulate=2)
    # Every token of the eight blocks of 16 of a step but the first of each.
    assert [int(items) for items in seen] == [8 * 15] * 6
