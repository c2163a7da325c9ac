from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from nvamp.integrations.transformers import compute_loss_func
from nvamp.study.corpus import Corpus
from nvamp.study.losses import parse_loss
from nvamp.study.models import build_model
from nvamp.study.training import (
    LabelledBlocks,
    Recipe,
    Run,
    TimedLoss,
    held_out_nll,
    train,
    training_arguments,
)
from tests.study.conftest import dropping

CPU = torch.device("cpu")


def recipe(model_dir: Any, **changes: Any) -> Recipe:
    return Recipe(**{"steps": 12, "batch_size": 8, "lr": 1e-2, "model": str(model_dir), **changes})


def run(spec: str, recipe: Recipe, corpus: Corpus, seed: int = 0) -> tuple[Run, list[float]]:
    values: list[float] = []
    result = train(parse_loss(spec), seed, recipe, corpus, lambda step, value: values.append(value))
    return result, values


def test_ce_is_what_the_trainer_does_by_itself(corpus: Corpus, model_dir: Any) -> None:
    ours, values = run("ce", recipe(model_dir), corpus)

    transformers.set_seed(0)
    model = build_model(str(model_dir), corpus)
    arguments = training_arguments(recipe(model_dir), 0, CPU, "unused")
    arguments.logging_strategy, arguments.logging_steps = "steps", 1
    data = LabelledBlocks(corpus.train, len(corpus.tokenizer), 0.0, 0)
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()

    plain = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose(values, plain, rtol=1e-5)
    assert values[-1] < values[0] - 0.1
    np.testing.assert_allclose(ours.nll, held_out_nll(model, corpus.held_out)[0], rtol=1e-4, atol=1e-4)


def test_held_out_losses_by_definition(corpus: Corpus, model_dir: Any) -> None:
    model = build_model(str(model_dir), corpus)
    nll, correct = held_out_nll(model, corpus.held_out)
    with torch.no_grad():
        logits = model(input_ids=corpus.held_out).logits[:, :-1].double()
    labels = corpus.held_out[:, 1:, None]
    expected = -logits.log_softmax(-1).gather(2, labels).flatten()
    np.testing.assert_allclose(nll, expected, rtol=1e-5)
    np.testing.assert_array_equal(correct, (logits.argmax(-1) == labels[..., 0]).flatten())


def test_dropout_does_not_touch_held_out_losses(corpus: Corpus) -> None:
    model = dropping(len(corpus.tokenizer))
    nll, _ = held_out_nll(model, corpus.held_out)
    np.testing.assert_array_equal(nll, held_out_nll(model.eval(), corpus.held_out)[0])


def test_the_recipe(tmp_path: Path) -> None:
    arguments = training_arguments(Recipe(105, 8, 1e-3), 7, CPU, str(tmp_path))
    assert (arguments.optim, arguments.weight_decay) == ("adamw_torch_fused", 0)
    assert (arguments.lr_scheduler_type, arguments.warmup_steps) == ("cosine", 10)
    assert (arguments.learning_rate, arguments.max_grad_norm) == (1e-3, 1.0)
    assert (arguments.max_steps, arguments.per_device_train_batch_size, arguments.seed) == (105, 8, 7)
    assert arguments.gradient_accumulation_steps == 1
    assert not arguments.bf16


def test_held_out_losses_are_plain_whatever_the_training(corpus: Corpus, model_dir: Any) -> None:
    ours, values = run("ce:label_smoothing=0.5", recipe(model_dir), corpus)
    plain, _ = run("ce", recipe(model_dir), corpus)
    np.testing.assert_array_equal(ours.nll, held_out_nll(ours.model, corpus.held_out)[0])
    assert ours.curve[0] == plain.curve[0]  # before the first step
    assert ours.curve[-1] != plain.curve[-1]
    assert values[0] != pytest.approx(ours.curve[0][1], abs=1e-3)


def test_the_same_run_twice_is_the_same(corpus: Corpus, model_dir: Any) -> None:
    (first, values), (again, values_again) = (
        run("nvamp:gradient=token", recipe(model_dir, noise=0.3), corpus) for _ in range(2)
    )
    assert values == values_again
    assert first.curve == again.curve
    np.testing.assert_array_equal(first.nll, again.nll)
    assert [step for step, _ in first.curve] == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12]


