"""The causal language models of transformers under `patch`, each tiny: what docs/architectures.md lists.

    python -m tests.integrations.architectures > docs/architectures.md

runs all of them and writes that page; the tests fail if it differs from what they find.
"""

import inspect
import re
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from nvamp import LinearLoss, Loss
from nvamp.integrations.transformers import patch, unpatch
from nvamp.objectives import NVAMP, CrossEntropy, TokenWeighted

VOCABULARY, TOKENS = 99, (2, 9)

# What configurations call their sizes.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "n_positions": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "decoder_ffn_dim", "embed_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "attention_heads"), 4), "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    "num_experts_per_tok": 2, **dict.fromkeys(("state_size", "mamba_d_state", "mamba_d_head"), 8),
    "mamba_n_heads": 8, "is_decoder": True, "output_router_logits": True, "image_size": 16, "patch_size": 8,
    "router_jitter_noise": 0.0, "input_jitter_noise": 0.0, "use_cache": False,
}  # fmt: skip


class Architecture(NamedTuple):
    """A class of transformers, and what of its configuration is not in `SIZES`."""

    name: str
    config: dict[str, Any] = {}  # noqa: RUF012  # a field of a tuple


_MROPE = {
    "text_config": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    }
}

LANGUAGE = [
    Architecture(name, dict(config))
    for name, config in {
        "AfmoeForCausalLM": {},
        "ApertusForCausalLM": {},
        "ArceeForCausalLM": {},
        "AriaTextForCausalLM": {},
        "BambaForCausalLM": {},
        "BertLMHeadModel": {},
        "BioGptForCausalLM": {},
        "BitNetForCausalLM": {},
        "BloomForCausalLM": {},
        "CodeGenForCausalLM": {},
        "CohereForCausalLM": {},
        "Cohere2ForCausalLM": {},
        "CwmForCausalLM": {},
        "DeepseekV2ForCausalLM": {},
        "DeepseekV3ForCausalLM": {},
        "DiffLlamaForCausalLM": {},
        "DogeForCausalLM": {},
        "ElectraForCausalLM": {},
        "Ernie4_5ForCausalLM": {},
        "Ernie4_5_MoeForCausalLM": {},
        "Exaone4ForCausalLM": {},
        "FalconForCausalLM": {},
        "FalconMambaForCausalLM": {},
        "FlexOlmoForCausalLM": {},
        "GemmaForCausalLM": {},
        "Gemma2ForCausalLM": {},
        "Gemma3ForCausalLM": {"final_logit_softcapping": 30.0},
        "GlmForCausalLM": {},
        "Glm4ForCausalLM": {},
        "Glm4MoeForCausalLM": {},
        "GPT2LMHeadModel": {},
        "GPTBigCodeForCausalLM": {},
        "GPTJForCausalLM": {},
        "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
        "GPTNeoXForCausalLM": {},
        "GptOssForCausalLM": {},
        "GraniteForCausalLM": {"logits_scaling": 8.0},
        "GraniteMoeForCausalLM": {"logits_scaling": 8.0},
        "GraniteMoeSharedForCausalLM": {"logits_scaling": 8.0},
        "HeliumForCausalLM": {},
        "HunYuanDenseV1ForCausalLM": {},
        "HunYuanMoEV1ForCausalLM": {},
        "JambaForCausalLM": {},
        "JetMoeForCausalLM": {},
        "Lfm2ForCausalLM": {},
        "LlamaForCausalLM": {},
        "MambaForCausalLM": {},
        "Mamba2ForCausalLM": {"num_heads": 8},
        "MiniMaxForCausalLM": {},
        "MinistralForCausalLM": {},
        "MistralForCausalLM": {},
        "MixtralForCausalLM": {},
        "ModernBertDecoderForCausalLM": {},
        "MptForCausalLM": {},
        "NanoChatForCausalLM": {},
        "NemotronForCausalLM": {},
        "OlmoForCausalLM": {},
        "Olmo2ForCausalLM": {},
        "Olmo3ForCausalLM": {},
        "OlmoeForCausalLM": {},
        "OPTForCausalLM": {},
        "PersimmonForCausalLM": {},
        "PhiForCausalLM": {},
        "Phi3ForCausalLM": {},
        "PhimoeForCausalLM": {},
        "Qwen2ForCausalLM": {},
        "Qwen2MoeForCausalLM": {},
        "Qwen3ForCausalLM": {},
        "Qwen3MoeForCausalLM": {},
        "RecurrentGemmaForCausalLM": {},
        "RobertaForCausalLM": {},
        "SeedOssForCausalLM": {},
        "SmolLM3ForCausalLM": {},
        "StableLmForCausalLM": {},
        "Starcoder2ForCausalLM": {},
        "VaultGemmaForCausalLM": {},
        "xLSTMForCausalLM": {},
    }.items()
]
VISION = [
    Architecture(name, dict(config))
    for name, config in {
        "AyaVisionForConditionalGeneration": {},
        "Gemma3ForConditionalGeneration": {},
        "Idefics3ForConditionalGeneration": {},
        "InternVLForConditionalGeneration": {},
        "LlavaForConditionalGeneration": {},
        "LlavaOnevisionForConditionalGeneration": {},
        "Mistral3ForConditionalGeneration": {},
        "MllamaForConditionalGeneration": {},
        "PaliGemmaForConditionalGeneration": {},
        "Qwen2VLForConditionalGeneration": _MROPE,
        "Qwen2_5_VLForConditionalGeneration": _MROPE,
        "Qwen3VLForConditionalGeneration": {},
        "Qwen3VLMoeForConditionalGeneration": {},
        "SmolVLMForConditionalGeneration": {},
    }.items()
]
REFUSED = [
    Architecture("BambaForCausalLM", {"z_loss_coefficient": 0.001}),
    Architecture("BartForCausalLM"),
    Architecture("ChameleonForConditionalGeneration", {"vocabulary_map": {"<image>": 4, "IMGIMGA": 5}}),
    Architecture("CpmAntForCausalLM"),
    Architecture("ProphetNetForCausalLM"),
    Architecture("T5GemmaForConditionalGeneration"),
    Architecture("WhisperForCausalLM"),
    Architecture("XLMWithLMHeadModel"),
    Architecture("XLNetLMHeadModel"),
]


