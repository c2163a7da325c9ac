"""The logged components of the loss: against NumPy, and without waiting for the device between logs."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nvamp import LinearLoss, Loss, NVAMPLoss, TokenLoss
from nvamp.integrations.stats import log_stats
from nvamp.integrations.transformers import compute_loss_func, logits_of, patch
from nvamp.objectives import DFT, NVAMP, Objective, TokenWeighted
from tests.integrations.tiny import IGNORED, LOGGED, Rows, tiny, trainer_of

STEPS, EVERY, ACCUMULATE = 4, 2, 2
OPTIONS: Any = {"gamma": 0.1, "gradient": "token"}
OBJECTIVES = (NVAMP(**OPTIONS), DFT())


class Spy:
    """A loss function that keeps the losses of tokens of each micro-batch."""

    def __init__(self, criterion: Loss) -> None:
        self._loss = compute_loss_func(criterion)
        self.training: list[NDArray[np.float64]] = []
        self.evaluation: list[NDArray[np.float64]] = []

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        assert labels is not None
        scored = labels[:, 1:] != IGNORED
        logits, targets = logits_of(outputs).detach()[:, :-1][scored].double(), labels[:, 1:][scored]
        nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none").numpy()
        (self.training if torch.is_grad_enabled() else self.evaluation).append(nll)
        return self._loss(outputs, labels, num_items_in_batch)


def hardest_share(nll: NDArray[np.float64], objective: Objective) -> float:
    """The share of the weights of the tokens, of which only the ratios matter here."""
    if objective == DFT():
        w = np.exp(-nll)
    else:
        w = np.abs(nll - nll.mean()) / np.sqrt(nll.var() + 1e-6) + 0.02
        w[nll.argmax()] += 0.1 * len(nll)
    return float(w[np.argsort(-nll)[: math.ceil(len(nll) / 100)]].sum() / w.sum())


def expected(batches: list[NDArray[np.float64]], objective: Objective) -> dict[str, float]:
    """What is to be logged of these micro-batches."""
    shares = [hardest_share(nll, objective) for nll in batches]
    tokens = [len(nll) for nll in batches]
    assert max(tokens) > 100  # else the hardest hundredth is always one token
    std = [np.sqrt(nll.var() + 1e-6) for nll in batches]
    dispersion = [np.abs(nll - nll.mean()).mean() / s for nll, s in zip(batches, std, strict=True)]
    return {
        "nvamp_cross_entropy": float(np.concatenate(batches).mean()),
        "nvamp_dispersion": float(np.average(dispersion, weights=tokens)),
        "nvamp_std": float(np.average(std, weights=tokens)),
        "nvamp_hardest_share": float(np.average(shares, weights=tokens)),
        "nvamp_max": float(max(nll.max() for nll in batches)),
    }


def trainer_with(loss: Any, folder: Path, report_to: str, model: Any = None) -> Any:
    arguments = {
        **LOGGED,
        "max_steps": STEPS,
        "per_device_train_batch_size": 16,  # about a hundred tokens: their hardest hundredth are one or two
        "per_device_eval_batch_size": 24,
        "gradient_accumulation_steps": ACCUMULATE,
        "logging_steps": EVERY,
        "report_to": report_to,
    }
    rows = Rows(unequal=True)
    return trainer_of(model or tiny(), rows, folder, arguments, eval_dataset=rows, compute_loss_func=loss)


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each scalar in the event files of TensorBoard."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("report_to", ["none", "tensorboard"])
def test_what_is_logged(
    report_to: str, objective: Objective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    criterion = Loss(objective)
    spy = Spy(criterion)
    trainer = trainer_with(spy, tmp_path, report_to)
    log_stats(trainer, criterion)
    trainer.train()
    metrics = trainer.evaluate()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    per_log = EVERY * ACCUMULATE
    assert len(spy.training) == STEPS * ACCUMULATE
    assert [entry["step"] for entry in logged] == [2, 4]
    for i, entry in enumerate(logged):
        values = expected(spy.training[i * per_log : (i + 1) * per_log], objective)
        assert {name: entry[name] for name in values} == pytest.approx(values, rel=1e-5)
    in_evaluation = {f"eval_{name}": value for name, value in expected(spy.evaluation, objective).items()}
    assert {name: metrics[name] for name in in_evaluation} == pytest.approx(in_evaluation, rel=1e-5)
    others = [
        entry for entry in trainer.state.log_history if "loss" not in entry and "eval_loss" not in entry
    ]
    assert others  # what the Trainer says at the end of training is left as it is
    assert not any("nvamp_max" in name for entry in others for name in entry)
    if report_to == "tensorboard":
        scalars = scalars_of(tmp_path / "events")
        for name in values:
            assert scalars[f"train/{name}"] == [
                (entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in logged
            ]
            assert scalars[f"eval/{name}"] == [(STEPS, pytest.approx(metrics[f"eval_{name}"], rel=1e-6))]
    else:
        assert not (tmp_path / "events").exists()


def test_a_patched_model_with_weights_of_tokens(tmp_path: Path) -> None:
    """The logged losses are those of the tokens, whatever their weights."""
    model, criterion = tiny(), LinearLoss(TokenWeighted())
    patch(model, criterion)
    rows = Rows(unequal=True, weighted=True)
    rows.columns["token_weight"].fill_(3)
    arguments = {**LOGGED, "max_steps": STEPS, "remove_unused_columns": False}
    trainer = trainer_of(model, rows, tmp_path, arguments)
    log_stats(trainer, criterion)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == STEPS
    for entry in logged:
        assert entry["nvamp_cross_entropy"] == pytest.approx(entry["loss"] / 3, rel=1e-4)


def test_steps_without_tokens_log_nothing(tmp_path: Path) -> None:
    criterion, rows = Loss(NVAMP()), Rows(unequal=True)
    rows.labels.fill_(IGNORED)
    loss = compute_loss_func(criterion)
    trainer = trainer_of(tiny(), rows, tmp_path, {**LOGGED, "max_steps": 1}, compute_loss_func=loss)
    log_stats(trainer, criterion)
    trainer.train()
    assert "loss" in trainer.state.log_history[0]
    assert not any("nvamp" in name for name in trainer.state.log_history[0])


@pytest.mark.parametrize("path", ["compute_loss_func", "patch", "patch, no logits in evaluation"])
def test_accuracy_and_entropy(path: str, tmp_path: Path) -> None:
    """Without learning, and with all rows between two logs, they are those of the first model."""
    model, rows, criterion = tiny(), Rows(unequal=True), Loss(NVAMP())
    logits, targets = model(rows.inputs).logits[:, :-1].detach(), rows.labels[:, 1:]
    p, scored = logits.double().softmax(-1), targets != IGNORED
    expected = {
        "nvamp_accuracy": float((p.argmax(-1) == targets)[scored].double().mean()),
        "nvamp_entropy": float(torch.special.entr(p).sum(-1)[scored].mean()),
    }
    assert expected["nvamp_accuracy"] > 0
    if path != "compute_loss_func":
        criterion = LinearLoss(NVAMP())
        patch(model, criterion, eval_logits="," not in path)
    trainer = trainer_with(
        compute_loss_func(criterion) if path == "compute_loss_func" else None, tmp_path, "none", model
    )
    trainer.args.learning_rate = 0.0
    log_stats(trainer, criterion, token_metrics=True)
    trainer.train()
    metrics = trainer.evaluate()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    log_stats(trainer, criterion)
    assert "eval_nvamp_entropy" not in trainer.evaluate()
    assert not criterion.token_metrics


def test_losses_of_tokens_have_no_accuracy(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="token_metrics need a Loss or a LinearLoss, got a TokenLoss"):
        log_stats(trainer_with(None, tmp_path, "none"), TokenLoss(NVAMP()), token_metrics=True)


class Waits(TorchDispatchMode):
    """Counts what would make a program wait for the device: values, and sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits() -> Iterator[Waits]:
    with Waits() as mode:
        yield mode


def test_between_logs_nothing_waits(tmp_path: Path, waits: Waits) -> None:
    criterion = NVAMPLoss(**OPTIONS)
    counts: dict[str, list[int]] = {"without": [], "with": []}
    for name, counted in counts.items():

        def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None, counted: Any = counted) -> Tensor:
            before = waits.count
            value = compute_loss_func(criterion)(outputs, labels, num_items_in_batch)
            counted.append(waits.count - before)
            return value

        trainer = trainer_with(loss, tmp_path, "none")
        if name == "with":
            log_stats(trainer, criterion, token_metrics=True)
        trainer.train()
    seen = waits.count
    torch.ones(1).item()
    bool(torch.ones(1) > 0)
    assert waits.count == seen + 2  # it counts
    assert len(counts["with"]) == STEPS * ACCUMULATE
    assert counts["with"] == counts["without"]


def test_a_criterion_that_is_not_the_trainers(tmp_path: Path) -> None:
    trainer = trainer_with(compute_loss_func(NVAMPLoss()), tmp_path, "none")
    log_stats(trainer, NVAMPLoss())
    with pytest.warns(UserWarning, match="has not called the criterion"):
        trainer.train()
    assert not any("nvamp_max" in entry for entry in trainer.state.log_history)
