"""A model with a criterion trains with it, or says that it would not: every way in which it was passed over."""

import importlib
import math
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import lightning
import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

from nvamp import LinearLoss, Loss, NVAMPLoss, TokenLoss
from nvamp.integrations.transformers import compute_loss_func, guard, loss_function, patch, patching, unpatch
from nvamp.integrations.trl import SFTTrainer
from nvamp.objectives import DFT, NVAMP
from nvamp.study.models import quiet
from tests.integrations.tiny import DESCENT, LOGGED, SEQ, Rows, V, logged_losses, tiny, trainer_of, weights_of

TOKENS = torch.randint(V, (2, SEQ), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


def give(model: Any, way: str, **options: bool) -> Any:
    """The model with NVAMP as its criterion."""
    if way == "patch":
        patch(model, LinearLoss(NVAMP()), **options)
    else:
        model.loss_function = loss_function(Loss(NVAMP()), model, **options)
    return model.train()


with_way = pytest.mark.parametrize("way", ["patch", "loss_function"])


# A forward with a loss of its own ------------------------------------------------------------------------


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Applies Liger's forward of a Llama, with plain PyTorch in place of its kernel for GPUs."""
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    def kernel(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return nn.functional.cross_entropy(hidden @ weight.T, labels, reduction=options["reduction"])

    monkeypatch.setattr(functional, "liger_fused_linear_cross_entropy", kernel)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", transformers.LlamaForCausalLM.forward)
    # The class of a patched Llama has the signature of the forward at the time.
    monkeypatch.setattr(patching, "_patched_model", cache(patching._patched_model.__wrapped__))
    return lambda **options: apply_liger_kernel_to_llama(**KERNELS, **options)


KERNELS = {"rope": False, "rms_norm": False, "swiglu": False}  # those that need a GPU


@with_way
@pytest.mark.parametrize("on", ["the class, before", "the class, after", "the model"])
def test_ligers_loss(on: str, way: str, liger: Any) -> None:
    if on == "the class, before":
        liger()
    model = give(tiny(), way)
    if on == "the class, after":
        liger()
    elif on == "the model":
        liger(model=model)
    with pytest.raises(RuntimeError, match=r"did not call the criterion .*fused_linear_cross_entropy"):
        model(**BATCH)
    with pytest.raises(RuntimeError, match="did not call the criterion"):
        model(**BATCH, return_dict=False)
    with torch.no_grad():
        assert model(TOKENS).logits is not None


@with_way
def test_ligers_loss_under_lora(way: str, liger: Any) -> None:
    model = tiny()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    give(model, way)
    liger(model=model)
    with pytest.raises(RuntimeError, match="did not call the criterion of this LlamaForCausalLM"):
        adapted(**BATCH)


def test_a_model_with_ligers_loss_is_not_patched(liger: Any) -> None:
    model = tiny()
    liger(model=model)
    with pytest.raises(TypeError, match=r"has been replaced, .* Liger's fused_linear_cross_entropy off"):
        patch(model, LinearLoss(NVAMP()))


@pytest.mark.usefixtures("liger")
@pytest.mark.filterwarnings("ignore:`use_return_dict` is deprecated")
def test_a_trainer_with_liger(tmp_path: Path) -> None:
    quiet()

    def trained(**kernels: bool) -> Tensor:
        arguments = {
            **LOGGED,
            "max_steps": 2,
            "use_liger_kernel": bool(kernels),
            "liger_kernel_config": kernels,
        }
        trainer = trainer_of(give(tiny(), "patch"), Rows(True), tmp_path, arguments)
        trainer.train()
        return logged_losses(trainer)

    with pytest.raises(RuntimeError, match="did not call the criterion"):
        trained(**KERNELS)
    assert torch.equal(trained(**KERNELS, fused_linear_cross_entropy=False), trained())


class WithItsOwnLoss(transformers.LlamaForCausalLM):
    """It ignores `loss_function`, as some models do."""

    def forward(self, labels: Any = None, **kwargs: Any) -> Any:
        outputs = transformers.LlamaForCausalLM.forward(self, **kwargs)
        if labels is not None:
            outputs.loss = nn.functional.cross_entropy(outputs.logits[:, :-1].mT, labels[:, 1:])
        return outputs


def test_a_model_that_ignores_its_loss_function() -> None:
    with pytest.raises(TypeError, match="WithItsOwnLoss computes its loss itself and ignores"):
        give(WithItsOwnLoss(tiny().config), "loss_function")
    model = give(tiny(), "loss_function")
    model.forward = MethodType(WithItsOwnLoss.forward, model)  # as a library might do later
    for training in (True, False):
        model.train(training)
        with pytest.raises(RuntimeError, match=r"LlamaForCausalLM, Loss\..*needs patch\(model, LinearLoss"):
            model(**BATCH)
    model.loss_function = lambda *_, **__: None  # another's is not watched
    assert model(**BATCH).loss is not None


# Labels that do not reach the model ----------------------------------------------------------------------


class WithLossOfLogits(transformers.Trainer):  # type: ignore[misc]  # transformers is untyped here
    """A trainer as people write them."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        labels = inputs.pop("labels")
        return nn.functional.cross_entropy(model(**inputs).logits[:, :-1].mT, labels[:, 1:])


@with_way
@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func", "compute_loss"])
def test_a_trainer_that_takes_the_labels(how: str, way: str, tmp_path: Path) -> None:
    quiet()
    kind = WithLossOfLogits if how == "compute_loss" else transformers.Trainer
    smoothing = {"label_smoothing_factor": 0.1} if how == "label_smoothing_factor" else {}
    trainer = kind(
        give(tiny(), way),
        transformers.TrainingArguments(str(tmp_path), **LOGGED, **smoothing),
        train_dataset=Rows(True),
        compute_loss_func=compute_loss_func(Loss(DFT())) if how == "compute_loss_func" else None,
    )
    with pytest.raises(RuntimeError, match=r"without labels, .* criterion .*logits_without_labels=True"):
        trainer.train()


@with_way
def test_calls_for_logits(way: str) -> None:
    """Without a gradient, in evaluation and with permission they are the model's own."""
    expected = tiny().train()(TOKENS).logits
    model = give(tiny(), way)
    for outputs in ({}, {"return_dict": False}):
        with pytest.raises(RuntimeError, match="called in training without labels"):
            model(TOKENS, **outputs)
    with pytest.raises(RuntimeError, match="called in training without labels"):
        model.forward(TOKENS)  # as PEFT did before 0.21
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, expected)
    assert torch.equal(model.eval()(TOKENS).logits, expected)
    allowed = give(tiny(), way, logits_without_labels=True)
    logits = allowed(TOKENS).logits
    assert torch.equal(logits, expected)
    assert logits.requires_grad


@pytest.mark.parametrize(("trainer", "refused"), [("sft_trainer", True), ("dpo_trainer", False)])
def test_trl_calls_for_logits(trainer: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `SFTTrainer` does for a loss in place of the criterion, and others for a loss of another kind."""
    monkeypatch.setattr(guard, "_caller_in_trl", lambda: f"trl.trainer.{trainer}")
    model = give(tiny(), "patch")
    with pytest.raises(RuntimeError, match="without labels") if refused else nullcontext():
        model(TOKENS)


# Trainers of TRL -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words() -> Any:
    """A tokenizer of V words."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(2, V))])}
    tokenizer = Tokenizer(WordLevel(vocabulary))
    tokenizer.pre_tokenizer = Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", bos_token="<eos>"
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


def llama(another: bool = False) -> Any:
    """A model with room for TRL's templates; or one that predicts differently, as a teacher or reference."""
    config = tiny().config
    config.max_position_embeddings = 64
    transformers.set_seed(1)
    model = transformers.LlamaForCausalLM(config)
    if another:
        nn.init.normal_(model.lm_head.weight)
    return model


TEXTS = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(2, 10)]
PAIRS = [{"prompt": t["prompt"], "chosen": t["completion"], "rejected": " w3"} for t in TEXTS]
MESSAGES = [
    {
        "messages": [
            {"role": "user", "content": t["prompt"]},
            {"role": "assistant", "content": t["completion"]},
        ]
    }
    for t in TEXTS
]
LABELLED = [{**t, "label": bool(i % 2)} for i, t in enumerate(TEXTS)]
PROMPTS = [{"prompt": t["prompt"]} for t in TEXTS]
ONLINE = {"num_generations": 2, "max_completion_length": 4}


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


# A trainer: its module, its rows, what its configuration says, and which argument is another model.
TRAINERS: dict[str, tuple[str, Any, dict[str, Any], str | None]] = {
    "DPO": ("trl", PAIRS, {}, "ref_model"),
    "KTO": ("trl", LABELLED, {}, "ref_model"),
    "GRPO": ("trl", PROMPTS, ONLINE, None),
    "RLOO": ("trl", PROMPTS, {**ONLINE, "beta": 0.0}, None),
    "Distillation": ("trl", PROMPTS, {"max_completion_length": 4}, "teacher_model"),
    "ORPO": ("trl.experimental.orpo", PAIRS, {}, None),
    "CPO": ("trl.experimental.cpo", PAIRS, {}, None),
    "GKD": ("trl.experimental.gkd", MESSAGES, {"lmbda": 0.0, "max_length": 32}, "teacher_model"),
}


def trained_by_trl(kind: str, way: str | None, words: Any, folder: Path) -> Tensor:
    """By how much two steps change the model."""
    module, rows, config, other = TRAINERS[kind]
    library, model = importlib.import_module(module), llama()
    start = weights_of(model)
    if way is not None:
        give(model, way)
    options: dict[str, Any] = {"reward_funcs": reward} if "num_generations" in config else {}
    if other is not None:
        options[other] = llama(another=True)
    common = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    arguments = getattr(library, f"{kind}Config")(output_dir=str(folder), **common, **DESCENT, **config)
    transformers.set_seed(3)
    trainer = getattr(library, f"{kind}Trainer")(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=words, **options
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return weights_of(model) - start


@pytest.mark.filterwarnings("ignore")  # TRL and its experiments have many
@pytest.mark.parametrize("kind", TRAINERS)
def test_trainers_with_another_loss_are_as_they_were(kind: str, words: Any, tmp_path: Path) -> None:
    """To the bit: nobody asks them for the criterion."""
    quiet()
    expected = trained_by_trl(kind, None, words, tmp_path)
    assert expected.norm() > 0
    for way in ("patch", "loss_function"):
        assert torch.equal(trained_by_trl(kind, way, words, tmp_path), expected)


@with_way
@pytest.mark.parametrize("how", ["train", "evaluate", "label_smoothing_factor", "compute_loss_func"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trls_sft_trainer_is_refused(how: str, way: str, words: Any, tmp_path: Path) -> None:
    quiet()
    smoothing = {"label_smoothing_factor": 0.1} if how == "label_smoothing_factor" else {}
    arguments = trl.SFTConfig(output_dir=str(tmp_path), bf16=False, **DESCENT, **smoothing)
    rows = Dataset.from_list(TEXTS)
    data = {"train_dataset": rows, "eval_dataset": rows, "processing_class": words, "args": arguments}
    by_trainer = compute_loss_func(NVAMPLoss()) if how == "compute_loss_func" else None
    trainer = trl.SFTTrainer(give(llama(), way), compute_loss_func=by_trainer, **data)
    with pytest.raises(RuntimeError, match=r"nvamp\.integrations\.trl\.SFTTrainer|without labels"):
        trainer.evaluate() if how == "evaluate" else trainer.train()
    if how == "train":
        with pytest.raises(ValueError, match="the model has a criterion of its own"):
            SFTTrainer(give(llama(), way), criterion=TokenLoss(NVAMP()), **data)


@pytest.mark.parametrize(
    ("criterion", "got"), [(NVAMPLoss(), "NVAMPLoss"), (TokenLoss, "the class TokenLoss")]
)
def test_a_criterion_of_another_kind_for_trl(criterion: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"such as TokenLoss\(NVAMP\(\)\), got {got}"):
        SFTTrainer("a model that is not read", criterion=criterion)


# Through wrappers ----------------------------------------------------------------------------------------


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def of_fabric(model: Any) -> Any:
    return lightning.Fabric(accelerator="cpu", devices=1).setup(model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.parametrize("wrap", [compiled, of_fabric, nn.DataParallel])
def test_wrapped_models(wrap: Any) -> None:
    """They are patched and restored as a whole, before they are wrapped or after."""
    own = float(tiny().train()(**BATCH).loss.detach())
    for first in (True, False):
        model = tiny().train()
        if first:
            patch(model, LinearLoss(NVAMP()))
        wrapped = wrap(model)
        if not first:
            patch(wrapped, LinearLoss(NVAMP()))
        outputs = wrapped(**BATCH)
        assert outputs.logits is None
        assert not math.isclose(outputs.loss.detach(), own, rel_tol=0.1)
        unpatch(wrapped)
        outputs = wrapped(**BATCH)
        assert outputs.logits is not None
        assert float(outputs.loss.detach()) == pytest.approx(own)
        assert "_loss_function" not in vars(model)
        assert type(model) is transformers.LlamaForCausalLM
    torch._dynamo.reset()


def test_which_of_two_models_is_asked() -> None:
    with pytest.raises(TypeError, match="or wrap one, got ModuleList, which holds several"):
        patch(nn.ModuleList([tiny(), tiny()]), LinearLoss(NVAMP()))
