"""What the files of a model's directory say about it, without PyTorch: mistakes are reported at once."""

import json
from pathlib import Path
from typing import Any

from nvamp.study import StudyError

CONFIGURATIONS = ("config.json", "adapter_config.json")
_TOKENIZER = ("tokenizer", "vocab", "merges", "tekken")  # the names of its files begin with these,
_TOKENIZER_SUFFIXES = (".model", ".tiktoken")  # or end with these
ENCODER_DECODER = "an encoder-decoder, expected a causal language model"
NAMED = 4  # so many of the models in a folder are named


def check_model(name: str, tokenizer: bool = True) -> None:
    """Check what a directory says about its model; a hub id is not looked up.

    Args:
        tokenizer: whether a tokenizer is needed too.

    Raises:
        StudyError: there is no directory, or no causal language model in it.
    """
    if not name:
        raise StudyError("--model: expected a directory or hub id, got an empty name")
    directory = Path(name)
    if not directory.is_dir():
        if directory.is_file():
            raise StudyError(f"--model {name}: a file, expected the directory of a model")
        if directory.is_absolute() or name.startswith(".") or name.count("/") > 1:  # hub ids are not
            raise StudyError(f"--model {name}: no such directory")
        return
    if not _is_model(directory):
        raise StudyError(f"--model {name}: {_none_here(directory)}")
    if read_object(directory / "config.json").get("is_encoder_decoder") is True:
        raise StudyError(f"--model {name}: {ENCODER_DECODER}")
    if tokenizer and not any(map(_is_of_tokenizer, directory.iterdir())):
        raise StudyError(
            f"--model {name}: no tokenizer in it: save the model's own there, with tokenizer.save_pretrained"
        )


def _none_here(directory: Path) -> str:
    """Why a directory is not a model's, and which models are below it."""
    if not (below := models_below(directory)):
        return "no model in it: expected a config.json"
    more = f" and {len(below) - NAMED} more" if len(below) > NAMED else ""
    return f"a folder of models, name one of them: {', '.join(map(str, below[:NAMED]))}{more}"


def models_below(directory: Path) -> list[Path]:
    """The models in a directory, or else in its subdirectories."""
    for pattern in ("*", "*/*"):
        if found := sorted(path for path in directory.glob(pattern) if _is_model(path)):
            return found
    return []


def _is_model(directory: Path) -> bool:
    return any((directory / name).is_file() for name in CONFIGURATIONS)


def _is_of_tokenizer(path: Path) -> bool:
    return path.name.startswith(_TOKENIZER) or path.suffix in _TOKENIZER_SUFFIXES


def adapted(name: str) -> str | None:
    """The model that the adapter in a directory adapts; `None` if the directory has a model of its own."""
    if (Path(name) / "config.json").is_file():
        return None
    base = read_object(Path(name) / "adapter_config.json").get("base_model_name_or_path")
    return base if isinstance(base, str) else None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if the file is missing or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
