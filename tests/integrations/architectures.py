"""The language models of transformers under `patch`, each tiny: what docs/architectures.md lists.

    python -m tests.integrations.architectures > docs/architectures.md

runs all of them and writes that page; the tests fail if it differs from what they find.
"""

import inspect
import re
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
from transformers.models.auto import modeling_auto

from nvamp import LinearLoss, Loss
from nvamp.integrations.transformers import patch, unpatch
from nvamp.integrations.transformers.alignment import OwnLoss, encoder_outputs, own_loss
from nvamp.objectives import NVAMP, CrossEntropy, TokenWeighted

VOCABULARY, TOKENS = 99, (2, 9)

# What configurations call their sizes.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "src_vocab_size", "tgt_vocab_size"), VOCABULARY),
    **dict.fromkeys(("vocab_size_per_layer_input", "num_text_tokens"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions"), 64),
    **dict.fromkeys(("max_target_positions", "max_encoder_position_embeddings"), 64),
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size", "d_ff"), 32),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "embed_dim", "emb_dim", "output_dim"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "expert_ffn_size", "out_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "encoder_num_hidden_layers"), 2),
    **dict.fromkeys(("decoder_num_hidden_layers", "num_sparse_encoder_layers", "num_sparse_decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rotary_dim", "d_kv"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "mamba_num_heads"), 8),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "dim_ff", "projection_dim", "num_embeddings"), 32),
    "num_experts_per_tok": 2, **dict.fromkeys(("state_size", "mamba_d_state", "mamba_d_head"), 8),
    "mamba_n_heads": 8, "is_decoder": True, "output_router_logits": True, "image_size": 16, "patch_size": 8,
    "base_channels": 32, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0, "use_cache": False,
}  # fmt: skip


class Architecture(NamedTuple):
    """A class of transformers, and what of its configuration is not in `SIZES`."""

    name: str
    config: dict[str, Any] = {}  # noqa: RUF012  # a field of a tuple


