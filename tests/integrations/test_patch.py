"""`patch`, `unpatch` and `loss_function`, each against the model as transformers has it."""

import copy
import inspect
import pickle
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from nvamp import LinearLoss, LinearNVAMPLoss, Loss, NVAMPLoss
from nvamp.integrations.transformers import compute_loss_func, loss_function, patch, patching, unpatch
from nvamp.integrations.transformers.model_loss import ModelLoss, watched_call
from nvamp.objectives import NVAMP, CrossEntropy, Gradient, Objective, TokenWeighted, parse
from nvamp.study.models import quiet
from nvamp.study.packing import noisy, plain
from nvamp.study.training import Recipe, training_arguments
from tests.integrations.architectures import Architecture, build
from tests.integrations.tiny import CROSS_ENTROPY, logged_losses, weights_of
from tests.parameters import with_gradient
from tests.study.conftest import one_thread

__all__ = ["one_thread"]

V, SEQ = 61, 12
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPTIONS: dict[str, Any] = {"alpha": 0.7, "beta": 0.3, "gamma": 0.2, "label_smoothing": 0.1, "z_loss": 1e-3}


def llama(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype).train()


@pytest.fixture
def model() -> Any:
    return llama()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, V, (3, SEQ), generator=g)
    labels = tokens.clone()
    labels[0, 4:7] = -100
    return {"input_ids": tokens, "labels": labels}


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    weights = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, weights, materialize_grads=True))


def of_logits(model: Any, batch: dict[str, Tensor], criterion: NVAMPLoss, **items: Any) -> list[Tensor]:
    """Loss and gradients by the model's own logits."""
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    loss = criterion(model(**inputs).logits, batch["labels"], **items)
    return [loss.detach(), *gradients(loss, model)]


def of_model(model: Any, batch: dict[str, Tensor], called: Any = None, **items: Any) -> list[Tensor]:
    """Loss and gradients as a patched model gives them: without logits."""
    outputs = (model if called is None else called)(**batch, **items)
    without_logits(outputs)
    return [outputs.loss.detach(), *gradients(outputs.loss, model)]


def without_logits(outputs: Any) -> None:
    assert outputs.logits is None
    assert "logits" not in outputs


def assert_same(found: list[Tensor], expected: list[Tensor], rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * 1e-2)


# The loss ----------------------------------------------------------------------------------------------


@with_gradient
def test_every_gradient_and_option(gradient: Gradient, model: Any, batch: dict[str, Tensor]) -> None:
    options = {**OPTIONS, "gradient": gradient, "softcap": 20.0, "logit_scale": 0.5}
    expected = of_logits(model, batch, NVAMPLoss(**options), num_items_in_batch=50)
    patch(model, LinearNVAMPLoss(**options))
    assert_same(of_model(model, batch, num_items_in_batch=torch.tensor(50)), expected)


def test_options_of_the_criterion_are_those_at_the_time(model: Any, batch: dict[str, Tensor]) -> None:
    criterion = LinearNVAMPLoss(**OPTIONS)
    expected = of_logits(model, batch, NVAMPLoss(**{**OPTIONS, "gamma": 3.0}))
    patch(model, criterion)
    criterion.gamma = 3.0
    assert_same(of_model(model, batch), expected)


@pytest.mark.parametrize("labels", [True, False])
def test_shifted_labels(labels: bool, model: Any, batch: dict[str, Tensor]) -> None:
    """As they come where a sequence is split over ranks: the labels beside them are not looked at."""
    shifted = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    expected = of_logits(model, {**batch, "labels": shifted}, NVAMPLoss(**OPTIONS, shift=False))
    wrong = torch.zeros_like(shifted)
    logits = model(batch["input_ids"]).logits
    loss = loss_function(NVAMPLoss(**OPTIONS), model)(
        logits, wrong if labels else None, vocab_size=V, shift_labels=shifted
    )
    assert_same([loss.detach(), *gradients(loss, model)], expected)
    patch(model, LinearNVAMPLoss(**OPTIONS))
    assert_same(of_model(model, {**batch, "labels": wrong, "shift_labels": shifted}), expected)


