"""Output layers other than a plain `Linear`, each against the logits of the model that is not patched."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nvamp import LinearLoss, Loss, NVAMPLoss
from nvamp.integrations.transformers import heads, patch, patching, unpatch
from nvamp.integrations.transformers.deferred import DeferredLogits, Product
from nvamp.objectives import NVAMP, parse
from nvamp.study.models import quiet
from tests.integrations.test_patch import (
    SEQ,
    SIZES,
    V,
    assert_same,
    batch,
    gradients,
    llama,
    lora,
    of_logits,
    of_model,
)
from tests.ranks import on_ranks

__all__ = ["batch"]

HEAD: dict[str, Any] = {"target_modules": ["q_proj", "lm_head"]}
LINEAR = LinearLoss(NVAMP())


def tied() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).double().train()


def two_adapters() -> Any:
    """Both active, of different ranks and scales."""
    model = lora(llama(), **HEAD)
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **HEAD))
    model.double().base_model.set_adapter(["default", "second"])
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B.second" in name:
            nn.init.normal_(weight, std=0.3)
    return model


def disabled() -> Any:
    model = lora(llama(), **HEAD).requires_grad_(True)
    model.base_model.disable_adapter_layers()
    return model.requires_grad_(True)


def merged() -> Any:
    model = lora(llama(), **HEAD)
    model.merge_adapter()
    return model.requires_grad_(True)


def trainable_tokens() -> Any:
    """The method of PEFT that trains nothing else, on embeddings that are the output layer's weight too."""
    config = peft.TrainableTokensConfig(token_indices=[3, 4, 5], target_modules=["embed_tokens"])
    model = peft.get_peft_model(tied(), config).double().train()
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.3)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "lora": lambda: lora(llama(), **HEAD),
    "lora with dropout": lambda: lora(llama(), lora_dropout=0.3, **HEAD),
    "lora with bias": lambda: lora(llama(), lora_bias=True, lora_alpha=3, **HEAD),
    "two adapters": two_adapters,
    "disabled": disabled,
    "merged": merged,
    "lora of tied weights": lambda: lora(tied(), **HEAD),
    "trainable tokens": trainable_tokens,
    "trainable tokens beside lora": lambda: lora(tied(), trainable_token_indices=[3, 4]),
    "trainable tokens of the layer alone": lambda: lora(llama(), trainable_token_indices={"lm_head": [3, 4]}),
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Model has `tie_word_embeddings")
@pytest.mark.parametrize("name", MODELS)
def test_adapters(name: str, batch: dict[str, Tensor]) -> None:
    unpatched, model = MODELS[name](), MODELS[name]()
    torch.manual_seed(5)  # so that the dropout of an adapter draws the same numbers
    expected = of_logits(unpatched, batch, NVAMPLoss())
    before = {key: type(module) for key, module in model.named_modules()}
    patch(model, LINEAR)
    torch.manual_seed(5)
    assert_same(of_model(model, batch), expected)
    unpatch(model)
    assert {key: type(module) for key, module in model.named_modules()} == before


@pytest.fixture
def adapted() -> Any:
    model = lora(llama(), **HEAD)
    patch(model, LINEAR)
    return model


def test_a_sum_of_products_of_several_scales_is_one_product() -> None:
    """With the scale of the first left to the loss."""
    torch.manual_seed(0)
    layer, adapter, hidden = nn.Linear(4, 7), nn.Linear(3, 7), torch.randn(2, 4)
    run = patching._Call(
        "a model", patching._LinearModelLoss(LinearLoss(NVAMP()), True, False, None, True), [], {}
    )
    own, added = (
        DeferredLogits((Product(x, of),), run) for x, of in ((hidden, layer), (hidden[:, :3], adapter))
    )
    logits = (own + added * 2) * 0.5
    head = heads.head_of(logits)
    assert logits.options == {"logit_scale": 0.5}
    torch.testing.assert_close(
        nn.functional.linear(head.hidden, head.weight, head.bias), layer(hidden) + 2 * adapter(hidden[:, :3])
    )


def test_copies_of_an_adapted_layer(adapted: Any, batch: dict[str, Tensor]) -> None:
    expected = of_model(adapted, batch)
    for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert_same(of_model(other, batch), expected)
        logits = adapted.eval()(**batch).logits
        assert torch.equal(other.eval()(**batch).logits, logits)
        adapted.train()
    alone = adapted.merge_and_unload().requires_grad_(True)
    assert alone(**batch).logits is None
    assert_same([alone(**batch).loss.detach()], expected[:1])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_an_adapted_layer_is_compiled(
    adapted: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = of_model(adapted, batch)
    monkeypatch.setattr(patching, "_state", patching._State())  # as before any call of a patched model
    torch._dynamo.reset()
    compiled = torch.compile(adapted, backend="aot_eager", fullgraph=True)
    assert_same(of_model(adapted, batch, compiled), expected)
    torch._dynamo.reset()


def test_a_small_update_of_a_half_precision_weight_is_not_lost() -> None:
    """Added to the weight, most of it would be rounded away: less than half a step of an entry."""
    model = peft.get_peft_model(llama(torch.bfloat16), peft.LoraConfig(task_type="CAUSAL_LM", **HEAD))
    patch(model, LINEAR)
    layer = model.get_base_model().lm_head
    a, b = (adapters["default"].weight for adapters in (layer.lora_A, layer.lora_B))
    torch.manual_seed(1)
    nn.init.normal_(b, std=1e-5)
    assert b.dtype == torch.float32
    weight = layer.base_layer.weight
    assert (weight + (b @ a).bfloat16() == weight).float().mean() > 0.9
    hidden = torch.randn(5, 16).bfloat16()
    found = heads.head_of(heads.deferred(layer, layer._nvamp_unpatched.forward, hidden, "Llama"))
    with torch.no_grad():
        of_weight = hidden.double() @ weight.double().T
        update = layer.scaling["default"] * (hidden.double() @ a.double().T @ b.double().T)
        off = found.hidden.double() @ found.weight.double().T - of_weight - update
    assert found.weight.dtype == found.hidden.dtype == torch.bfloat16
    assert 0 < off.norm() <= 2**-7 * update.norm()


# What is refused ---------------------------------------------------------------------------------------


def with_hook(model: Any) -> None:
    add_hook_to_module(model.lm_head, ModelHook())


def with_own_forward(model: Any) -> None:
    model.lm_head.forward = with_hook


def with_two_tensors(model: Any) -> None:
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = nn.Parameter(TwoTensor(weight, weight.clone()))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (partial(lora, use_dora=True, **HEAD), r"peft.tuners.lora.layer.Linear with DoraLinearVariant"),
        (with_hook, "Linear whose forward has been replaced by accelerate.hooks.ModelHook"),
        (with_own_forward, "Linear whose forward has been replaced by with_hook"),
        (with_two_tensors, r"Linear whose weight is a torch.testing._internal.two_tensor.TwoTensor"),
    ],
)
def test_refused_by_name(change: Callable[[Any], None], what: str) -> None:
    model = llama()
    change(model)
    with pytest.raises(
        TypeError, match=f"output layer of LlamaForCausalLM must be .*, got .*{what}: use a loss"
    ):
        patch(model, LINEAR)
    assert type(model) is LlamaForCausalLM


def test_an_adapter_that_comes_later_needs_a_second_patch(batch: dict[str, Tensor]) -> None:
    model = llama()
    patch(model, LINEAR)
    adapted = lora(model, **HEAD)
    with pytest.raises(NotImplementedError, match=r"been given an adapter, since .*: patch again"):
        adapted(**batch)
    patch(adapted, LINEAR)
    assert_same(of_model(adapted, batch), of_logits(lora(llama(), **HEAD), batch, NVAMPLoss()))


# Four bits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
def test_four_bits(adapter: bool, batch: dict[str, Tensor]) -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def made() -> Any:
        model = llama(torch.float32)
        head = bnb.nn.Linear4bit(16, V, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        head.load_state_dict(model.lm_head.state_dict())
        model.lm_head = head.to("cpu")
        model.is_loaded_in_4bit = True  # PEFT then has a class of its own for the layer
        if not adapter:
            return model
        made = peft.get_peft_model(model, peft.LoraConfig(lora_dropout=0.3, task_type="CAUSAL_LM", **HEAD))
        torch.manual_seed(1)
        for name, weight in made.train().named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.3)
        return made

    unpatched, model = made(), made()
    torch.manual_seed(5)
    expected = of_logits(unpatched, batch, NVAMPLoss())
    patch(model, LINEAR)
    torch.manual_seed(5)
    assert_same(of_model(model, batch), expected, rtol=1e-5)
    kind = type(model.get_base_model().lm_head if adapter else model.lm_head)
    assert kind.__module__ == ("peft.tuners.lora.bnb" if adapter else "bitsandbytes.nn.modules")
    refused = llama()
    refused.lm_head = bnb.nn.Linear8bitLt(16, V, bias=False)
    with pytest.raises(TypeError, match=r"got bitsandbytes.nn.modules.Linear8bitLt"):
        patch(refused, LINEAR)


# Evaluation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
def test_no_logits_in_evaluation(grad: bool, batch: dict[str, Tensor]) -> None:
    model = llama().eval()
    expected, logits = of_logits(model, batch, NVAMPLoss()), model(**batch).logits
    patch(model, LINEAR, eval_logits=False)
    with torch.set_grad_enabled(grad):
        outputs = model(**batch)
    assert outputs.logits is None
    assert_same(
        [outputs.loss.detach(), *(gradients(outputs.loss, model) if grad else [])],
        expected[: None if grad else 1],
    )
    assert torch.equal(model(batch["input_ids"]).logits, logits)  # as in generation
    patch(model, LINEAR)
    assert torch.equal(model(**batch).logits, logits)


# tp_plan -----------------------------------------------------------------------------------------------

OBJECTIVES = ("nvamp:alpha=0.7,beta=0.3,gamma=0.2,tail=0.1", "ce", "entropy", "dft")


def of_loss(loss: Tensor, model: Any) -> list[Tensor]:
    """The loss and the gradients of all parameters, each in whole."""
    loss.backward()
    grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    model.zero_grad()
    return [loss.detach(), *grads]


def on_a_rank(rank: int, world: int, folder: Path, columns: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    quiet()
    found = {}
    for weights in ("untied", "tied"):
        model = AutoModelForCausalLM.from_pretrained(folder / weights, tp_plan="auto", dtype=torch.float64)
        before = dict(vars(model.lm_head))
        with pytest.raises(ValueError, match="vocab_group must be None for a model with a tp_plan"):
            patch(model, LinearLoss(NVAMP(), vocab_group=dist.group.WORLD))
        for objective in OBJECTIVES:
            patch(model, LinearLoss(parse(objective)))
            outputs = model.train()(**columns)
            assert outputs.logits is None
            found[f"{weights}, {objective}"] = of_loss(outputs.loss, model)
            outputs = model.eval()(**columns)
            assert outputs.logits.shape == (3, SEQ, V)
            found[f"{weights}, {objective}, in evaluation"] = of_loss(outputs.loss, model)
        unpatch(model)
        assert {**vars(model.lm_head), "training": True} == {**before, "training": True}
    fsdp_is_told_apart(columns)
    return found


def fsdp_is_told_apart(columns: dict[str, Tensor]) -> None:
    """An adapted layer in a unit of its own is refused, and in the root's unit it has its gradients."""
    expected = of_logits(lora(llama(), **HEAD), columns, NVAMPLoss())
    for apart in (False, True):
        model = lora(llama(), **HEAD)
        patch(model, LINEAR)
        inner = model.get_base_model()
        for part in (*inner.model.layers, *([inner.lm_head] if apart else []), inner):
            fully_shard(part)
        if apart:
            with pytest.raises(NotImplementedError, match="under FSDP leave the layer in the root's unit"):
                inner(**columns)
        else:
            loss = inner(**columns).loss
            loss.backward()
            grads = [p.grad.full_tensor() for p in model.parameters() if p.requires_grad]
            assert_same([loss.detach(), *grads], expected)


def test_a_vocabulary_that_tp_plan_has_split(tmp_path: Path, batch: dict[str, Tensor]) -> None:
    """An odd number of classes, so that the parts are not alike."""
    models = {"untied": llama(), "tied": tied()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    (tmp_path / "ranks").mkdir()
    for found in on_ranks(partial(on_a_rank, folder=tmp_path, columns=batch), 2, tmp_path / "ranks"):
        assert len(found) == 2 * 2 * len(OBJECTIVES)
        for name, values in found.items():
            weights, objective = name.split(", ")[:2]
            model = models[weights]
            loss = Loss(parse(objective))(model(batch["input_ids"]).logits, batch["labels"])
            assert_same(values, of_loss(loss, model))