_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}}
_MROPE_OF_2 = {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0]}}}
_TWO = {"encoder": {"is_decoder": False}, "decoder": {"add_cross_attention": True}}
_IMAGE_TOKENS = {"vocabulary_map": {"<image>": 4, "IMGIMGA": 5}}
# What some classes need beside `SIZES`.
CONFIG: dict[str, dict[str, Any]] = {
    "CohereCompassForCausalLM": {
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)
    },
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "Dots1ForCausalLM": {"n_shared_experts": 1},
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 4, "<|extra_200|>": 5}},
    "EncoderDecoderModel": _TWO,
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64},
    "Gemma3ForCausalLM": {"final_logit_softcapping": 30.0},
    "Glm46VForConditionalGeneration": _MROPE,
    "Glm4vForConditionalGeneration": _MROPE,
    "Glm4vMoeForConditionalGeneration": _MROPE_OF_2,
    "GlmOcrForConditionalGeneration": _MROPE_OF_2,
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "GraniteForCausalLM": {"logits_scaling": 8.0},
    "GraniteMoeForCausalLM": {"logits_scaling": 8.0},
    "GraniteMoeSharedForCausalLM": {"logits_scaling": 8.0},
    "LEDForConditionalGeneration": {"attention_window": [8, 8]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "PaddleOCRVLForConditionalGeneration": _MROPE,
    "Qwen2VLForConditionalGeneration": _MROPE,
    "Qwen2_5OmniThinkerForConditionalGeneration": _MROPE,
    "Qwen2_5_VLForConditionalGeneration": _MROPE,
    "ReformerModelWithLMHead": {"axial_pos_embds": False},
    "SpeechEncoderDecoderModel": _TWO,
    "Step3p7ForConditionalGeneration": {"text_config": {"sliding_window": 8}},
    "VisionEncoderDecoderModel": _TWO,
    "XmodForCausalLM": {"languages": ["en_XX"], "default_language": "en_XX"},
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid"]},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    "CohereCompassForConditionalGeneration": {
        "text_config": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)}
    },
    "Cosmos3EdgeForConditionalGeneration": _MROPE,
    "FunAsrNanoForConditionalGeneration": {"adaptor_config": {"intermediate_size": 8}},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0},
    "NllbMoeForConditionalGeneration": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "Florence2ForConditionalGeneration": {
        "vision_config": {
            "embed_dim": [32, 32, 32, 32],
            "num_heads": [4, 4, 4, 4],
            "num_groups": [4, 4, 4, 4],
            "depths": [1, 1, 1, 1],
        }
    },
    "RoCBertForCausalLM": {"pronunciation_vocab_size": 99, "shape_vocab_size": 99},
    "DeepseekV4ForCausalLM": {"output_router_logits": False},  # which would need more layers
    "FlintForCausalLM": {"output_router_logits": False},
    "KimiLinearForCausalLM": {"linear_head_dim": 8, "linear_num_heads": 2},
    "MoonshineStreamingForConditionalGeneration": {"num_key_value_heads": 4},
}
# Classes that compute something in float32, whatever their dtype.
IN_FLOAT32 = ("Inkling2ForCausalLM", "XGLMForCausalLM")
# Classes that the tests do not run, and why.
_REASONS = {
    "needs an image": (
        "Blip2ForConditionalGeneration BlipForConditionalGeneration GitForCausalLM IdeficsForVisionText2Text "
        "InstructBlipForConditionalGeneration InstructBlipVideoForConditionalGeneration "
        "Kosmos2ForConditionalGeneration"
    ),
    "needs audio": "VoxtralRealtimeForConditionalGeneration",
    "needs the positions or the types of its tokens": (
        "Molmo2ForConditionalGeneration UdopForConditionalGeneration"
    ),
    "needs timm or SciPy, which the tests do not install": (
        "FastVlmForConditionalGeneration Gemma3nForConditionalGeneration InklingForConditionalGeneration "
        "PerceptionLMForConditionalGeneration"
    ),
    "predicts something other than one token for each position": (
        "DiaForConditionalGeneration DiffusionGemmaForBlockDiffusion MusicgenForCausalLM "
        "MusicgenMelodyForCausalLM PI0ForConditionalGeneration"
    ),
    "cannot be made tiny by the sizes in its configuration": (
        "BltForCausalLM DeepseekOcr2ForConditionalGeneration Dots3NoteForConditionalGeneration "
        "Ernie4_5_VLMoeForConditionalGeneration Gemma4AssistantForCausalLM "
        "Gemma4UnifiedAssistantForCausalLM Glm5NextForConditionalGeneration "
        "Granite4VisionForConditionalGeneration HunYuanVLForConditionalGeneration "
        "Inkling2ForConditionalGeneration KyutaiSpeechToTextForConditionalGeneration Mistral4ForCausalLM "
        "MuseSparkForConditionalGeneration Nemotron3_5TranscribeForConditionalGeneration "
        "NemotronH_Omni_Reasoning_V3 PPFormulaNetForConditionalGeneration Qwen4ExpForCausalLM "
        "Qwen4ExpForConditionalGeneration VibeVoiceAsrForConditionalGeneration "
        "VibeVoiceForConditionalGeneration ZambaForCausalLM"
    ),
}
NOT_RUN = {name: reason for reason, names in _REASONS.items() for name in names.split()}
_WITH_Z_LOSS = Architecture("BambaForCausalLM", {"z_loss_coefficient": 0.001})
REFUSED = [
    _WITH_Z_LOSS,
    Architecture("ChameleonForConditionalGeneration", _IMAGE_TOKENS),
    Architecture("FSMTForConditionalGeneration"),
    Architecture("Inkling2ForCausalLM"),
    Architecture("ProphetNetForCausalLM"),
    Architecture("ProphetNetForConditionalGeneration"),
]


def _classes(*mappings: str) -> list[str]:
    """The classes of these mappings of transformers, by name."""
    values = [
        name for m in mappings for name in getattr(modeling_auto, f"MODEL_FOR_{m}_MAPPING_NAMES").values()
    ]
    names = {name for value in values for name in ([value] if isinstance(value, str) else value)}
    return sorted(names, key=str.lower)


