"""The check before a long run, against trainers that train with the criterion and trainers that do not."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor, nn

from nvamp import LinearLoss, Loss, TokenLoss
from nvamp.integrations.check import assert_trains_with
from nvamp.integrations.stats import log_stats
from nvamp.integrations.transformers import compute_loss_func, loss_function, patch
from nvamp.integrations.trl import SFTTrainer
from nvamp.objectives import DFT, NVAMP, TokenWeighted
from nvamp.study.models import quiet
from tests.integrations.tiny import LOGGED, Rows, tiny, trainer_of, weights_of


def trainer(folder: Path, model: Any = None, loss: Any = None, **arguments: Any) -> Any:
    quiet()
    rows = Rows(unequal=True)
    model = tiny() if model is None else model
    return trainer_of(model, rows, folder, {**LOGGED, "max_steps": 2, **arguments}, compute_loss_func=loss)


def patched(criterion: LinearLoss) -> Any:
    model = tiny()
    patch(model, criterion)
    return model


def test_models() -> None:
    """Whatever the objective needs, in any mode, which stays as it is."""
    for objective in (DFT(), TokenWeighted()):
        linear, of_logits = LinearLoss(objective), Loss(objective)
        model = patched(linear)
        for mode in (True, False):
            model.train(mode)
            assert_trains_with(model, linear)
            assert {module.training for module in model.modules()} == {mode}
        assert_trains_with(nn.DataParallel(model), linear)
        with pytest.raises(
            AssertionError, match=r"LlamaForCausalLM does not train with this LinearLoss: .* call"
        ):
            assert_trains_with(model, LinearLoss(objective))
        model = tiny()
        with pytest.raises(AssertionError, match="without a call"):
            assert_trains_with(model, of_logits)
        model.loss_function = loss_function(of_logits, model)
        assert_trains_with(model, of_logits)
        tokens = torch.ones(1, 4, dtype=torch.long)
        batch = {"input_ids": tokens, "labels": tokens, "token_weight": torch.ones(1, 4)}
        if objective == TokenWeighted():
            assert_trains_with(model, of_logits, batch)
        else:
            with pytest.raises(TypeError, match="token_weight is not an input of DFT"):
                assert_trains_with(model, of_logits, batch)
    assert of_logits.on_stats is None


def test_trainers(tmp_path: Path) -> None:
    criterion, linear = Loss(NVAMP()), LinearLoss(NVAMP())

    def beside(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        compute_loss_func(criterion)(outputs, labels, num_items_in_batch)
        loss: Tensor = nn.functional.cross_entropy(outputs.logits[:, :-1].mT, labels[:, 1:])
        return loss

    assert_trains_with(trainer(tmp_path, loss=compute_loss_func(criterion)), criterion)
    assert_trains_with(trainer(tmp_path, patched(linear)), linear)
    with pytest.raises(AssertionError, match=r"Trainer does not train with this Loss: .* without a call"):
        assert_trains_with(trainer(tmp_path), criterion)
    with pytest.raises(AssertionError, match="was called, but the loss is not made of what it returned"):
        assert_trains_with(trainer(tmp_path, loss=beside), criterion)


def test_the_training_is_the_same_after_it(tmp_path: Path) -> None:
    """With dropout and in the same order, and the same values are logged."""
    config = tiny().config
    config.attention_dropout = 0.3
    outcomes = []
    for checked in (True, False):
        criterion = Loss(NVAMP())
        transformers.set_seed(1)
        made = trainer(tmp_path, transformers.LlamaForCausalLM(config), compute_loss_func(criterion))
        log_stats(made, criterion)
        if checked:
            state = made.accelerator.gradient_state
            loaders = [*state.dataloader_references]
            assert_trains_with(made, criterion)
            assert state.dataloader_references == loaders
        made.train()
        logged = [entry["nvamp_cross_entropy"] for entry in made.state.log_history if "loss" in entry]
        outcomes.append((weights_of(made.model), logged))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == outcomes[1][1]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_trl(model_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    quiet()
    rows = Dataset.from_list([{"text": "a b c d e"}] * 8)
    criterion = TokenLoss(NVAMP())
    arguments = trl.SFTConfig(output_dir=str(tmp_path), bf16=False, **LOGGED)
    options = {"args": arguments, "train_dataset": rows, "processing_class": tokenizer}
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    made = SFTTrainer(model, criterion=criterion, **options)
    assert_trains_with(made, criterion)
    assert not made._metrics["train"]
    with pytest.raises(AssertionError, match="SFTTrainer does not train with this TokenLoss"):
        assert_trains_with(trl.SFTTrainer(model, **options), criterion)


@pytest.mark.parametrize("check", [assert_trains_with, log_stats])
def test_arguments_that_replace_the_criterion(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    criterion, linear = Loss(NVAMP()), LinearLoss(NVAMP())
    loss = compute_loss_func(criterion)
    smoothed = {"label_smoothing_factor": 0.1}
    with pytest.raises(
        ValueError, match=r"label_smoothing_factor=0.1 is dropped by compute_loss_func: .* give"
    ):
        check(trainer(tmp_path, loss=loss, **smoothed), criterion)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1 replaces the criterion"):
        check(trainer(tmp_path, patched(linear), **smoothed), linear)
    with pytest.raises(ValueError, match="use_liger_kernel replaces the criterion"):
        check(trainer(tmp_path, patched(linear), use_liger_kernel=True), linear)
    unfused = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False}}
    check(trainer(tmp_path, patched(linear), **unfused), linear)
    made = trainer(tmp_path, loss=loss)
    monkeypatch.setattr(accelerate.Accelerator, "parallelism_config", accelerate.ParallelismConfig(sp_size=2))
    with pytest.raises(ValueError, match="sp_size=2, a Trainer ignores its compute_loss_func"):
        check(made, criterion)
