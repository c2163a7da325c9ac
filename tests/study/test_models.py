"""The built-in model, and models from anywhere: no code that comes with one is run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nvamp.study import StudyError
from nvamp.study.corpus import Corpus
from nvamp.study.models import build_model, load_model, load_tokenizer, max_positions

LOADERS = {"model": load_model, "tokenizer": load_tokenizer, "configuration": max_positions}


def test_the_built_in_model_has_about_two_million_parameters(corpus: Corpus) -> None:
    class Tokenizer:
        eos_token_id = 0

        def __len__(self) -> int:
            return 2048

    model = build_model(None, Corpus(Tokenizer(), corpus.training, corpus.evaluation, "", ""))
    assert 1.8e6 < model.num_parameters() < 2.3e6


@pytest.fixture
def directory(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("known", [True, False], ids=["a class of transformers", "a class of its own"])
@pytest.mark.parametrize("kind", LOADERS)
def test_code_in_the_directory_is_not_run(
    kind: str, known: bool, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If transformers has a class for it, that is used; else there is an error, and nobody is asked."""
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    ran = directory / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Config: ...\nclass Model: ...\nclass Tokenizer: ...\n"
    (directory / "code.py").write_text(code)
    auto = {
        "AutoConfig": "code.Config",
        "AutoModelForCausalLM": "code.Model",
        "AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"],
    }
    own = {} if known else {"model_type": "unheard_of", "architectures": ["Unheard"]}
    change(directory / "config.json", auto_map=auto, **own)
    change(
        directory / "tokenizer_config.json",
        auto_map=auto,
        **({} if known else {"tokenizer_class": "Unheard"}),
    )
    if known:
        LOADERS[kind](str(directory))
    else:
        with pytest.raises(StudyError, match=f"--model {directory}: "):
            LOADERS[kind](str(directory))
    assert not ran.exists()


class Bomb:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("beside", [True, False], ids=["beside safetensors", "alone"])
def test_a_pickle_of_weights_is_not_run(beside: bool, directory: Path) -> None:
    ran = directory / "ran"
    weights = directory / "pytorch_model.bin"
    torch.save({"lm_head.weight": Bomb(ran)}, weights)
    if beside:
        load_model(str(directory))
    else:
        (directory / "model.safetensors").unlink()
        with pytest.raises(StudyError, match=f"--model {directory}: "):
            load_model(str(directory))
    assert not ran.exists()
    torch.load(weights, weights_only=False)  # it would have been seen
    assert ran.exists()
