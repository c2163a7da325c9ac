"""The experiments run end to end, and what is on record draws the figures and pages that are in the docs."""

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from benchmarks.evidence import __main__ as program
from benchmarks.evidence import finetuning, source, stability, tail, tuning
from benchmarks.evidence.running import PRESETS, GradientNorms, Preset, gradient_metrics, run_all
from benchmarks.evidence.summary import Results, plain, signed
from nvamp.study.corpus import CLASSES, Corpus, build_corpus, split, train_tokenizer
from nvamp.study.losses import parse_loss
from nvamp.study.metrics import Estimate, verdict
from nvamp.study.models import build_model
from nvamp.study.sources import read_documents
from nvamp.study.training import LabelledBlocks, Recipe, train
from tests.study.conftest import one_thread

__all__ = ["one_thread"]

PAIR = "ce", "nvamp"
TAIL = tail.LOSSES
TYPES = (*CLASSES, *(kind for kind in source.KINDS if kind != "unparsed"))


def module(seed: int) -> str:
    """Python source: comments, docstrings, names and numbers."""
    rng = random.Random(seed)
    names = ["alpha", "beta", "gamma", "token", "model"]
    functions = [
        f'def {rng.choice(names)}({rng.choice(names)}):\n    """Return the {rng.choice(names)}."""\n'
        f"    # the {rng.choice(names)} counts\n    return {rng.choice(names)} + {rng.randrange(9)}\n"
        for _ in range(20)
    ]
    return "\n\n".join(functions)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    for seed in range(20):
        (directory / f"{seed}.py").write_text(module(seed))
    return directory


@pytest.fixture(scope="module")
def documents(text: Path) -> list[str]:
    return read_documents((str(text),))[0]


@pytest.fixture(scope="module")
def corpus(documents: list[str]) -> Corpus:
    return build_corpus(documents, "modules", 16, train_tokenizer(documents))