class Result(NamedTuple):
    """What a run of a patched model found."""

    softcap: float | None
    logit_scale: float
    bias: bool
    tied: bool
    auxiliary: bool  # a loss of the router in the model's own
    errors: dict[str, float]  # of losses and gradients, by what they were compared with


def build(architecture: Architecture) -> Any:
    """The model in float64, in training, without dropout."""
    cls = getattr(transformers, architecture.name)
    config = tiny(cls.config_class, architecture.config)
    config._experts_implementation = "eager"  # grouped products are not for float64
    torch.manual_seed(0)
    return cls(config).double().train()


def tiny(config_class: Any, own: dict[str, Any]) -> Any:
    """A configuration with the sizes of `SIZES`, and those of the configurations in it."""
    default = config_class()
    values: dict[str, Any] = {}
    inner: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, transformers.PreTrainedConfig):
            inner[name] = {**tiny(type(value), own.get(name, {})).to_dict(), "model_type": value.model_type}
        elif "drop" in name and isinstance(value, float):
            values[name] = 0.0
        elif name == "layer_types" and value:
            values[name] = (list(dict.fromkeys(value)) * 2)[:2]  # one of each kind
    names = set(inspect.signature(config_class).parameters) | {*vars(default)}
    aliases = getattr(config_class, "attribute_map", {})
    values |= {k: v for k, v in SIZES.items() if k in names or k in aliases}
    if hasattr(default, "qk_rope_head_dim"):
        values["num_key_value_heads"] = 4
    return config_class(**{**values, **own, **inner})


class NoLogits(TorchDispatchMode):
    """Fails if an operator returns something as large as the logits; it does not look into the engine's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor) and x.shape[-1:] == (VOCABULARY,):
                assert x.numel() != VOCABULARY * TOKENS[0] * TOKENS[1], f"{func} made logits"
        return result


def run(architecture: Architecture) -> Result:
    """Loss and gradients of the patched model beside those of the model's own logits."""
    model = build(architecture)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, TOKENS, generator=generator)
    labels = tokens.clone()
    labels[0, :3] = -100
    batch = {"input_ids": tokens, "labels": labels}
    parameters = inspect.signature(model.forward).parameters.values()
    takes_items = any(p.kind == p.VAR_KEYWORD for p in parameters)  # as the Trainer decides it
    items = {"num_items_in_batch": torch.tensor(23)} if takes_items else {}
    weights = [p for p in model.parameters() if p.requires_grad]

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True))

    own = model(**batch, **items)
    entropy = ForCausalLMLoss(own.logits, labels, VOCABULARY, **items)
    nvamp = Loss(NVAMP())(own.logits, labels) + (own.loss - entropy)
    truth = {"cross-entropy": own.loss, "NVAMP": nvamp}
    truth_gradients = {name: gradients(loss) for name, loss in truth.items()}

    errors = {}
    for name, criterion, given in (
        ("cross-entropy", LinearLoss(CrossEntropy()), items),
        ("NVAMP", LinearLoss(NVAMP()), {}),
    ):
        patch(model, criterion)
        with NoLogits(), mock.patch.object(criterion, "_of_hidden", wraps=criterion._of_hidden) as linear:
            outputs = model(**batch, **given)
            found = gradients(outputs.loss)
        assert outputs.logits is None
        errors[name] = _error([outputs.loss, *found], [truth[name], *truth_gradients[name]])
    check_columns(model, batch)
    unpatch(model)
    (*_, bias, _), options = linear.call_args
    return Result(
        softcap=options.get("softcap"),
        logit_scale=options.get("logit_scale", 1.0),
        bias=bias is not None,
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        auxiliary=abs((own.loss - entropy).item()) > 1e-5,
        errors=errors,
    )