def test_another_seed_is_another_run(corpus: Corpus, model_dir: Any) -> None:
    assert run("ce", recipe(model_dir), corpus, seed=0)[1] != run("ce", recipe(model_dir), corpus, seed=1)[1]


def test_only_the_loss_differs_between_losses(corpus: Corpus, model_dir: Any) -> None:
    # Enough steps for a second pass over the blocks, where a drifting random state would show.
    epoch = len(corpus.train) // 8

    def labels_under(spec: str) -> list[Tensor]:
        loss = parse_loss(spec)
        seen: list[Tensor] = []

        def criterion(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            seen.append(labels.clone())
            return loss.criterion(logits, labels, num_items_in_batch=num_items_in_batch)

        how = recipe(model_dir, steps=2 * epoch, noise=0.5)
        train(replace(loss, criterion=criterion), 3, how, corpus, lambda *_: None)
        return seen

    first, second = labels_under("ce"), labels_under("nvamp:gradient=token")
    assert len(first) == 2 * epoch
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert not torch.equal(first[0], first[epoch])


def test_the_built_in_model_starts_from_the_seed(corpus: Corpus) -> None:
    short = Recipe(1, 8, 1e-3)
    starts = [run(spec, short, corpus, seed)[0].curve[0] for spec, seed in (("ce", 0), ("dft", 0), ("ce", 1))]
    assert starts[0] == starts[1] != starts[2]


@pytest.mark.parametrize("noise", [0.0, 0.25, 1.0])
def test_noise_replaces_its_share_of_labels_and_no_input(noise: float) -> None:
    blocks = torch.full((400, 50), 7)
    data = LabelledBlocks(blocks, 1000, noise, seed=1)
    labels = torch.stack([data[i]["labels"] for i in range(len(data))])
    assert torch.equal(labels, LabelledBlocks(blocks, 1000, noise, seed=1).labels)
    inputs = torch.stack([data[i]["input_ids"] for i in range(len(data))])
    assert torch.equal(inputs, torch.full((400, 50), 7))
    replaced = labels[labels != 7]
    # Four standard errors of 20,000 draws.
    assert (
        abs(len(replaced) / labels.numel() - noise * 0.999)
        <= 4 * (noise * (1 - noise * 0.999) / 20_000) ** 0.5
    )
    if noise:
        assert abs(replaced.double().mean().item() - 499.5) < 4 * 289 / len(replaced) ** 0.5
        assert not torch.equal(labels, LabelledBlocks(blocks, 1000, noise, seed=2).labels)


def test_a_diverged_run_stops_and_says_so(corpus: Corpus, model_dir: Any) -> None:
    def criterion(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return logits.sum() * torch.nan

    loss = replace(parse_loss("ce"), criterion=criterion)
    result = train(loss, 0, recipe(model_dir), corpus, lambda *_: None)
    assert result.diverged
    assert result.steps == 1
    assert not run("ce", recipe(model_dir), corpus)[0].diverged


def test_the_clock_counts_the_loss_and_its_gradient_once_each() -> None:
    class Counting:
        def __init__(self) -> None:
            self.now = 0

        def mark(self) -> int:
            self.now += 1
            return self.now

    order: list[str] = []

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            order.append(f"model backward at {clock.now}")
            return grad

    clock = Counting()
    timed = TimedLoss(compute_loss_func(lambda logits, labels, num_items_in_batch: logits.sum()), clock)  # type: ignore[arg-type]
    for _ in range(2):
        logits = Slow.apply(torch.ones(1, 2, 3, requires_grad=True))
        timed({"logits": logits}, torch.zeros(1, 2)).backward()
    # Four marks a step; the model's own backward comes after the last of them.
    assert timed.forward == [(1, 2), (5, 6)]
    assert timed.backward == [(3, 4), (7, 8)]
    assert order == ["model backward at 4", "model backward at 8"]


def test_measured_times_are_sane(corpus: Corpus, model_dir: Any) -> None:
    result, _ = run("ce", recipe(model_dir), corpus)
    assert 0 < result.loss_share < 1
    assert 0 < 12 * 8 * 16 / result.tokens_per_second < result.seconds