_CAUSAL, _SEQ2SEQ = _classes("CAUSAL_LM"), _classes("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
_SEEING = _classes("IMAGE_TEXT_TO_TEXT")


def _run(names: list[str], but: list[str]) -> list[Architecture]:
    without = {*but, *NOT_RUN, *(a.name for a in REFUSED if a is not _WITH_Z_LOSS)}
    return [Architecture(name, CONFIG.get(name, {})) for name in names if name not in without]


LANGUAGE = _run(_CAUSAL, [])
SEQ2SEQ = _run(_SEQ2SEQ, _CAUSAL)
VISION = _run(_SEEING, [*_CAUSAL, *_SEQ2SEQ])
AGREEING = [*LANGUAGE, *SEQ2SEQ, *VISION]


class Result(NamedTuple):
    """What a run of a patched model found."""

    labels: str  # the place of the label that the model's own loss scores a position against
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
    if config.is_encoder_decoder:
        for token, own in (("pad_token_id", 0), ("decoder_start_token_id", 2)):
            setattr(config, token, own if getattr(config, token, None) is None else getattr(config, token))
    config._experts_implementation = "eager"  # grouped products are not for float64
    torch.manual_seed(0)
    model = cls(config).to(torch.float32 if architecture.name in IN_FLOAT32 else torch.float64).train()
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


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
    lists = {name for name, value in vars(default).items() if isinstance(value, list | tuple)}
    values |= {k: v for k, v in SIZES.items() if (k in names or k in aliases) and k not in lists}
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


def batch_of(model: Any) -> dict[str, Any]:
    """Tokens and labels; for an encoder that does not take tokens, its states. Some models change them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, TOKENS, generator=generator)
    labels = tokens.clone()
    labels[0, :3] = -100
    if not model.config.is_encoder_decoder:
        return {"input_ids": tokens, "labels": labels}
    labels = torch.where(labels < 0, labels, labels.flip(0))
    if model.main_input_name == "input_ids":
        return {"input_ids": tokens, "labels": labels}
    return {"encoder_outputs": encoder_outputs(model, TOKENS), "labels": labels}


def run(architecture: Architecture) -> Result:
    """Loss and gradients of the patched model beside those of the model's own logits."""
    model = build(architecture)
    labels = batch_of(model)["labels"]
    kind = own_loss(model)
    parameters = inspect.signature(model.forward).parameters.values()
    takes_items = any(p.kind == p.VAR_KEYWORD for p in parameters)  # as the Trainer decides it
    items = {"num_items_in_batch": torch.tensor(23)} if takes_items and kind.is_loss_function else {}
    weights = [p for p in model.parameters() if p.requires_grad]

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True))

    own = model(**batch_of(model), **items)
    entropy = own_entropy(own.logits, labels, kind, items)
    nvamp = Loss(NVAMP(), shift=kind.shifts)(own.logits, labels) + (own.loss - entropy)
    truth = {"cross-entropy": own.loss, "NVAMP": nvamp}
    truth_gradients = {name: gradients(loss) for name, loss in truth.items()}

    errors = {}
    for name, criterion, given in (
        ("cross-entropy", LinearLoss(CrossEntropy()), items),
        ("NVAMP", LinearLoss(NVAMP()), {}),
    ):
        patch(model, criterion)
        with NoLogits(), mock.patch.object(criterion, "_of_hidden", wraps=criterion._of_hidden) as linear:
            outputs = model(**batch_of(model), **given)
            found = gradients(outputs.loss)
        assert outputs.logits is None
        errors[name] = _error([outputs.loss, *found], [truth[name], *truth_gradients[name]])
    check_columns(model)
    unpatch(model)
    (*_, bias, _), options = linear.call_args
    embeddings = model.get_input_embeddings()
    return Result(
        labels="next" if kind.shifts else "same",
        softcap=options.get("softcap"),
        logit_scale=options.get("logit_scale", 1.0),
        bias=bias is not None,
        tied=embeddings is not None and model.get_output_embeddings().weight is embeddings.weight,
        auxiliary=abs((own.loss - entropy).item()) > 1e-5,
        errors=errors,
    )


