"""The integration with TRL's `SFTTrainer`, against its own loss; and the policy loss against its `GRPOTrainer`'s."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
import trl
from datasets import Dataset
from torch import Tensor

from nvamp import LinearLoss, Loss, TokenLoss, TokenNVAMPLoss
from nvamp.functional import linear_token_nll
from nvamp.integrations.stats import log_stats
from nvamp.integrations.transformers import compute_loss_func, loss_function, patch
from nvamp.integrations.trl import SFTTrainer
from nvamp.objectives import (
    DFT,
    NVAMP,
    ClippedPolicy,
    CrossEntropy,
    EntropyWeighted,
    Objective,
    TokenWeighted,
)
from tests.integrations.tiny import (
    DESCENT,
    IGNORED,
    LOGGED,
    SEQ,
    V,
    assert_same,
    tiny,
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


# GRPO --------------------------------------------------------------------------------------------------


class Rollouts(NamedTuple):
    """Four prompts of three tokens, completions of unequal length, and what reinforcement needs of them."""

    tokens: Tensor  # [4, 12]
    labels: Tensor  # the same, −100 where no token was drawn
    advantage: Tensor  # [4]
    old_logprob: Tensor  # [4, 12], far enough from the model's that some ratios are clipped
    ref_logprob: Tensor

    def for_trl(self, prompt: int = 3) -> dict[str, Tensor]:
        drawn = (self.labels[:, prompt:] != IGNORED).long()
        return {
            "prompt_ids": self.tokens[:, :prompt],
            "prompt_mask": torch.ones_like(self.tokens[:, :prompt]),
            "completion_ids": self.tokens[:, prompt:],
            "completion_mask": drawn,
            "advantages": self.advantage,
            "old_per_token_logps": self.old_logprob[:, prompt:],
            "ref_per_token_logps": self.ref_logprob[:, prompt:],
            "num_items_in_batch": drawn.sum(),
        }

    @property
    def sizes(self) -> Tensor:
        """How many tokens each row has drawn, [4]."""
        return (self.labels != IGNORED).sum(-1)


@pytest.fixture
def rollouts() -> Rollouts:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (4, SEQ), generator=g)
    place, size = torch.arange(SEQ), torch.tensor([[9], [1], [4], [7]])
    labels = tokens.masked_fill((place < 3) | (place >= 3 + size), IGNORED)
    with torch.no_grad():
        hidden = (model := tiny()).model(tokens).last_hidden_state
    logprob = -linear_token_nll(hidden[:, :-1], model.lm_head.weight.detach(), labels[:, 1:])
    old, ref = (F.pad(logprob, (1, 0)) + 0.4 * torch.randn(tokens.shape, generator=g) for _ in range(2))
    return Rollouts(tokens, labels, torch.tensor([1.5, -0.7, 0.3, -1.1]), old, ref)


@pytest.fixture(scope="module")
def grpo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's trainer, whose own loss is called on rollouts made up by the tests."""
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0")
    return trl.GRPOTrainer(
        tiny(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(
            str(tmp_path_factory.mktemp("grpo")),
            max_completion_length=16,
            use_bias_correction_kl=False,  # by default the KL term of TRL is multiplied by the ratio
            bf16=False,
            **(LOGGED | {"per_device_train_batch_size": 4, "num_generations": 4}),
        ),
        train_dataset=Dataset.from_list([{"prompt": "w1"}] * 4),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(words), pad_token="w0", eos_token="w1"
        ),
    )


# The loss that docs/reinforcement-learning.md gives for each of TRL's: num_items_in_batch and token_weight.
SAME_AS_TRL: dict[str, Callable[[Rollouts], dict[str, Any]]] = {
    "dapo": lambda r: {"num_items_in_batch": r.sizes.sum()},
    "bnpo": lambda r: {},
    "dr_grpo": lambda r: {"num_items_in_batch": 4 * 16},  # rows × max_completion_length
    "grpo": lambda r: {
        "num_items_in_batch": 4,
        "token_weight": (1 / r.sizes[:, None]).expand(r.labels.shape),
    },
}


@pytest.mark.parametrize("corrected", [False, True], ids=["", "vllm"])
@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        *((loss_type, {"clip": 0.2, "clip_high": 0.28, "kl": 0.3}) for loss_type in SAME_AS_TRL),
        ("dapo", {"clip": 0.1, "clip_high": 0.1, "kl": 0.3, "entropy": 0.2}),
        ("bnpo", {"clip": 0.2, "clip_high": 0.28, "entropy": 0.2}),
        ("grpo", {"clip": 0.5, "clip_high": 0.0}),
    ],
)
def test_a_clipped_policy_is_trls(
    grpo: Any, rollouts: Rollouts, loss_type: str, options: dict[str, float], corrected: bool
) -> None:
    correction = torch.rand(4, SEQ) if corrected else torch.ones(4, SEQ)
    grpo.loss_type, grpo.beta = loss_type, options.get("kl", 0.0)
    grpo.epsilon_low, grpo.epsilon_high = options["clip"], options["clip_high"]
    grpo.entropy_coef = options.get("entropy", 0.0)
    grpo._entropy_bonus_enabled = bool(grpo.entropy_coef)
    grpo.current_gradient_accumulation_steps, grpo.use_vllm = 1, corrected
    grpo.model.train()
    grpo.model.zero_grad()
    theirs = grpo._compute_loss(
        grpo.model, {**rollouts.for_trl(), "importance_sampling_ratio": correction[:, 3:]}
    )
    theirs.backward()

    model = tiny()
    patch(model, LinearLoss(ClippedPolicy(**options)))
    ours = model(
        input_ids=rollouts.tokens,
        labels=rollouts.labels,
        advantage=rollouts.advantage[:, None] * correction,
        old_logprob=rollouts.old_logprob,
        ref_logprob=rollouts.ref_logprob,
        **SAME_AS_TRL[loss_type](rollouts),
    ).loss
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for (name, a), b in zip(model.named_parameters(), grpo.model.parameters(), strict=True):
        torch.testing.assert_close(
            a.grad, b.grad, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert float(model.lm_head.weight.grad.abs().max()) > 0.01  # so 1e-6 is small