def check_columns(model: Any, batch: dict[str, Tensor]) -> None:
    """Fails if a column of the batch, weights of its tokens, does not reach the loss."""
    patch(model, LinearLoss(TokenWeighted()))
    weights = [torch.full(batch["labels"].shape, weight, dtype=torch.float64) for weight in (0.0, 1.0, 2.0)]
    none, once, twice = (model(**batch, token_weight=weight).loss for weight in weights)
    torch.testing.assert_close(twice - none, 2 * (once - none))
    assert once != none


def _error(found: list[Tensor], truth: list[Tensor]) -> float:
    """The largest error of a tensor, relative to its norm, or to a thousandth of the largest norm."""
    largest = max(t.norm().item() for t in truth)
    return max(
        ((f - t).norm() / max(t.norm().item(), 1e-3 * largest)).item()
        for f, t in zip(found, truth, strict=True)
    )


def row(architecture: Architecture) -> str:
    """What a run found, as a line of the page."""
    r = run(architecture)
    assert max(r.errors.values()) < 1e-5, r.errors  # the cross-entropy of transformers is one of float32
    agreement = "1e-12" if r.errors["NVAMP"] < 1e-12 else "1e-5"
    softcap = "" if r.softcap is None else f"{r.softcap:g}"
    scale = "" if r.logit_scale == 1 else f"{r.logit_scale:g}"
    marks = ("yes" if mark else "" for mark in (r.bias, r.tied, r.auxiliary))
    return f"| `{architecture.name}` | {softcap} | {scale} | {' | '.join(marks)} | {agreement} |"


def refusal_row(architecture: Architecture) -> str:
    """Why the model cannot be patched, as a line of the page."""
    model = build(architecture)
    tokens = torch.randint(3, VOCABULARY, TOKENS)
    try:
        patch(model, LinearLoss(NVAMP()))
        model(input_ids=tokens, labels=tokens)
    except TypeError as error:
        reason = str(error).removeprefix(f"{architecture.name} ")
    except NotImplementedError as error:
        reason = re.sub(r".* needs its logits for '(.+?)', .*", r"needs its logits for `\1`", str(error))
    else:
        raise AssertionError(f"{architecture.name} was not refused")
    options = "".join(f", `{name}={value}`" for name, value in architecture.config.items())
    return f"| `{architecture.name}`{options} | {reason} |"


PAGE = """\
# Models that `patch` takes

Written by `python -m tests.integrations.architectures > docs/architectures.md`, with transformers {version}; the
tests of `tests/integrations/test_architectures.py` fail if a line is not what they find. Each model is built tiny
from its configuration, in float64, in training and without dropout. Patched and unpatched, the loss and the gradient
of every parameter are compared:

- `CrossEntropy()` with the model's own loss, to 1e-5 (it is computed in float32), with `num_items_in_batch` if the
  model takes it;
- `NVAMP()` with the same loss of the model's logits, plus the router's auxiliary loss if there is one, to the bound in
  the last column. It is 1e-5 if the model itself computes logits or auxiliary loss in float32;
- `TokenWeighted()` with itself under other weights: its loss is linear in the `token_weight` of the batch.

An error is the norm of a difference, relative to the norm of the tensor or to a thousandth of the largest norm of all,
whichever is larger. While a patched model runs, forward and backward, an operator that returns a tensor as large as the
logits fails the test. An empty cell means none, or no. "Scale" is a factor on the logits; "tied" means that the weight
is the embedding's, and "auxiliary" that the router adds a loss of its own.

| model | soft-cap | scale | bias | tied | auxiliary | agrees to |
|---|---|---|---|---|---|---|
{language}

Vision-language models, given text alone:

| model | soft-cap | scale | bias | tied | auxiliary | agrees to |
|---|---|---|---|---|---|---|
{vision}

## Models that it refuses

They raise an error, at the latest in the first step. A model that computes the cross-entropy itself begins with `view`
or `getitem`: it ignores `model.loss_function`, and if it is causal, it trains with
[`compute_loss_func`](transformers.md#compute_loss_func-the-trainers-loss). The other causal ones also take
[`loss_function`](transformers.md#loss_function-the-models-own-loss).

| model | reason |
|---|---|
{refused}
"""


def page() -> str:
    return PAGE.format(
        version=transformers.__version__,
        language="\n".join(map(row, LANGUAGE)),
        vision="\n".join(map(row, VISION)),
        refused="\n".join(map(refusal_row, REFUSED)),
    )


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(page(), end="")
