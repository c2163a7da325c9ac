"""The built-in model, and models from anywhere: no code that comes with one is run."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from tokenizers.models import WordLevel
from transformers import BertConfig, BertLMHeadModel, PreTrainedTokenizerFast

from nvamp.study import StudyError, compare, models
from nvamp.study.chats import prefix_of
from nvamp.study.corpus import Corpus
from nvamp.study.inspect.inputs import read_inputs
from nvamp.study.inspect.page import inspect_models
from nvamp.study.model_files import check_model
from nvamp.study.models import build_model, load_model, load_tokenizer, max_positions, model_fingerprint
from nvamp.study.settings import Settings

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


def rewrite(directory: Path, key: str, value: torch.Tensor | None) -> None:
    """Replace one of the weights, or leave it out."""
    weights = load_file(directory / "model.safetensors")
    del weights[key]
    save_file(weights if value is None else {**weights, key: value}, directory / "model.safetensors")


def bert(directory: Path) -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    BertLMHeadModel(config).save_pretrained(directory)


def without_tokenizer(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()


def nested(directory: Path) -> None:
    shutil.copytree(directory, directory / "models" / "ce-seed0")
    (directory / "config.json").unlink()


NORM = "model.norm.weight"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda path: rewrite(path, NORM, None), "weights are missing: model.norm.weight"),
    "other shapes": (
        lambda path: rewrite(path, NORM, torch.ones(8)),
        "model.norm.weight has shape [8], its configuration expects [16]",
    ),
    "one position": (
        lambda path: change(path / "config.json", max_position_embeddings=1),
        "takes 1 position, expected at least 2",
    ),
    "bidirectional": (bert, "not causal: its predictions change with the tokens after them"),
    "encoder-decoder": (
        lambda path: change(path / "config.json", is_encoder_decoder=True),
        "an encoder-decoder, expected a causal language model",
    ),
    "no tokenizer": (without_tokenizer, "no tokenizer in it: save the model's own there"),
    "a folder of models": (
        nested,
        "a folder of models, name one of them: {path}/models/ce-seed0",
    ),
    "nothing": (lambda path: (path / "config.json").unlink(), "no model in it: expected a config.json"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_would_give_wrong_numbers_is_refused(
    kind: str, directory: Path, text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By both commands, before `compare` reads the text."""
    make, message = REFUSED[kind]
    make(directory)
    said = re.escape(f"--model {directory}: {message.format(path=directory)}")
    monkeypatch.setattr(compare, "read_documents", None)
    with pytest.raises(StudyError, match=said):
        compare.prepare(Settings(("ce",), 1, 1, 1, model=str(directory), text=(str(text_dir),)))
    (text := tmp_path / "text").write_text("alpha beta")
    with pytest.raises(StudyError, match=said):
        inspect_models(read_inputs([str(directory)], text, tmp_path / "page.html"), ["ce"], lambda *_: None)


@pytest.mark.parametrize("name", ["spiece.model", "some.tiktoken", "tekken.json", "vocab.txt"])
def test_a_tokenizer_by_the_names_of_its_files(name: str, directory: Path) -> None:
    without_tokenizer(directory)
    (directory / name).touch()
    check_model(str(directory))


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000])
def test_a_configuration_that_is_no_object_says_nothing(content: str, directory: Path) -> None:
    (directory / "config.json").write_text(content)
    check_model(str(directory))


def test_a_model_beside_an_adapter_is_the_one_that_counts(directory: Path) -> None:
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "./none"}')
    assert max_positions(str(directory)) == 16


def test_models_in_a_folder_are_named_up_to_four(directory: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for index in range(5):
        shutil.copytree(directory, folder / f"m{index}")
    named = ", ".join(str(folder / f"m{index}") for index in range(4))
    for end in (" and 1 more", ""):
        with pytest.raises(StudyError, match=f"name one of them: {re.escape(named)}{end}$"):
            check_model(str(folder))
        shutil.rmtree(folder / "m4", ignore_errors=True)


def test_an_adapter_is_as_good_as_what_it_adapts(directory: Path, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_model(str(directory)), config).save_pretrained(tmp_path / "adapter")
    assert max_positions(str(tmp_path / "adapter")) == 16
    check_model(str(tmp_path / "adapter"), tokenizer=False)
    load_model(str(tmp_path / "adapter"))
    rewrite(directory, NORM, None)
    with pytest.raises(StudyError, match=f"--model {directory}: weights are missing: {NORM}"):
        load_model(str(tmp_path / "adapter"))


def test_an_adapter_is_merged_into_what_it_adapts(directory: Path, tmp_path: Path) -> None:
    """What remains is a model like others: it can be trained, and saved as a whole."""
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    wrapped = get_peft_model(load_model(str(directory)), config).eval()
    wrapped.save_pretrained(adapter := tmp_path / "adapter")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = wrapped(input_ids=ids).logits
        plain = load_model(str(directory))(input_ids=ids).logits
    model = load_model(str(adapter))
    assert all(weight.requires_grad for weight in model.parameters())
    model.save_pretrained(tmp_path / "whole")
    for found in (model, load_model(str(tmp_path / "whole"))):
        torch.testing.assert_close(found(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3


def test_an_adapter_with_missing_weights(directory: Path, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_model(str(directory)), config).save_pretrained(adapter := tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), adapter / "adapter_model.safetensors")
    with pytest.raises(StudyError, match=rf"^--model {adapter}: Found missing adapter keys .*q_proj"):
        load_model(str(adapter))


def test_the_fingerprint_of_an_adapter_is_that_of_what_it_adapts_too(directory: Path, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_model(str(directory)), config).save_pretrained(adapter := tmp_path / "adapter")
    before = model_fingerprint(str(adapter))
    model = load_model(str(directory))
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(directory)
    assert model_fingerprint(str(adapter)) != before


def test_an_adapter_needs_its_package(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_model(str(directory)), config).save_pretrained(adapter := tmp_path / "adapter")
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(
        StudyError, match=rf"^--model {adapter}: an adapter needs peft, which is not installed: "
    ):
        load_model(str(adapter))


def test_a_text_beyond_the_embedding(directory: Path, text_dir: Path) -> None:
    model = load_model(str(directory))
    model.resize_token_embeddings(20)
    model.save_pretrained(directory)
    settings = Settings(("ce",), 1, 1, 1, model=str(directory), text=(str(text_dir),))
    with pytest.raises(
        StudyError, match=r"^--text: the tokenizer gives token \d+, but the model has 20 tokens$"
    ):
        compare.prepare(settings)


@pytest.mark.parametrize(
    ("template", "prefix"),
    [("$A", []), ("[CLS] $A [SEP]", [0]), ("$A [SEP]", []), ("[CLS] [SEP] $A", [0, 1])],
)
def test_the_prefix_is_what_the_tokenizer_puts_before_a_text(template: str, prefix: list[int]) -> None:
    backend = Tokenizer(WordLevel({"[CLS]": 0, "[SEP]": 1, "a": 2, "?": 3}, unk_token="?"))
    backend.post_processor = processors.TemplateProcessing(
        template, special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    assert prefix_of(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")) == prefix


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
