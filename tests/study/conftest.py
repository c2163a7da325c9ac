import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nvamp.study.corpus import Corpus, build_corpus, train_tokenizer
from nvamp.study.models import quiet


def words(seed: int, count: int) -> str:
    """Text with something to learn: each word is mostly followed by the same next one."""
    rng = random.Random(seed)
    vocabulary = ["alpha", "beta", "gamma", "delta", "loss", "token", "mean", "tail", "worst", "model"]
    index, out = 0, []
    for _ in range(count):
        index = (index + 1 if rng.random() < 0.8 else rng.randrange(10)) % 10
        out.append(vocabulary[index])
    return " ".join(out)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more, and threads that spin lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return [words(seed, 150) for seed in range(40)]


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    directory = tmp_path_factory.mktemp("text")
    for index, document in enumerate(documents):
        (directory / f"{index}.txt").write_text(document)
    return directory


@pytest.fixture(scope="session")
def tokenizer(documents: list[str]) -> Any:
    return train_tokenizer(documents)


def small_llama(tokenizer: Any, positions: int, **options: Any) -> Any:
    """A fresh model of a few thousand parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A local model of a few thousand parameters, with its tokenizer."""
    quiet()
    directory = tmp_path_factory.mktemp("model")
    small_llama(tokenizer, positions=16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def corpus(documents: list[str], tokenizer: Any) -> Corpus:
    return build_corpus(documents, "words", 16, tokenizer)
