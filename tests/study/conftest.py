import os
import random
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub import constants
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nvamp.study.compare import compare
from nvamp.study.corpus import Corpus, build_corpus, train_tokenizer
from nvamp.study.hub import reach_hub
from nvamp.study.metrics import HELD_OUT, METRICS, TIMES
from nvamp.study.models import quiet
from nvamp.study.settings import Settings
from nvamp.study.store import Store
from nvamp.study.watching import Progress


def words(seed: int, count: int) -> str:
    """Text with something to learn: each word is mostly followed by the same next one."""
    rng = random.Random(seed)
    vocabulary = ["alpha", "beta", "gamma", "delta", "loss", "token", "mean", "tail", "worst", "model"]
    index, out = 0, []
    for _ in range(count):
        index = (index + 1 if rng.random() < 0.8 else rng.randrange(10)) % 10
        out.append(vocabulary[index])
    return " ".join(out)


def started(command: Sequence[str]) -> subprocess.Popen[str]:
    """A process on one thread that can be interrupted, its output to be read."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Tests that run in the background of a shell were told to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more, and threads that spin lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test finds out about the hub is not kept for the next one."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    reach_hub.cache_clear()


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The lookups of a hub that is out of reach."""
    asked: list[Any] = []

    def no_network(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    return asked


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


def dropping(vocabulary: int) -> Any:
    """A model of 16 positions in training mode that drops half of what it computes."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.5, embd_pdrop=0.5
    )
    return GPT2LMHeadModel(config).train()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A local model of a few thousand parameters, with its tokenizer."""
    quiet()
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)  # the same one, whatever tests came before
    small_llama(tokenizer, positions=16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def corpus(documents: list[str], tokenizer: Any) -> Corpus:
    return build_corpus(documents, "words", 16, tokenizer)


class Silent:
    """A display that remembers what it was told."""

    def __init__(self) -> None:
        self.kept = -1
        self.trained: list[tuple[str, int]] = []
        self.left_out = 0

    def prepared(self, corpus: Any, steps: int, runs: int, kept: int) -> None:
        self.kept = kept

    def run(self, loss: str, seed: int) -> Progress:
        return lambda step, value: None

    def finished(self, record: dict[str, Any]) -> None:
        self.trained.append((record["loss"], record["seed"]))

    def replacing(self, runs: int) -> None:
        self.left_out = runs

    def waiting(self) -> None:
        pass


@pytest.fixture
def settings(text_dir: Path, model_dir: Path) -> Settings:
    return Settings(("ce", "dft"), 2, 6, 8, lr=1e-2, noise=0.1, model=str(model_dir), text=(str(text_dir),))


@pytest.fixture
def one(settings: Settings) -> Settings:
    """Settings of a study of a single run."""
    return replace(settings, losses=("ce",), seeds=1)


def study(settings: Settings, out: Path, **options: Any) -> tuple[dict[str, Any], Silent]:
    display = Silent()
    with Store(out) as store:
        results = compare(settings, store, "nvamp compare", display, **options)
    assert results is not None
    return results, display


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    """All results but those that differ from run to run."""
    losses = [{**loss, "times": None} for loss in results["losses"]]
    runs = [
        {**run, "seconds": None, "metrics": {key: run["metrics"][key] for key in HELD_OUT}}
        for run in results["runs"]
    ]
    return {**results, "created": None, "settings": None, "losses": losses, "runs": runs}


def loss_of(name: str, index: int, baseline: bool) -> dict[str, Any]:
    estimates = {metric.key: {"mean": 4.0 + index, "half_width": 0.5} for metric in METRICS}
    differences = {key: {"mean": -float(index), "half_width": 0.5} for key in estimates}
    clauses = [
        {"text": f"tail {index}% lighter", "verdict": "better"},
        {"text": "mean alike", "verdict": "-"},
    ]
    return {
        "name": name,
        "title": f"the loss {name}",
        "diverged_seeds": [],
        "metrics": estimates,
        "differences": {} if baseline else differences,
        "changes": {} if baseline else differences,
        "verdicts": {} if baseline else dict.fromkeys(estimates, "better"),
        "times": {time.key: {"median": 7000.0, "low": 6000.0, "high": 8000.0} for time in TIMES},
        "clauses": clauses,
        "sentence": f"{name}, in plain words",
        "curve": [{"step": s, "mean": 7.0 - s, "half_width": 0.5} for s in range(4)],
        "density": {"mean": [0.25, 0.25, 0.0], "half_width": [0.1, 0.0, 0.0]},
        "survival": {"mean": [1.0, 0.5, 0.0], "half_width": [0.0, 0.6, 0.0]},
    }


def diverge(results: dict[str, Any], index: int) -> None:
    """Let a loss diverge on one seed."""
    lost = results["losses"][index]
    lost.update(density=None, survival=None, curve=[], diverged_seeds=[0], times=dict.fromkeys(lost["times"]))
    lost["clauses"] = [{"text": "diverged on seed 0 of 3", "verdict": "worse"}]
    for kind in ("metrics", "differences", "changes"):
        lost[kind] = dict.fromkeys(lost[kind])
    lost["verdicts"] = dict.fromkeys(lost["verdicts"], "no value")


def three_losses() -> dict[str, Any]:
    """Made-up results of a study."""
    names = ["ce", "nvamp", "nvamp:gamma=0.05,gradient=token"]
    return {
        "command": "nvamp compare --text '<script>' --seeds 3",
        "created": "2026-01-01T00:00:00+00:00",
        "versions": {"nvamp": "0.1.0", "torch": "2.13.0"},
        "settings": {
            "losses": names,
            "seeds": 3,
            "steps": 3,
            "lr": 0.002,
            "text": ["<script>"],
            "model": None,
            "generate": 4,
            "also": "other.txt",
        },
        "text": {
            "source": "<script>",
            "sequence": 64,
            "vocabulary": 2048,
            "train_blocks": 19290,
            "train_tokens": 1234567,
            "held_out_tokens": 32256,
            "worst_tokens": 1613,
            "unigram_cross_entropy": 6.35,
        },
        "passes": 0.1,
        "baseline": "ce",
        "parameters": 2_000_000,
        "grid": {"bin_edges": [0.0, 2.0, 4.0, 6.0], "thresholds": [0.0, 3.0, 6.0]},
        "losses": [loss_of(name, index, index == 0) for index, name in enumerate(names)],
        "pages": {},
        "runs": [],
    }


@pytest.fixture
def results() -> dict[str, Any]:
    return three_losses()