def test_labels_that_the_criterion_does_not_shift(model: Any, batch: dict[str, Tensor]) -> None:
    expected = of_logits(model, batch, NVAMPLoss(shift=False))
    patch(model, LinearNVAMPLoss(shift=False))
    assert_same(of_model(model, batch), expected)


def test_packed_sequences_are_the_sequences(model: Any) -> None:
    """Sequences in one row, told apart by their positions, the first label of each -100."""
    model.set_attn_implementation("eager")
    parts = [torch.randint(3, V, (1, n)) for n in (5, 7, 4)]
    rows = nn.utils.rnn.pad_sequence([p[0] for p in parts], batch_first=True, padding_value=0)
    labels = nn.utils.rnn.pad_sequence([p[0] for p in parts], batch_first=True, padding_value=-100)
    expected = of_logits(
        model, {"input_ids": rows, "attention_mask": (labels >= 0).long(), "labels": labels}, NVAMPLoss()
    )
    tokens = torch.cat(parts, dim=1)
    positions = torch.cat([torch.arange(p.shape[1]) for p in parts])[None]
    packed: dict[str, Any] = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
    patch(model, LinearNVAMPLoss())
    packed["labels"] = tokens.masked_fill(positions == 0, -100)
    assert_same(of_model(model, packed), expected, rtol=1e-6)  # the angles of positions are of float32


def test_a_model_with_a_cap_takes_no_other(batch: dict[str, Tensor]) -> None:
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES)).train()
    for option in ({"softcap": 10.0}, {"logit_scale": 0.5}):
        patch(model, LinearNVAMPLoss(**option))
        with pytest.raises(ValueError, match=r"Gemma2ForCausalLM caps or scales .*got softcap=.*logit_sc"):
            model(**batch)


def test_with_an_image() -> None:
    """The gradient reaches what sees it."""
    image = 98
    model = build(Architecture("LlavaForConditionalGeneration", {"image_token_index": image}))
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, image, (2, SEQ), generator=g)
    tokens[:, 2:6] = image  # a picture of 2 by 2 patches
    pixels = torch.randn(2, 3, 16, 16, generator=g).double()
    labels = tokens.masked_fill(tokens == image, -100)
    seen = {"input_ids": tokens, "pixel_values": pixels, "labels": labels}
    expected = of_logits(model, seen, NVAMPLoss())
    patch(model, LinearNVAMPLoss())
    assert_same(of_model(model, seen), expected)
    loss = model(**seen).loss
    (first,) = (name for name, _ in model.named_parameters() if name.endswith("patch_embedding.weight"))
    (by_pixels,) = torch.autograd.grad(loss, model.get_parameter(first))
    assert by_pixels.abs().sum() > 0


def test_under_autocast(batch: dict[str, Tensor]) -> None:
    model = llama(torch.float32)
    exact = of_logits(model, batch, NVAMPLoss())
    with torch.autocast("cpu", torch.bfloat16):
        logits = of_logits(model, batch, NVAMPLoss())
        patch(model, LinearNVAMPLoss())
        linear = of_model(model, batch)

    def off(found: list[Tensor]) -> float:
        pairs = zip(found, exact, strict=True)
        return max(float((f - e).norm() / e.norm()) for f, e in pairs)

    assert 0 < off(linear) <= 1.5 * off(logits)


# Any objective, and columns of the batch --------------------------------------------------------------

# An objective as text, and the columns of the batch that it takes.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "ce": (),
    "dft": (),
    "entropy:kind=mile": (),
    "token_weighted": ("token_weight",),
    "clipped_policy:clip=0.1,kl=0.2": ("advantage", "old_logprob", "ref_logprob"),
}
with_objective = pytest.mark.parametrize("objective", OBJECTIVES)


def columns_of(objective: str) -> dict[str, Tensor]:
    """Random numbers [3, SEQ], on the grid of the labels."""
    g = torch.Generator().manual_seed(1)
    random = {name: torch.randn(3, SEQ, generator=g, dtype=torch.float64) for name in OBJECTIVES[objective]}
    return {name: x - 4 if "logprob" in name else x for name, x in random.items()}


