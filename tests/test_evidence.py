"""The questions are answered end to end, and what is on record draws the figures and pages that are in the docs."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.evidence import __main__ as program
from benchmarks.evidence import formats, front, fronts, held_out, plan, source
from benchmarks.evidence import training as train
from benchmarks.evidence.fronts import Group
from benchmarks.evidence.plan import Job
from benchmarks.evidence.store import Runs
from nvamp.study.corpus import Corpus, build_corpus, train_tokenizer
from nvamp.study.examples import build_examples
from nvamp.study.metrics import Estimate
from nvamp.study.rows import Pair, Rows
from nvamp.study.sources import read_documents
from tests.study.conftest import one_thread

__all__ = ["one_thread"]


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


def other_texts(first: Corpus) -> dict[str, Corpus]:
    sequence, documents = first.train.shape[1], [module(seed) for seed in range(100, 112)]
    pairs = [Pair(f"What does f{i} do?", f"It adds {i}.") for i in range(200)]
    return {
        "reference": build_corpus(documents, "modules", sequence, first.tokenizer),
        "answers": build_examples(Rows(examples=[*pairs]), "questions", sequence, first.tokenizer),
    }


@pytest.fixture
def tiny(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan of a few short runs, and places of its own for their results."""
    smoothed = "ce:label_smoothing=0.1"
    runs = {
        "240": [("ce", 0), (smoothed, 0), ("ce", 1), (smoothed, 1)],
        "1500": [("ce", 0), (smoothed, 0), ("ce>tail:strength=2", 0), ("entropy", 0)],
        "6000": [("ce", 0), (smoothed, 0)],
        "noise10": [("ce", 0), (smoothed, 0)],
        "noise30": [("ce", 0), (smoothed, 0)],
    }
    jobs = [
        Job(group, loss, seed, steps=2, batch_size=4, changes={"noise": 0.3} if "noise" in group else {})
        for group, pairs in runs.items()
        for loss, seed in pairs
    ]
    monkeypatch.setattr("nvamp.study.watching.CURVE_POINTS", 1)
    start = Job("start", "ce", 0, steps=2, batch_size=4)
    tuned = [
        Job(text, loss, 0, steps=2, batch_size=4, text=text)
        for text in ("reference", "answers")
        for loss in ("ce", smoothed)
    ]
    monkeypatch.setattr(plan, "plan", lambda: [*jobs, *tuned[:1], start, *tuned])
    monkeypatch.setattr(plan, "START", start)
    monkeypatch.setattr("benchmarks.evidence.store.other_texts", other_texts)
    monkeypatch.setattr(train, "TEXT", (str(text),))
    for name in ("RESULTS", "DOCS"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(program, name, tmp_path / name)
    return tmp_path


def test_questions_end_to_end(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["all", "--out", str(tiny / "store"), "--workers", "1"]
    program.main(command)
    assert len(capsys.readouterr().out.splitlines()) == len({job.name for job in plan.plan()})
    for name in program.NAMES:
        assert (tiny / "DOCS" / f"{name}.svg").read_text().startswith("<?xml")
        assert f"python -m benchmarks.evidence {name}" in (tiny / "DOCS" / f"{name}.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in (tiny / "store").rglob("*.*")}
    program.main(command)
    assert capsys.readouterr().out == ""  # nothing is trained twice
    assert {path: path.stat().st_mtime_ns for path in (tiny / "store").rglob("*.*")} == before
    damaged = tiny / "store" / f"{plan.plan()[0].name}.json"
    damaged.unlink()
    program.main(command)
    assert len(capsys.readouterr().out.splitlines()) == 1  # what is missing, and no more


def test_the_plan_has_each_run_once() -> None:
    jobs = plan.plan()
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        train.loss_of(job)  # every loss is one


def test_a_run_that_another_process_holds_is_left_to_it(tiny: Path) -> None:
    runs = Runs(tiny / "store", train.TEXT)
    first, second = plan.plan()[:2]
    runs.path(first).parent.mkdir(parents=True)
    with train.hold(runs.path(first).with_suffix(".lock")):
        train.work([first, second], runs, seconds=600)
    assert runs.load(first) is None
    assert runs.load(second) is not None


def test_nothing_starts_that_would_end_too_late(tiny: Path) -> None:
    runs = Runs(tiny / "store", train.TEXT)
    train.work(plan.plan()[:2], runs, seconds=-1)
    assert not any(runs.load(job) for job in plan.plan())


def test_the_loss_is_switched_after_its_share_of_the_steps() -> None:
    calls: list[str] = []
    switch = train.Switch(lambda: calls.append("before"), lambda: calls.append("after"), 2)
    for _ in range(3):
        switch()
    assert calls == ["before", "before", "after"]


@pytest.mark.parametrize("name", program.NAMES)
def test_docs_are_drawn_from_the_record(name: str, tmp_path: Path) -> None:
    program.draw(name, tmp_path)
    drawn = (tmp_path / f"{name}.svg").read_text()
    assert drawn == (program.DOCS / f"{name}.svg").read_text()
    assert (program.DOCS / f"{name}.md").read_text() == program.page(name)
    assert (program.DOCS / "README.md").read_text() == program.index()
    assert (program.DOCS / "recipe.md").read_text() == program.recipe()


def excludes_zero(value: Estimate | None) -> bool:
    return value is not None and value.half_width is not None and abs(value.mean) > value.half_width


def test_the_answer_of_the_fronts_is_that_of_the_record() -> None:
    groups = program.groups("front")
    early, middle, late = groups["240"], groups["1500"], groups["6000"]
    slower = middle.at(plan.LR / 2)
    smooth, share, switched = "ce:label_smoothing=0.1", "nvamp:gamma=0.04,tail=0.05", "ce>tail:strength=2"
    for group, loss in ((early, smooth), (early, switched), (slower, share), (slower, switched)):
        beyond = group.beyond(loss, 0.5)
        assert beyond is not None
        assert excludes_zero(beyond)
        assert beyond.mean < -1
    for price in fronts.PRICES:
        assert not excludes_zero(slower.beyond(smooth, price))
    for group in (late, late.at(plan.LR / 2)):
        for loss in group.losses():
            for price in fronts.PRICES:
                gap = group.beyond(loss, price)
                assert gap is None or not excludes_zero(gap) or gap.mean >= 0
    for group in (early, middle, late):
        for key in ("mean", "cvar"):
            assert not excludes_zero(group.change("nvamp", key))
        assert excludes_zero(group.change(share, "cvar"))
    assert not any(run["diverged"] for group in groups.values() for run in group.runs.values())


def test_what_is_said_of_the_theory_is_so() -> None:
    groups = program.groups("front")
    for name, about in (("240", 0.5), ("1500", 0.7), ("6000", 0.7)):
        for loss, weight in front.WEIGHTS.items():
            mean, tail = groups[name].shift(loss, "mean"), groups[name].shift(loss, "cvar")
            predicted_mean, predicted_tail = fronts.predicted(weight, 0.05)
            if mean is not None and tail is not None:
                assert tail.mean / predicted_tail == pytest.approx(about, abs=0.06)
                # A little weight moves the mean by less than the runs can see.
                assert name != "240" or weight < 1 or mean.mean > 1.5 * predicted_mean


def test_the_answer_of_the_extremes_is_that_of_the_record() -> None:
    groups = program.groups("extremes")
    late = groups["6000"]
    for name in ("240", "1500", "6000"):
        strong = groups[name].at_temperature("ce:label_smoothing=0.1", "max", fronts.AS_TRAINED)
        mixed = groups[name].mixed("max", 0)
        assert strong is not None
        assert mixed is not None
        assert (mixed.mean < strong.mean) == (name != "240")
    smooth, mixture = late.change("ce:label_smoothing=0.05", "max"), late.mixed("max", 0)
    assert smooth is not None
    assert mixture is not None
    assert mixture.mean < smooth.mean < 0
    others = [late.change(loss, "extreme") for loss in plan.CORE[1:] if "smoothing" not in loss]
    best = late.change("ce:label_smoothing=0.05", "extreme")
    assert best is not None
    assert all(value is None or value.mean > best.mean for value in others)


def test_the_answer_of_noise_is_that_of_the_record() -> None:
    groups = program.groups("noise")
    share, cut = "nvamp:gamma=0.04,tail=0.05", "truncated:share=0.05"
    clean_mean, clean_tail = (groups["1500"].change(share, key) for key in ("mean", "cvar"))
    assert clean_mean is not None
    assert clean_tail is not None
    for name in ("noise10", "noise30"):
        mean, tail = (groups[name].change(share, key) for key in ("mean", "cvar"))
        assert mean is not None
        assert tail is not None
        assert excludes_zero(mean)
        assert mean.mean > 3 * clean_mean.mean > 0
        assert excludes_zero(tail) == (name == "noise10")
        assert clean_tail.mean / 2 < tail.mean < 0
        for key in ("mean", "cvar"):
            change = groups[name].change(cut, key)
            assert change is not None
            assert change.mean > 0
            assert excludes_zero(change) or key == "mean"
        for loss in plan.NOISY[1:]:
            mean = groups[name].change(loss, "mean")
            assert mean is not None
            assert mean.mean > 0


def test_no_loss_gains_by_a_rate_of_its_own() -> None:
    group = program.groups("front")["1500"]
    for loss in plan.RATED:
        by_rate = {}
        for lr in (*plan.RATES, plan.LR):
            change = group.change_of_seed(loss, "mean", lr, 0)
            assert change is not None
            by_rate[lr] = change.mean
        assert min(by_rate, key=by_rate.__getitem__) == plan.LR / 2


def test_which_rate_is_the_best_at_other_lengths() -> None:
    groups = program.groups("front")
    for name, rates, best in (
        ("240", (plan.LR / 2, plan.LR, 2 * plan.LR), plan.LR),
        ("6000", (plan.LR / 2, plan.LR), plan.LR / 2),
    ):
        for loss in groups[name].losses(rates[0]):
            means = {}
            for lr in rates:
                value = groups[name].at(lr).values(loss, "mean")
                assert value is not None
                means[lr] = value.mean
            assert min(means, key=means.__getitem__) == best
    smoothed = groups["240"].at(plan.LR / 2).beyond("ce:label_smoothing=0.1", 0.5)
    assert smoothed is not None
    assert smoothed.mean < 0
    assert excludes_zero(smoothed)


def test_the_answer_of_the_types_is_that_of_the_record() -> None:
    groups = program.groups("types")
    for kind, side in (("rare", -1), ("frequent", 1)):
        change = groups["1500"].type_change("nvamp:gamma=0.04,tail=0.05", kind)
        assert change is not None
        assert excludes_zero(change)
        assert side * change.mean > 0
    for name in ("rare", "mid", "frequent"):
        effort = groups["6000"].effort("nvamp", name)
        assert effort is not None
        assert effort.mean == pytest.approx(1, abs=0.01)


def test_the_answer_of_fine_tuning_is_that_of_the_record() -> None:
    groups = program.groups("finetuning")
    before = next(iter(groups["start"].runs.values()))
    for name in ("reference", "answers"):
        usual = groups[name].gained("ce", before)
        dft = groups[name].gained("dft", before)
        assert usual is not None
        assert dft is not None
        assert dft.mean > 2 * usual.mean
        assert not excludes_zero(groups[name].change("entropy", "mean"))
        for loss in plan.TUNED[1:]:
            gained = groups[name].gained(loss, before)
            assert gained is not None
            assert gained.mean > usual.mean - 0.03


def test_predictions_are_those_of_the_logits() -> None:
    logits = torch.tensor([[[2.0, 0.0, -1.0], [0.5, 0.5, 0.0], [0.0, 3.0, 0.0]]])
    blocks = torch.tensor([[1, 0, 2]])

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(logits)

        def forward(self, input_ids: torch.Tensor) -> Any:
            return type("Output", (), {"logits": self.weight})

    found = held_out.predictions(Model(), blocks)
    for temperature, one in zip(held_out.TEMPERATURES, found, strict=True):
        p = (logits[0, :2].double() / temperature).softmax(-1)
        assert one.nll == pytest.approx([-p[0, 0].log().item(), -p[1, 2].log().item()], rel=1e-5)
        assert one.confidence == pytest.approx(p.max(-1).values.tolist(), rel=1e-5)
        assert one.squares == pytest.approx((p**2).sum(-1).tolist(), rel=1e-5)
        assert one.correct.tolist() == [True, False]
        brier = ((p - torch.eye(3)[[0, 2]]) ** 2).sum(-1).mean().item()
        assert one.metrics()["brier"] == pytest.approx(brier, rel=1e-4)


def test_calibration_error() -> None:
    confidence = np.array([0.9, 0.9, 0.1, 1.0])
    correct = np.array([True, False, False, True])
    # bins: {0.9, 0.9}, {0.1}, {1.0}
    assert held_out.calibration_error(confidence, correct) == pytest.approx((0.8 + 0.1 + 0) / 4)


def test_mixing_with_the_uniform_distribution() -> None:
    assert held_out.mixed(np.log([4.0, 1e9]), 0.5, 2) == pytest.approx(-np.log([0.375, 0.25]))


def runs_of(losses: dict[str, list[list[tuple[float, float]]]]) -> Group:
    """A group from (mean, tail) at the first temperatures, for each loss and seed; more temperatures repeat."""
    count = len(held_out.TEMPERATURES)

    def halves(points: list[tuple[float, float]]) -> dict[str, Any]:
        filled = points + points[-1:] * (count - len(points))
        columns = {"mean": [x for x, _ in filled], "cvar": [y for _, y in filled]}
        return dict.fromkeys("01", columns)

    runs = {
        (loss, plan.LR, seed): {"diverged": False, "halves": halves(points)}
        for loss, seeds in losses.items()
        for seed, points in enumerate(seeds)
    }
    return Group({}, runs)


# The fifth temperature is 1.
CE_FRONT = [(104.0, 120.0), (103.0, 115.0), (102.0, 110.0), (101.0, 105.0), (100.0, 100.0), (101.0, 94.0)]


def test_the_front_is_read_between_temperatures() -> None:
    ours = [(x + 0.5, y - 2) for x, y in CE_FRONT]
    group = runs_of({"ce": [CE_FRONT, CE_FRONT], "other": [ours, ours]})
    assert group.at_price("ce", 0.5) == Estimate(pytest.approx(-3.0), pytest.approx(0))
    assert group.at_price("other", 1.0) == Estimate(pytest.approx(-5.0), pytest.approx(0))
    assert group.beyond("other", 1.0) == Estimate(pytest.approx(1.0), pytest.approx(0))
    assert group.lowest("other") == Estimate(pytest.approx(0.5), pytest.approx(0))
    assert group.at_price("other", 0.4) is None  # no temperature has so low a mean
    assert group.at_price("ce", 1.5) is None  # beyond the last temperature
    assert group.choose("ce", 0.5) == 4
    assert group.choose("ce", 1.5) == 5
    assert group.choose("other", 0.4) is None


def test_what_is_chosen_on_some_seeds_is_measured_on_others() -> None:
    light, lighter = ([(x, y - less) for x, y in CE_FRONT] for less in (1, 2))
    group = runs_of({"ce": [CE_FRONT] * 3, "lucky": [lighter, light, light], "other": [light, lighter]})
    losses = ("ce", "lucky", "other")
    assert group.best(losses, 0.5, [0, 1]) == ("lucky", 4)  # the other has no more seeds
    assert group.at_temperature("lucky", "cvar", 4, [2]) == Estimate(pytest.approx(-1), None)
    assert group.best(losses, 1.5, [0, 1]) == ("lucky", 5)
    assert group.best(losses, -0.5, [0, 1]) is None


def test_changes_are_paired_by_seed() -> None:
    group = runs_of({"ce": [CE_FRONT] * 3, "other": [CE_FRONT]})
    assert group.seeds("other") == [0]
    for (loss, _, seed), run in group.runs.items():
        run["metrics"] = {"x": (100.0 + seed) * (1.1 if loss == "other" else 1)}
    assert group.change("other", "x") == Estimate(pytest.approx(10), None)
    group.runs["other", plan.LR, 0]["diverged"] = True
    assert group.change("other", "x") is None


def test_a_rate_has_a_cross_entropy_of_its_own() -> None:
    group = runs_of({"ce": [CE_FRONT] * 2, "other": [CE_FRONT]})
    slow = {(loss, plan.LR / 2, seed): dict(run) for (loss, _, seed), run in group.runs.items()}
    for of, mean in ((group.runs, 100.0), (slow, 200.0)):
        for (loss, _, _), run in of.items():
            run["metrics"] = {"x": mean * (1.1 if loss == "other" else 1)}
    both = Group({}, {**group.runs, **slow})
    assert both.change_of_seed("other", "x", plan.LR / 2, 0) == Estimate(pytest.approx(120), None)
    assert both.at(plan.LR / 2).change("other", "x") == Estimate(pytest.approx(10), None)
    assert both.at(plan.LR / 2).seeds("ce") == [0, 1]


def test_what_runs_can_see() -> None:
    # Three seeds with differences −1, 0 and 1: a standard error of 1/√3.
    error = 3**-0.5
    value = Estimate(0.0, 4.30265 * error)
    assert fronts.standard_error(value, 3) == pytest.approx(error)
    assert fronts.detectable(value, 3) == pytest.approx((4.30265 + 1.06066) * error)
    assert not fronts.equivalent(value, 3, within=2.91 * error)
    assert fronts.equivalent(value, 3, within=2.93 * error)
    assert not fronts.equivalent(Estimate(0.0, None), 1)


def test_numbers_of_the_pages() -> None:
    assert formats.signed(Estimate(-0.25, 0.5), 2) == "−0.25 (−0.75 to +0.25)"
    assert formats.signed(Estimate(0.04, None), 1) == formats.mean_only(Estimate(-0.04, None), 1) == "0.0"
    assert formats.plain(Estimate(4.4731, 0.0123)) == "4.473 ± 0.012"
    assert formats.around(Estimate(-0.25, 0.5), 2) == "−0.25\u00a0±\u00a00.50"
    assert formats.size(Estimate(-0.25, 0.5), 2) == "0.25"
    assert formats.starred(Estimate(-1.8, 1.7)) == "−1.8*"
    assert formats.starred(Estimate(-1.8, 1.9)) == formats.starred(Estimate(-1.8, None)) == "−1.8"
    assert formats.plain(None) == formats.starred(None) == "–"


def test_the_theory() -> None:
    # The numbers of docs/mathematics.md: r = 1 on the hardest 5%.
    mean, tail = fronts.predicted(1.0, 0.05)
    assert (mean, tail) == pytest.approx((0.0141, -0.6444), abs=1e-4)


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
