"""The integration with TRL's `SFTTrainer`, against its own loss."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor

from nvamp import Loss, TokenLoss, TokenNVAMPLoss
from nvamp.integrations.stats import log_stats
from nvamp.integrations.transformers import compute_loss_func, loss_function
from nvamp.integrations.trl import SFTTrainer
from nvamp.objectives import DFT, NVAMP, CrossEntropy, EntropyWeighted, Objective, TokenWeighted
from tests.integrations.tiny import (
    DESCENT,
    IGNORED,
    assert_same,
    weights_of,
)
from tests.study.conftest import words

# TRL 1.16 sets the old name of an option of transformers 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True, "packing_strategy": "wrapped"},
    "packed, padding-free": {"packing": True},
    "padding-free": {"padding_free": True, "max_length": None},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "completions": {},
}


@pytest.fixture(scope="module")
def data() -> dict[str, Dataset]:
    """Texts of unequal length; and prompts with their completions, of which the latter alone are scored."""
    texts = [words(seed, 4 + seed % 7) for seed in range(16)]
    halves = [text.split(" ", maxsplit=2 + i % 2) for i, text in enumerate(texts)]
    pairs = [{"prompt": " ".join(half[:-1]), "completion": " " + half[-1]} for half in halves]
    return {"text": Dataset.from_list([{"text": text} for text in texts]), "pairs": Dataset.from_list(pairs)}


def trained(
    kind: Any, model_dir: Path, tokenizer: Any, rows: Dataset, folder: Path, config: Any, **kwargs: Any
) -> tuple[Tensor, list[dict[str, float]], Any]:
    """By how much training changed the model, what was logged, and the trainer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    start = weights_of(model)
    fixed: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "max_length": 16,
        "bf16": False,
        **DESCENT,
    }
    arguments = trl.SFTConfig(**(fixed | config))
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        **kwargs,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if "criterion" in kwargs:
        log_stats(trainer, kwargs["criterion"])
    trainer.train()
    trainer.evaluate()
    names = ("loss", "eval_loss", "entropy", "mean_token_accuracy", "eval_mean_token_accuracy", "num_tokens")
    logs = [{k: v for k, v in entry.items() if k in names} for entry in trainer.state.log_history]
    return weights_of(model) - start, [entry for entry in logs if entry], trainer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cross_entropy_is_trls_own(
    layout: str, data: dict[str, Dataset], model_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    rows = data["pairs" if layout == "completions" else "text"]
    common = (model_dir, tokenizer, rows, tmp_path, LAYOUTS[layout])
    expected, expected_logs, _ = trained(trl.SFTTrainer, *common)
    moved, logs, trainer = trained(SFTTrainer, *common, criterion=TokenLoss(CrossEntropy()))
    assert_same(moved, expected)
    assert len(logs) == len(expected_logs) == 4
    for ours, theirs in zip(logs, expected_logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    if layout == "completions":  # the second token is of the prompt
        labels = next(iter(trainer.get_train_dataloader()))["labels"]
        assert (labels[:, 1] == IGNORED).all()
    for entry in trainer.state.log_history[:3]:
        assert entry["nvamp_cross_entropy"] == pytest.approx(entry["loss"], rel=1e-4)


def test_dft_is_trls_own(data: dict[str, Dataset], model_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    common = (model_dir, tokenizer, data["text"], tmp_path)
    expected, expected_logs, _ = trained(trl.SFTTrainer, *common, {"loss_type": "dft"})
    moved, logs, _ = trained(SFTTrainer, *common, {}, criterion=TokenLoss(DFT()))
    assert_same(moved, expected)
    for ours, theirs in zip(logs, expected_logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(
    "objective",
    [NVAMP(beta=0.5, gamma=0.3, gradient="token"), EntropyWeighted("mile"), EntropyWeighted("eaft")],
)
def test_an_objective_trains_as_from_logits(
    objective: Objective, data: dict[str, Dataset], model_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """TRL gives `compute_loss_func` the logits, of another forward."""
    common = (model_dir, tokenizer, data["text"], tmp_path, LAYOUTS["accumulated"])
    moved, logs, _ = trained(SFTTrainer, *common, criterion=TokenLoss(objective))
    with pytest.warns(FutureWarning, match="compute_loss_func"):
        expected, expected_logs, _ = trained(
            trl.SFTTrainer, *common, compute_loss_func=compute_loss_func(Loss(objective))
        )
    assert_same(moved, expected)
    for ours, theirs in zip(logs, expected_logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


# Columns of the batch ------------------------------------------------------------------------------------


def weighted_rows() -> Dataset:
    """Tokens, their labels and weights, in rows of unequal length."""
    lengths = [4 + i % 5 for i in range(16)]
    ids = [[3 + (7 * i + j) % 20 for j in range(length)] for i, length in enumerate(lengths)]
    weights = [[0.5 + (token % 3) for token in row] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "token_weight": weights})


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    def filled(name: str, value: float) -> Tensor:
        parts = [torch.tensor(row[name]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

    batch = {
        name: filled(name, value)
        for name, value in (("input_ids", 0), ("labels", IGNORED), ("token_weight", 0))
    }
    return batch | {"attention_mask": (batch["labels"] != IGNORED).long()}


def padded_and_shifted(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = padded(rows)
    batch["shift_labels"] = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    batch["token_weight"] = torch.nn.functional.pad(batch["token_weight"][:, 1:], (0, 1))
    return batch


class WithLossFunction(transformers.Trainer):  # type: ignore[misc]  # transformers is untyped here
    """transformers' own trainer, of the model's logits."""

    def __init__(self, model: Any, **options: Any) -> None:
        model.loss_function = loss_function(Loss(TokenWeighted()), model)
        super().__init__(model, **options)


@pytest.mark.parametrize("collator", [padded, padded_and_shifted])
def test_weights_of_the_batch_reach_the_criterion(
    collator: Any, model_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    config = {**LAYOUTS["accumulated"], "remove_unused_columns": False}
    common: Any = (model_dir, tokenizer, weighted_rows(), tmp_path, config)
    expected, expected_logs, _ = trained(WithLossFunction, *common, data_collator=padded)
    moved, logs, trainer = trained(
        SFTTrainer, *common, data_collator=collator, criterion=TokenLoss(TokenWeighted())
    )
    assert_same(moved, expected)
    losses, expected_losses = (
        [entry["loss"] for entry in log if "loss" in entry] for log in (logs, expected_logs)
    )
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert len(losses) == 3
    assert trainer.state.log_history[0]["mean_token_accuracy"] >= 0  # TRL's metrics go on


def test_a_dropped_column_is_named(model_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"token_weight is missing: .*has remove_unused_columns=False"):
        trained(
            SFTTrainer,
            model_dir,
            tokenizer,
            weighted_rows(),
            tmp_path,
            {},
            criterion=TokenLoss(TokenWeighted()),
        )


# What TRL does -------------------------------------------------------------------------------------------


def test_one_forward_a_micro_batch(
    data: dict[str, Dataset], model_dir: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    forward = transformers.LlamaModel.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return forward(*args, **kwargs)

    monkeypatch.setattr(transformers.LlamaModel, "forward", counted)
    trained(
        SFTTrainer,
        model_dir,
        tokenizer,
        data["text"],
        tmp_path,
        LAYOUTS["accumulated"],
        criterion=TokenNVAMPLoss(),
    )
    assert (calls.count(True), calls.count(False)) == (3 * 2, 2)  # 16 rows are two batches of evaluation


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"loss_type": "dft"}, "loss_type must be 'nll' with a criterion, got 'dft'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0 with a criterion, got 0.1"),
    ],
)
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
def test_options_that_exclude_a_criterion(
    config: Any, message: str, data: dict[str, Dataset], model_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trained(SFTTrainer, model_dir, tokenizer, data["text"], tmp_path, config, criterion=TokenNVAMPLoss())


def test_sequence_parallelism_excludes_a_criterion(
    data: dict[str, Dataset], model_dir: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL would train the model's own loss."""
    config = accelerate.ParallelismConfig(sp_size=2)
    # It wants ranks and DeepSpeed.
    monkeypatch.setattr(accelerate.ParallelismConfig, "_validate_accelerator", lambda *_: None)
    monkeypatch.setattr(accelerate.Accelerator, "parallelism_config", config)
    with pytest.raises(ValueError, match="sp_size must be 1 with a criterion, got 2"):
        trained(SFTTrainer, model_dir, tokenizer, data["text"], tmp_path, {}, criterion=TokenNVAMPLoss())


def test_a_loss_without_the_criterion_is_an_error(
    data: dict[str, Dataset], model_dir: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another(self: Any, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        loss: Tensor = model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
        return loss

    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", another)
    with pytest.raises(RuntimeError, match=r"TRL \d.* computed a loss without calling the criterion"):
        trained(SFTTrainer, model_dir, tokenizer, data["text"], tmp_path, {}, criterion=TokenNVAMPLoss())