def by_hand(
    model: Any, batch: dict[str, Tensor], objective: str, columns: dict[str, Tensor], items: int | None
) -> list[Tensor]:
    """Loss and gradients by the formula of the objective, with autograd, of the model's own logits."""
    targets = batch["labels"][:, 1:]
    valid = targets >= 0
    p = model(batch["input_ids"]).logits[:, :-1][valid].log_softmax(-1)
    c = {name: x[:, 1:][valid] for name, x in columns.items()}
    nll, entropy = -p.gather(-1, targets[valid][:, None])[:, 0], -(p.exp() * p).sum(-1)
    match objective.partition(":")[0]:
        case "ce":
            losses = nll
        case "dft":
            losses = (-nll).exp().detach() * nll
        case "entropy":
            losses = (1 + entropy.detach()) * nll
        case "token_weighted":
            losses = c["token_weight"] * nll
        case _:
            ratio, delta = (-nll - c["old_logprob"]).exp(), c["ref_logprob"] + nll
            clipped = torch.minimum(ratio * c["advantage"], ratio.clamp(0.9, 1.1) * c["advantage"])
            losses = 0.2 * (delta.exp() - delta - 1) - clipped
    loss = losses.sum() / (items or len(losses))
    return [loss.detach(), *gradients(loss, model)]


@with_objective
@pytest.mark.parametrize("items", [None, 50])
def test_every_objective(objective: str, items: int | None, model: Any, batch: dict[str, Tensor]) -> None:
    columns = columns_of(objective)
    expected = by_hand(model, batch, objective, columns, items)
    number = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    model.loss_function = loss_function(Loss(parse(objective)), model)
    loss = model(**batch, **columns, **number).loss
    assert_same([loss.detach(), *gradients(loss, model)], expected)
    patch(model, LinearLoss(parse(objective)))
    assert_same(of_model(model, {**batch, **columns}, **number), expected)
    model.eval()
    loss = model(**batch, **columns, **number).loss
    assert_same([loss.detach(), *gradients(loss, model)], expected)


@pytest.mark.parametrize("objective", ["token_weighted", "clipped_policy:clip=0.1,kl=0.2"])
def test_columns_beside_shifted_labels_are_shifted(
    objective: str, model: Any, batch: dict[str, Tensor]
) -> None:
    columns = columns_of(objective)
    expected = by_hand(model, batch, objective, columns, None)
    shifted = {name: nn.functional.pad(x[:, 1:], (0, 1)) for name, x in columns.items()}
    batch = {
        **batch,
        "shift_labels": nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100),
        **shifted,
    }
    model.loss_function = loss_function(Loss(parse(objective)), model)
    loss = model(**batch).loss
    assert_same([loss.detach(), *gradients(loss, model)], expected)
    patch(model, LinearLoss(parse(objective)))
    assert_same(of_model(model, batch), expected)


@pytest.mark.parametrize("as_loss_function", [True, False])
def test_columns_that_do_not_fit_are_named(
    as_loss_function: bool, model: Any, batch: dict[str, Tensor]
) -> None:
    def give(objective: Any) -> None:
        if as_loss_function:
            model.loss_function = loss_function(Loss(objective), model)
        else:
            patch(model, LinearLoss(objective))

    give(TokenWeighted())
    with pytest.raises(TypeError, match=r"a column 'token_weight' in the batch.*remove_unused_columns=False"):
        model(**batch)
    with pytest.raises(ValueError, match=r"token_weight must have the shape of the labels, \[3, 12\]"):
        model(**batch, token_weight=torch.ones(3, SEQ - 1))
    give(CrossEntropy())
    with pytest.raises(TypeError, match="token_weight is not an input of CrossEntropy, which takes no"):
        model(**batch, token_weight=torch.ones(3, SEQ))


def test_compute_loss_func_does_not_see_columns() -> None:
    with pytest.raises(ValueError, match=r"needs advantage, but a Trainer .*patch\(model, LinearLoss"):
        compute_loss_func(Loss(parse("clipped_policy")))
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    loss = compute_loss_func(Loss(CrossEntropy()))({"logits": logits}, labels)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:]))