@pytest.fixture
def tiny(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = Preset(steps=2, batch_size=2, seeds=2, search_seeds=2, text=(str(text),))
    monkeypatch.setitem(PRESETS, "tiny", preset)
    monkeypatch.setattr(finetuning, "reference", lambda: [module(seed) for seed in range(100, 112)])
    monkeypatch.setattr(stability, "CHANGES", {"plain": {}, "noise-10": {"noise": 0.1}})
    monkeypatch.setattr(tuning, "NVAMP", ("nvamp",))
    monkeypatch.setattr(tuning, "OTHERS", ("dft",))
    for name in ("tail", "types", "stability", "finetuning"):
        monkeypatch.setattr(f"benchmarks.evidence.{name}.LOSSES", PAIR)


@pytest.mark.usefixtures("tiny")
def test_experiments_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.main(["all", "--preset", "tiny", "--out", str(tmp_path)])
    assert capsys.readouterr().out.count("ce, seed") >= 2
    for name in program.NAMES:
        results = program.load(tmp_path / "tiny" / f"{name}.json")
        assert (tmp_path / "tiny" / f"{name}.svg").read_text().startswith("<?xml")
        for group in results.groups():
            assert "ce" in results.losses(group)
        assert {run["seed"] for run in results.json["runs"]} >= {0, 1}
        assert not any(run["diverged"] for run in results.json["runs"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    program.main(["tail", "--preset", "tiny", "--out", str(tmp_path)])
    assert capsys.readouterr().out == ""  # nothing is trained twice
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == before


@pytest.mark.parametrize("name", program.NAMES)
def test_docs_are_drawn_from_the_record(name: str, tmp_path: Path) -> None:
    path = program.HERE / "results" / f"{name}.json"
    program.draw(name, path, tmp_path)
    drawn = (tmp_path / f"{name}.svg").read_text()
    results = program.load(path)
    for loss in results.losses(results.groups()[-1])[1:2]:
        assert f">{loss}<" in drawn
        assert f">{loss}<" in (program.DOCS / f"{name}.svg").read_text()
    assert (program.DOCS / f"{name}.md").read_text() == program.page(name, path)
    assert (program.DOCS / "README.md").read_text() == program.index()


@pytest.mark.parametrize("name", program.NAMES)
def test_the_record_has_its_seeds(name: str) -> None:
    results = program.load(program.HERE / "results" / f"{name}.json")
    for group in set(results.groups()) - {"search"}:
        for loss in results.losses(group):
            assert len(results.seeds(loss, group)) >= 5
    assert results.json["preset"] == json.loads(json.dumps(asdict(PRESETS[program.RECORDED])))


# What the answers rest on that are written by hand.
CLAIMS: list[tuple[str, str, str, str | None, str]] = [
    *(("tail", "nvamp", key, None, "no clear difference") for key in ("cross_entropy", "cvar", "max")),
    *(("tail", loss, "cross_entropy", None, "worse") for loss in TAIL[2:]),
    *(("tail", loss, "cvar", None, "better") for loss in TAIL[2:]),
    ("tail", "nvamp:gamma=0.05", "max", None, "better"),
    *(("types", "nvamp", name, None, "no clear difference") for name in TYPES),
    *(("types", loss, name, None, "worse") for loss in TAIL[2:] for name in TYPES if name != "rare"),
    *(("types", loss, "rare", None, "no clear difference") for loss in TAIL[2:]),
    *(
        ("stability", "nvamp", key, group, "no clear difference")
        for group in stability.CHANGES
        for key in ("cross_entropy", "gradient_peak", "spikes")
    ),
    ("stability", "nvamp:gamma=0.05", "gradient_peak", "plain", "worse"),
    ("tuning", "nvamp:gamma=0.01", "cvar", "confirm", "better"),
    ("tuning", "nvamp:beta=1,gradient=token", "cvar", "confirm", "better"),
    ("tuning", "focal:gamma=1", "cvar", "confirm", "worse"),
    *(("finetuning", loss, "cross_entropy", "mislabelled", "worse") for loss in finetuning.LOSSES[1:]),
    ("finetuning", "nvamp", "cvar", "mislabelled", "better"),
    ("finetuning", "nvamp:gradient=token", "cvar", "mislabelled", "no clear difference"),
    ("finetuning", "nvamp:gamma=0.05", "cvar", "mislabelled", "better"),
]


@pytest.mark.parametrize(("name", "loss", "key", "group", "expected"), CLAIMS)
def test_the_answers_are_those_of_the_record(
    name: str, loss: str, key: str, group: str | None, expected: str
) -> None:
    results = program.load(program.HERE / "results" / f"{name}.json")
    assert results.verdict(loss, key, group) == expected


def test_the_goal_is_out_of_reach() -> None:
    results = program.load(program.HERE / "results" / "tuning.json")
    for group in results.groups():
        for loss in results.losses(group)[1:]:
            change = results.percent(loss, "cvar", group)
            assert change is not None
            assert change.mean > tuning.GAIN
    assert not any(run["diverged"] for run in results.json["runs"])


@pytest.mark.parametrize("loss", TAIL[1:])
@pytest.mark.parametrize("group", [group for group in stability.CHANGES if group != "plain"])
def test_no_change_costs_nvamp_less(loss: str, group: str) -> None:
    results = program.load(program.HERE / "results" / "stability.json")
    extra = results.extra_cost(loss, "cross_entropy", group, "plain")
    costs_more = (loss, group) == ("nvamp:gamma=0.05", "lr-2x")
    assert verdict(extra, lower_is_better=True) == ("worse" if costs_more else "no clear difference")
    assert not any(run["diverged"] for run in results.json["runs"])


@pytest.mark.parametrize("loss", TAIL[1:])
def test_mislabelled_documents_cost_nvamp_more(loss: str) -> None:
    results = program.load(program.HERE / "results" / "finetuning.json")
    extra = results.extra_cost(loss, "cross_entropy", "mislabelled", "clean")
    assert verdict(extra, lower_is_better=True) == "worse"


def test_fine_tuning_with_dft_ends_worse_than_it_begins() -> None:
    results = program.load(program.HERE / "results" / "finetuning.json")
    for group in results.groups():
        assert min(filter(None, results.values("dft", "cross_entropy", group))) > results.json["before"] + 1


def test_numbers_of_the_summary() -> None:
    runs = [
        {"group": "a", "loss": loss, "seed": seed, "metrics": {"x": value}}
        for loss, values in {"ce": [2.0, 4.0, 3.0], "nvamp": [2.5, 4.0, 4.0]}.items()
        for seed, value in enumerate(values)
    ]
    results = Results({"runs": runs})
    half = 4.30265 * np.std([0.5, 0, 1], ddof=1) / np.sqrt(3)
    found = results.difference("nvamp", "x")
    assert found is not None
    assert (found.mean, found.half_width) == pytest.approx((0.5, half))
    percent = results.percent("nvamp", "x")
    assert percent is not None
    assert percent.mean == pytest.approx((25 + 0 + 100 / 3) / 3)
    assert results.verdict("nvamp", "x") == "no clear difference"
    assert results.mean("nvamp", "y") is None
    assert signed(Estimate(-0.25, 0.5), 2) == "−0.25 (−0.75 to +0.25)"
    assert plain(Estimate(4.4731, 0.0123)) == "4.473 ± 0.012"


def test_gradient_norms_are_those_before_clipping(corpus: Corpus) -> None:
    class Clipped(TrainerCallback):  # type: ignore[misc]
        norms: list[float] = []  # noqa: RUF012

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gradients = [p.grad.norm() for p in kwargs["model"].parameters() if p.grad is not None]
            self.norms.append(torch.stack(gradients).norm().item())

    ours, clipped = GradientNorms(), Clipped()
    recipe = Recipe(steps=6, batch_size=4, lr=1e-2)
    train(parse_loss("ce"), 0, recipe, corpus, lambda step, value: None, callbacks=[ours, clipped])
    assert len(ours.values) == 6
    assert max(ours.values) > 1
    assert clipped.norms == pytest.approx([min(norm, 1) for norm in ours.values], rel=1e-3)


def test_spikes() -> None:
    norms: list[float | None] = [50.0, 1.0, 1.0, 1.0, 3.0, 1.0, 1.9, 1.0, 2.1, 1.0]
    assert gradient_metrics(norms) == {"gradient_peak": 3.0, "spikes": 2.0}
    assert gradient_metrics([*norms, None]) == {"gradient_peak": None, "spikes": None}


def test_bfloat16_is_in_the_products_only(corpus: Corpus) -> None:
    runs = [
        train(parse_loss("ce"), 0, Recipe(2, 4, 1e-2, bf16=bf16), corpus, lambda step, value: None)
        for bf16 in (False, True)
    ]
    assert all(parameter.dtype == torch.float32 for parameter in runs[1].model.parameters())
    distance = np.abs(runs[0].nll - runs[1].nll)
    assert 1e-4 < distance.max() < 0.5


def test_scale(corpus: Corpus) -> None:
    small, large = (build_model(None, corpus, scale).num_parameters() for scale in (1, 2))
    assert 4 < large / small < 8  # twice the layers of four times the size, twice the embeddings


def test_mislabelled_documents_are_whole(documents: list[str], corpus: Corpus) -> None:
    noise = finetuning.mislabelled(corpus, documents, 3)
    assert noise.shape == corpus.train.shape
    flagged = corpus.tokenizer.decode(corpus.train[noise.bool()])
    bad = [document for document in split(documents)[0] if document in flagged]
    assert len(bad) == round(0.2 * len(split(documents)[0]))
    assert not torch.equal(noise, finetuning.mislabelled(corpus, documents, 2))
    labelled = LabelledBlocks(corpus.train, 300, noise, seed=0)
    changed = labelled.labels != labelled.inputs
    assert not changed[noise == 0].any()
    assert changed[noise == 1].float().mean() > 0.9


def test_other_mislabelled_documents_are_another_study(
    documents: list[str], corpus: Corpus, tmp_path: Path
) -> None:
    recipe = Recipe(steps=1, batch_size=2, lr=1e-3)
    list(run_all(tmp_path, ("ce",), (0,), recipe, corpus))
    with pytest.raises(Exception, match="noise by token"):
        list(run_all(tmp_path, ("ce",), (0,), recipe, corpus, lambda seed: torch.ones(corpus.train.shape)))


def test_kinds_of_characters() -> None:
    document = '"""Doc."""\n\nwhile x1:  # why\n    y = f("s", 2)\n'
    kinds = [source.KINDS[index] for index in source.character_kinds(document)]
    expected = {
        '"""Doc."""': "docstring",
        "while": "keyword",
        "x1": "identifier",
        ":": "operator",
        "# why": "comment",
        "f": "identifier",
        '"s"': "string",
        "2)": "number",
        "    y": "layout",
    }
    for text, kind in expected.items():
        assert kinds[document.index(text)] == kind
        assert kind in ("layout", "number") or kinds[document.index(text) + len(text) - 1] == kind
    assert set(source.character_kinds("def broken(:\n  '''")) == {source.KINDS.index("unparsed")}


def test_kinds_line_up_with_the_held_out_labels(documents: list[str], corpus: Corpus) -> None:
    kinds = source.held_out_labels(corpus, documents, source.kind_of)
    labels = corpus.held_out[:, 1:].reshape(-1)
    assert kinds.shape == labels.shape
    for kind, words in {"keyword": {"def", "return"}, "number": set("012345678"), "comment": {"#"}}.items():
        found = {
            corpus.tokenizer.decode([i]).strip()
            for i in labels[torch.from_numpy(kinds) == source.KINDS.index(kind)]
        }
        assert words <= found
        assert kind == "comment" or found == words
    with pytest.raises(ValueError, match="documents: expected"):
        source.held_out_labels(corpus, documents[::-1], source.kind_of)


def test_the_choice_of_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"a": (1.0, -6.0), "b": (0.4, -2.0), "c": (0.0, 0.0), "d": (9.0, -9.0), "e": (0.2, -1.0)}
    runs = [
        {"loss": loss, "seed": 0, "metrics": {"cross_entropy": 100 + mean, "cvar": 100 + tail}}
        for loss, (mean, tail) in {"ce": (0.0, 0.0), **found}.items()
    ]
    runs.append({"loss": "f", "seed": 0, "metrics": {"cross_entropy": None, "cvar": None}})
    monkeypatch.setattr(tuning, "NVAMP", ("a", "b", "c", "d", "f"))
    monkeypatch.setattr(tuning, "OTHERS", ("e",))
    assert tuning.choose(runs) == {
        "nvamp: lightest tail for at most 0.5%": "b",
        "nvamp: lightest tail for at most 2.0%": "a",
        "nvamp: cheapest with the gain": "a",
        "other: lightest tail for at most 0.5%": "e",
        "other: lightest tail for at most 2.0%": "e",
    }