def own_entropy(logits: Tensor, labels: Tensor, kind: OwnLoss, items: dict[str, Tensor]) -> Tensor:
    """The cross-entropy in the model's own loss, to the bit: what else is in it is what it differs by."""
    if kind.is_loss_function:
        loss = ForCausalLMLoss if kind.shifts else ForMaskedLMLoss
        return loss(logits, labels, logits.shape[-1], **items)
    if kind.shifts:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def check_columns(model: Any) -> None:
    """Fails if a column of the batch, weights of its tokens, does not reach the loss."""
    patch(model, LinearLoss(TokenWeighted()))
    weights = [torch.full(TOKENS, weight, dtype=torch.float64) for weight in (0.0, 1.0, 2.0)]
    none, once, twice = (model(**batch_of(model), token_weight=weight).loss for weight in weights)
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
    return f"| `{architecture.name}` | {r.labels} | {softcap} | {scale} | {' | '.join(marks)} | {agreement} |"


def refusal_row(architecture: Architecture) -> str:
    """Why the model cannot be patched, as a line of the page."""
    model = build(architecture)
    try:
        patch(model, LinearLoss(NVAMP()))
        model(**batch_of(model))
    except TypeError as error:
        reason = str(error).replace(f" of {architecture.name}", "").partition(":")[0]
    except NotImplementedError as error:
        reason = re.sub(r".* needs its logits for '(.+?)', .*", r"needs its logits for `\1`", str(error))
    else:
        raise AssertionError(f"{architecture.name} was not refused")
    options = "".join(f", `{name}={value}`" for name, value in architecture.config.items())
    return f"| `{architecture.name}`{options} | {reason} |"


PAGE = """\
# Models that `patch` takes

Written by `python -m tests.integrations.architectures > docs/architectures.md`, with transformers {version}; the
tests of `tests/integrations/test_architectures.py` fail if a line is not what they find. The classes are all those
that transformers lists as causal language models, as models from text or speech to text, and as models from images and
text to text. Each model is built tiny from its configuration, in float64, in training and without dropout. Patched and
unpatched, the loss and the gradient of every parameter are compared:

- `CrossEntropy()` with the model's own loss, to 1e-5 (most compute it in float32), with `num_items_in_batch` if the
  model uses it;
- `NVAMP()` with the same loss of the model's logits, plus the router's auxiliary loss if there is one, to the bound in
  the last column. It is 1e-5 if the model itself computes logits or auxiliary loss in float32;
- `TokenWeighted()` with itself under other weights: its loss is linear in the `token_weight` of the batch.

An error is the norm of a difference, relative to the norm of the tensor or to a thousandth of the largest norm of all,
whichever is larger. While a patched model runs, forward and backward, an operator that returns a tensor as large as the
logits fails the test.

"Label" is the one that the model's own loss scores a position against: that of the next position, as in causal models,
or of the same, as in [encoder-decoders](transformers.md#encoder-decoders-and-other-labels-that-are-not-shifted).
"Scale" is a factor on the logits; "tied" means that the weight is the embedding's, and "auxiliary" that the router adds
a loss of its own. An empty cell means none, or no.

## Causal language models

{header}
{language}

## Encoder-decoders and models of speech

An encoder that does not take tokens is left out: its states are random numbers.

{header}
{seq2seq}

## Models of images and text

They are given text alone.

{header}
{vision}

## Models that it refuses

They raise an error, at the latest in the first step.

| model | reason |
|---|---|
{refused}

## Classes that have not been run

| class | reason |
|---|---|
{not_run}
"""
HEADER = """\
| model | label | soft-cap | scale | bias | tied | auxiliary | agrees to |
|---|---|---|---|---|---|---|---|"""


def page(rows: list[str], refused: list[str]) -> str:
    """The page, from the rows of all models that agree and of all that are refused."""
    counts = (len(LANGUAGE), len(SEQ2SEQ), len(VISION))
    language, seq2seq, vision = (
        "\n".join(rows[sum(counts[:i]) : sum(counts[: i + 1])]) for i in range(len(counts))
    )
    return PAGE.format(
        version=transformers.__version__,
        header=HEADER,
        language=language,
        seq2seq=seq2seq,
        vision=vision,
        refused="\n".join(refused),
        not_run="\n".join(f"| `{name}` | {reason} |" for name, reason in sorted(NOT_RUN.items())),
    )


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(page([*map(row, AGREEING)], [*map(refusal_row, REFUSED)]), end="")