# What stays as it was ----------------------------------------------------------------------------------


def test_generation_is_untouched(model: Any, batch: dict[str, Tensor]) -> None:
    prompt = batch["input_ids"][:, :4]

    def generate() -> Tensor:
        generated: Tensor = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
        )
        return generated

    expected, logits = generate(), model(prompt).logits
    patch(model, LinearNVAMPLoss())
    for training in (True, False):
        model.train(training)
        assert torch.equal(generate(), expected)
        assert torch.equal(model.lm_head(model.model(prompt).last_hidden_state), logits)
        with torch.set_grad_enabled(not training):
            assert torch.equal(model(prompt).logits, logits)
            assert model(prompt).loss is None


def test_evaluation_has_logits_and_the_same_loss(model: Any, batch: dict[str, Tensor]) -> None:
    model.eval()
    expected = of_logits(model, batch, NVAMPLoss(**OPTIONS), num_items_in_batch=50)
    logits = model(**batch).logits
    patch(model, LinearNVAMPLoss(**OPTIONS))
    outputs = model(**batch, num_items_in_batch=50)
    assert torch.equal(outputs.logits, logits)
    assert_same([outputs.loss.detach(), *gradients(outputs.loss, model)], expected)


def test_tuples_lack_the_logits(model: Any, batch: dict[str, Tensor]) -> None:
    arguments = {**batch, "return_dict": False, "output_hidden_states": True, "use_cache": False}
    _, logits, hidden = model(**arguments)
    patch(model, LinearNVAMPLoss(**CROSS_ENTROPY))
    loss, patched = model(**arguments)
    torch.testing.assert_close(list(patched), list(hidden))
    assert_same([loss.detach()], [NVAMPLoss(**CROSS_ENTROPY)(logits, batch["labels"]).detach()])


def test_labels_by_position(model: Any, batch: dict[str, Tensor]) -> None:
    names = list(inspect.signature(model.forward).parameters)
    arguments = [batch.get(name) for name in names[: names.index("labels") + 1]]
    expected = of_logits(model, batch, NVAMPLoss())
    patch(model, LinearNVAMPLoss())
    outputs = model(*arguments)
    assert outputs.logits is None
    assert_same([outputs.loss.detach(), *gradients(outputs.loss, model)], expected)


def test_unpatch_restores(model: Any, batch: dict[str, Tensor]) -> None:
    def state() -> tuple[Any, ...]:
        head = model.lm_head
        return (
            type(model), set(vars(model)), model.forward, model.loss_function, repr(model),
            head, type(head), head.forward, set(vars(head)), inspect.signature(model.forward),
        )  # fmt: skip

    before, logits = state(), model(**batch).logits
    patch(model, LinearNVAMPLoss())
    assert inspect.signature(model.forward) == before[-1]
    assert repr(model) == before[4]
    assert isinstance(model, LlamaForCausalLM)
    patch(model, LinearNVAMPLoss(**CROSS_ENTROPY))  # a second takes the place of the first
    expected = model(**batch).loss
    unpatch(model)
    assert state() == before
    outputs = model(**batch)
    assert torch.equal(outputs.logits, logits)
    torch.testing.assert_close(expected, outputs.loss.double(), rtol=1e-6, atol=0)
    unpatch(model)
    assert state() == before


def test_a_loss_function_of_the_user_comes_back(model: Any, batch: dict[str, Tensor]) -> None:
    model.loss_function = own = loss_function(NVAMPLoss(**OPTIONS), model)
    loss = model(**batch).loss
    patch(model, LinearNVAMPLoss(**OPTIONS))
    assert_same([model(**batch).loss.detach()], [loss.detach()])
    unpatch(model)
    assert model.loss_function is own
    patch(model, LinearNVAMPLoss())
    model.loss_function = own  # theirs from now on, of logits
    assert model(**batch).logits is not None
    unpatch(model)
    assert model.loss_function is own
    assert type(model.lm_head) is nn.Linear
    del model._loss_function
    unpatch(model)
    assert type(model) is LlamaForCausalLM


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_patched_and_their_own(duplicate: Any, model: Any, batch: dict[str, Tensor]) -> None:
    patch(model, LinearNVAMPLoss(**OPTIONS))
    expected = of_model(model, batch)
    other = duplicate(model)
    assert_same(of_model(other, batch), expected)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert_same(of_model(model, batch), expected)
    unpatch(other)
    assert other(**batch).logits is not None
    assert model(**batch).logits is None


