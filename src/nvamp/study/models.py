"""The models of a study: the built-in one, and pretrained ones with their tokenizers."""

import hashlib
import logging
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from nvamp.integrations.transformers import logits_of
from nvamp.study import StudyError
from nvamp.study.corpus import Corpus
from nvamp.study.extra import install_command
from nvamp.study.hub import reach_hub
from nvamp.study.model_files import CONFIGURATIONS, ENCODER_DECODER, adapted, check_model

PROBED = 8  # tokens of the two inputs that differ in the last one

APART = 4  # tokens of each example that shows whether a model keeps them apart
ROUNDING = 1e-4  # how much logits that must be the same may differ, as a share of the largest


def build_model(name: str | None, corpus: Corpus, scale: int = 1) -> Any:
    """A pretrained model in float32; without a name, a fresh Llama, of two million parameters at scale 1."""
    if name is not None:
        return load_model(name)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(corpus.tokenizer),
            hidden_size=224 * scale,
            intermediate_size=608 * scale,
            num_hidden_layers=2 * scale,
            num_attention_heads=4 * scale,
            max_position_embeddings=corpus.train.shape[1],
            bos_token_id=None,
            eos_token_id=corpus.tokenizer.eos_token_id,
            pad_token_id=None,
        )
    )


def load_model(name: str) -> Any:
    """A pretrained model in float32; if it is an adapter, what it adapts with the adapter merged into it.

    Raises:
        StudyError: there is none, some of its weights are missing or have another shape, it takes fewer than
            two tokens, or it is not causal.
    """
    if base := adapted(name):
        return _merged(load_model(base), name)
    check_config(name, load_config(name))
    model, info = _load(
        AutoModelForCausalLM,
        name,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they are reported, by the next line
    )
    _check_weights(name, info)
    _check_causal(name, model)
    return model


def _merged(base: Any, name: str) -> Any:
    """The model with an adapter merged into it, all of whose weights can be trained."""
    if find_spec("peft") is None:
        raise StudyError(
            f"--model {name}: an adapter needs peft, which is not installed: {install_command('lora')}"
        )
    import peft  # an extra

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # filled with random numbers
            adapter = peft.PeftModel.from_pretrained(base, name)
        return adapter.merge_and_unload().requires_grad_(True)
    except Exception as error:  # the files of an adapter can raise any error
        raise StudyError(f"--model {name}: {_reason(error)}") from error


def load_config(name: str) -> Any:
    """The configuration of a pretrained model; if it is an adapter, of the model that it adapts."""
    return _load(transformers.AutoConfig, adapted(name) or name)


def check_config(name: str, config: Any) -> None:
    """Raise a `StudyError` if a model of this configuration predicts no next token."""
    if getattr(config, "is_encoder_decoder", False):
        raise StudyError(f"--model {name}: {ENCODER_DECODER}")
    if (longest := positions(config)) is not None and longest < 2:
        raise StudyError(f"--model {name}: takes {longest} position, expected at least 2")


def _check_weights(name: str, info: dict[str, Any]) -> None:
    """Raise a `StudyError` if transformers has filled some weights with random numbers."""
    for key, saved, wanted in sorted(info["mismatched_keys"]):
        raise StudyError(
            f"--model {name}: {key} has shape {list(saved)}, its configuration expects {list(wanted)}"
        )
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise StudyError(f"--model {name}: weights are missing: {missing[0]}{more}")


@torch.no_grad()
def _check_causal(name: str, model: Any) -> None:
    """Raise a `StudyError` if the last token of an input changes what is predicted before it."""
    length = min(PROBED, positions(model.config) or PROBED)
    vocabulary = model.config.get_text_config().vocab_size
    inputs = (torch.arange(length) % vocabulary).repeat(2, 1)
    inputs[1, -1] = length % vocabulary
    try:
        first, second = logits_of(model(input_ids=inputs, use_cache=False))[:, :-1].float()
    except Exception as error:  # a model can raise any error
        raise StudyError(f"--model {name}: fails on {length} tokens: {_reason(error)}") from error
    if (first - second).abs().max() > ROUNDING * first.abs().max():
        raise StudyError(
            f"--model {name}: not causal: its predictions change with the tokens after them, "
            "as those of BERT with is_decoder=False do"
        )


def check_tokens(config: Any, largest: int) -> None:
    """Raise a `StudyError` if the largest token of a text is beyond the embedding of a model."""
    if largest >= (vocabulary := config.get_text_config().vocab_size):
        raise StudyError(f"the tokenizer gives token {largest}, but the model has {vocabulary} tokens")


def model_bytes(name: str | None, corpus: Corpus) -> int:
    """The size of a model in float32; 0 if its configuration does not determine it."""
    try:
        with torch.device("meta"):
            if name is None:
                model = build_model(None, corpus)
            else:
                model = AutoModelForCausalLM.from_config(load_config(name), trust_remote_code=False)
    except Exception:  # a model that cannot be built without its weights
        return 0
    return 4 * int(model.num_parameters())


@torch.no_grad()
def keeps_apart(model: Any) -> bool:
    """Whether positions that start again keep the examples of a block apart: the second is as if alone."""
    length = max(1, min(APART, (positions(model.config) or 2 * APART) // 2))
    tokens = torch.arange(2 * length) % model.config.get_text_config().vocab_size
    places = torch.arange(length).repeat(2)
    try:
        both = logits_of(model(input_ids=tokens[None], position_ids=places[None], use_cache=False))[
            0, length:
        ]
        alone = logits_of(model(input_ids=tokens[None, length:], use_cache=False))[0]
    except Exception:  # not every model takes positions, and one that does not can raise any error
        return False
    return bool((both - alone).abs().max() <= ROUNDING * alone.abs().max())


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a pretrained model."""
    check_model(name)
    return _load(AutoTokenizer, name)


def max_positions(name: str) -> int | None:
    """The longest sequence that a pretrained model takes; `None` if its configuration does not say."""
    return positions(load_config(name))


def model_fingerprint(name: str) -> str:
    """Identifies configuration and weights: the hub's commit, or a hash of the files in a directory.

    Those of an adapter include what it adapts.
    """
    directory = Path(name)
    if not directory.is_dir():
        return str(load_config(name)._commit_hash)
    digest = hashlib.sha256()
    if base := adapted(name):
        digest.update(model_fingerprint(base).encode())
    for path in sorted(directory.iterdir()):
        known = path.suffix in (".safetensors", ".bin") or path.name in (
            *CONFIGURATIONS,
            "generation_config.json",
        )
        if known and path.is_file():
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            with path.open("rb") as file:
                while part := file.read(2**22):
                    digest.update(part)
    return digest.hexdigest()[:16]


def positions(config: Any) -> int | None:
    """The longest sequence that a model of this configuration takes; `None` if it does not say."""
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if found == -1 else found  # as XLNet's says


def _load(kind: Any, name: str, **kwargs: Any) -> Any:
    quiet()
    check_model(name, tokenizer=False)
    if not Path(name).is_dir():
        reach_hub()
    try:
        # Never run code that comes with a model. The default would ask the user on the terminal.
        return kind.from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as error:  # a hub or a model's files can raise any error of any library
        if "trust_remote_code" in str(error):
            raise StudyError(
                f"--model {name}: needs custom code that comes with it, which nvamp never runs: "
                "expected a model of a kind that transformers knows"
            ) from error
        nor = "" if os.path.exists(name) else " (no such directory here either)"
        raise StudyError(f"--model {name}: {_reason(error)}{nor}") from error


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def quiet() -> None:
    """Silence the libraries below: the study has its own progress bar."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|accelerate|peft|torch\.utils\.data)")