def test_it_is_saved_as_what_it_is(model: Any, batch: dict[str, Tensor], tmp_path: Path) -> None:
    patch(model, LinearNVAMPLoss())
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).train()
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config.architectures == ["LlamaForCausalLM"]
    logits = loaded(batch["input_ids"]).logits
    unpatch(model)
    assert torch.equal(logits, model(batch["input_ids"]).logits)


# What else trains a model ------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, model: Any, batch: dict[str, Tensor]) -> None:
    expected = of_logits(model, batch, NVAMPLoss())
    # The second is the name until transformers 5.10.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    patch(model, LinearNVAMPLoss())
    outputs = model(**batch)
    outputs.loss.backward()
    assert_same([outputs.loss.detach(), *(p.grad for p in model.parameters())], expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("backend", "whole"), [("eager", True), ("aot_eager", True), ("eager", False)])
@pytest.mark.parametrize("objective", [NVAMP(0.7, 0.3, 0.2), TokenWeighted()])
def test_compiled(
    objective: Objective, backend: str, whole: bool, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patching, "_state", patching._State())  # as before any call of a patched model
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**{**SIZES, "num_hidden_layers": 1})).double().train()
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    columns = {name: torch.rand(3, SEQ) for name in objective.inputs}
    logits = model(batch["input_ids"]).logits
    loss = Loss(objective, **options)(logits, batch["labels"], **columns)
    expected = [loss.detach(), *gradients(loss, model)]
    batch = {**batch, **columns}
    patch(model, LinearLoss(objective, **options))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=whole)
    if not whole:
        model.lm_head.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())
    for _ in range(2):
        outputs = compiled(**batch)
        assert_same([outputs.loss.detach(), *gradients(outputs.loss, model)], expected)
        if whole or torch.__version__ >= "2.13":  # 2.11 leaves the call under way where the graph breaks
            without_logits(outputs)
        with torch.no_grad():
            assert compiled(batch["input_ids"]).logits is not None
    torch._dynamo.reset()


def test_accelerate_keeps_the_patch(batch: dict[str, Tensor]) -> None:
    """Mixed precision wraps the forward, and unwrapping looks for what was wrapped."""
    model = llama(torch.float32)
    patch(model, LinearNVAMPLoss())
    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer of another test has set its precision
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(model)
    loss = prepared(**batch)
    assert loss.logits is None
    assert loss.loss.dtype == torch.float32
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert model(**batch).logits is None
    unpatch(model)
    assert model(**batch).logits is not None


def trained(folder: Path, patched: bool) -> tuple[Tensor, Tensor, float]:
    """Weights, logged losses and loss in evaluation of a Trainer, under cross-entropy."""
    quiet()
    g = torch.Generator().manual_seed(0)
    blocks = torch.randint(3, V, (24, SEQ), generator=g)
    data = noisy(plain(blocks), V, 0.2, 0)
    model = llama(torch.float32)
    if patched:
        patch(model, LinearNVAMPLoss(**CROSS_ENTROPY))
    arguments = training_arguments(Recipe(3, 4, 1e-2), 0, torch.device("cpu"), str(folder))
    arguments.gradient_accumulation_steps = 2
    arguments.logging_strategy, arguments.logging_steps = "steps", 1
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    assert (model(blocks, labels=blocks).logits is None) == patched
    return weights_of(model), logged_losses(trainer), trainer.evaluate()["eval_loss"]


def test_the_trainer_trains_the_same_weights(tmp_path: Path) -> None:
    weights, logged, evaluated = trained(tmp_path, patched=True)
    own_weights, own_logged, own_evaluated = trained(tmp_path, patched=False)
    assert len(logged) == 3
    torch.testing.assert_close(logged, own_logged, rtol=1e-5, atol=0)
    assert evaluated == pytest.approx(own_evaluated, rel=1e-5)
    start = weights_of(llama(torch.float32))
    assert (weights - own_weights).norm() <= 1e-4 * (own_weights - start).norm()


# PEFT --------------------------------------------------------------------------------------------------


def lora(model: Any, **options: Any) -> Any:
    """A LoRA of the attention, whose product is not zero."""
    config = peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})
    adapted = peft.get_peft_model(model, config).double().train()
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(weight, std=0.3)
    return adapted


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
@pytest.mark.parametrize("first", ["patch", "peft"])
def test_lora(first: str, saved: list[str] | None, batch: dict[str, Tensor]) -> None:
    expected = of_logits(lora(llama(), modules_to_save=saved), batch, NVAMPLoss())
    model = llama()
    if first == "patch":
        patch(model, LinearNVAMPLoss())
    adapted = lora(model, modules_to_save=saved)
    if first == "peft":
        patch(adapted, LinearNVAMPLoss())
    assert_same(of_model(adapted, batch), expected)
    assert ("lm_head" in "".join(n for n, p in adapted.named_parameters() if p.requires_grad)) == bool(saved)
    unpatch(adapted)
    outputs = adapted(**batch)
    assert outputs.logits is not None
    assert all("_nvamp_unpatched" not in vars(type(module)) for module in adapted.modules())


# What is refused, and what a call leaves alone ---------------------------------------------------------


class Quantized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.round())


class QuantizedTensor(torch.Tensor):
    """In a plain layer, as torchao's are."""


def test_refused_before_it_begins(model: Any) -> None:
    before = dict(vars(model))
    with pytest.raises(
        TypeError, match=r"must be a LinearLoss, such as LinearLoss\(NVAMP\(\)\), got NVAMPLoss"
    ):
        patch(model, NVAMPLoss())  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="must be a transformers model or a PeftModel, or wrap one, got Linear"
    ):
        patch(nn.Linear(2, 3), LinearNVAMPLoss())
    with pytest.raises(TypeError, match=r"LlamaModel .*no loss: its forward takes no labels"):
        patch(model.model, LinearNVAMPLoss())
    head, model.lm_head = model.lm_head, Quantized(16, V)
    with pytest.raises(TypeError, match=r"plain torch.nn.Linear, .* got .*test_patch.Quantized: use a loss"):
        patch(model, LinearNVAMPLoss())
    model.lm_head = head
    head.forward = head.forward
    with pytest.raises(
        TypeError, match=r"got .*Linear whose forward has been replaced by Linear\.forward: use"
    ):
        patch(model, LinearNVAMPLoss())
    del head.forward
    weight, head.weight = head.weight, nn.Parameter(head.weight.detach().as_subclass(QuantizedTensor))
    with pytest.raises(TypeError, match=r"got .*Linear whose weight is a .*test_patch.QuantizedTensor: use"):
        patch(model, LinearNVAMPLoss())
    head.weight = weight
    assert vars(model) == before
    assert type(model) is LlamaForCausalLM
    model.forward = model.forward
    with pytest.raises(TypeError, match="the forward of this LlamaForCausalLM has been replaced"):
        patch(model, LinearNVAMPLoss())


class WithEntropy(LlamaForCausalLM):
    """What somebody's own model may do with its logits."""

    def forward(self, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(**kwargs)
        outputs.loss = self.loss_function(outputs.logits, labels, V) + outputs.logits.softmax(-1).sum()
        return outputs


class WithoutLoss(LlamaForCausalLM):
    def forward(self, labels: Any = None, **kwargs: Any) -> Any:
        return super().forward(**kwargs)


class WithSigmoid(LlamaForCausalLM):
    def forward(self, labels: Any = None, **kwargs: Any) -> Any:
        logits = super().forward(**kwargs).logits
        return (self.loss_function(torch.sigmoid(logits), labels, V),)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (
            WithEntropy,
            r"WithEntropy needs its logits for 'softmax', .* or loss_function\(Loss\(\.\.\.\), model\)$",
        ),
        (WithoutLoss, "WithoutLoss computed no loss of its logits"),
        (WithSigmoid, "WithSigmoid needs its logits for 'sigmoid'"),
    ],
)
def test_refused_in_training(cls: Any, message: str, batch: dict[str, Tensor]) -> None:
    model = cls(LlamaConfig(**SIZES)).train()
    patch(model, LinearNVAMPLoss())
    with pytest.raises(NotImplementedError, match=message):
        model(**batch)
    assert isinstance(model.lm_head(torch.ones(1, 16)), Tensor)  # the call is over


def test_a_new_output_layer_has_to_be_patched(model: Any, batch: dict[str, Tensor]) -> None:
    patch(model, LinearNVAMPLoss())
    model.resize_token_embeddings(V + 3, mean_resizing=False)
    with pytest.raises(
        NotImplementedError, match=r"output layer of LlamaForCausalLM has been replaced, .*: patch again"
    ):
        model(**batch)
    patch(model, LinearNVAMPLoss(), logits_without_labels=True)
    expected = of_logits(model, batch, NVAMPLoss())
    assert_same(of_model(model, batch), expected)


def test_a_teacher_within_the_model_keeps_its_logits(batch: dict[str, Tensor]) -> None:
    """A patched model in evaluation, called while another trains; and that one's layer on another thread."""
    student, teacher = llama(), llama().eval()
    expected = teacher(batch["input_ids"]).logits
    for model in (student, teacher):
        patch(model, LinearNVAMPLoss())
    seen: list[Any] = []

    def call(*_: Any) -> None:
        outputs = teacher(**batch)
        seen.extend((outputs.logits, outputs.loss))
        other = threading.Thread(target=lambda: seen.append(student.lm_head(torch.ones(1, 16).double())))
        other.start()
        other.join()

    student.model.register_forward_hook(call)
    assert student(**batch).logits is None
    logits, loss, of_thread = seen
    assert torch.equal(logits, expected)
    assert_same([loss.detach()], [NVAMPLoss()(expected, batch["labels"]).detach()])
    assert isinstance(of_thread, Tensor)


# loss_function -----------------------------------------------------------------------------------------


def test_a_call_of_another_loss_does_not_count() -> None:
    """Of a teacher with a criterion of its own, for example."""
    student, teacher = (ModelLoss(NVAMPLoss()) for _ in range(2))
    logits, labels = torch.zeros(1, 3, 5), torch.ones(1, 3, dtype=torch.long)
    with watched_call(student) as call:
        teacher(logits, labels)
        assert not call.loss_was_called
        student(logits, labels)
        assert call.loss_was_called


@pytest.mark.parametrize("items", [{}, {"num_items_in_batch": torch.tensor(50)}])
def test_loss_function_is_called_as_transformers_own(
    items: dict[str, Tensor], model: Any, batch: dict[str, Tensor]
) -> None:
    expected = model(**batch, **items).loss
    expected_gradients = gradients(expected, model)
    model.loss_function = loss_function(NVAMPLoss(**CROSS_ENTROPY), model)
    outputs = model(**batch, **items)
    assert outputs.logits.shape == (3, SEQ, V)
    found = [outputs.loss.detach(), *gradients(outputs.loss, model)]
    assert_same(found, [expected.detach().double(), *expected_gradients], rtol=1e-5)


def test_errors_of_loss_function(batch: dict[str, Tensor]) -> None:
    logits, labels = torch.randn(3, SEQ, V), batch["labels"]
    with pytest.raises(ValueError, match="neither labels nor shift_labels"):
        loss_function(NVAMPLoss(), None)(logits, None)
    with pytest.raises(ValueError, match="has ignore_index=-100, the model asks for 7"):
        loss_function(NVAMPLoss(), None)(logits, labels, ignore_index=7)
    with pytest.raises(TypeError, match="need a Loss, got <function ForCausalLMLoss"):
        loss_function(ForCausalLMLoss, None)(logits, labels, shift_labels=labels)
