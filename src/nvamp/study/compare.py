"""A study: every loss from every seed, each run kept as it finishes, and the results of them all."""

import json
import os
import platform
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

import nvamp
from nvamp.study import StudyError
from nvamp.study.corpus import Corpus, build_corpus, frequency_classes
from nvamp.study.files import remove, replacing
from nvamp.study.inspect import inspect_text, write_page
from nvamp.study.losses import Loss, parse_losses
from nvamp.study.metrics import METRICS, VERDICT_KEYS, difference, estimate, held_out_metrics, verdict
from nvamp.study.models import load_tokenizer, max_positions, model_fingerprint, quiet
from nvamp.study.peers import POLL, Peers
from nvamp.study.sources import read_documents
from nvamp.study.training import Progress, Recipe, Run, train

SEQUENCE = 64  # tokens of a block for the built-in model
SEQUENCE_PRETRAINED = 256
LR = 2e-3
LR_PRETRAINED = 5e-5
BINS = 60  # of the distribution of token losses
TAIL_POINTS = 120  # of the survival function
# Of the conditions, those that are known by a hash, which says nothing to a reader.
HASHED = ("text", "content of --model")

Json = dict[str, Any]
Pair = tuple[Loss, int]  # a loss and a seed: what a run is of


@dataclass(frozen=True)
class Settings:
    """What a study is asked for; the fields are the options of `nvamp compare`.

    Attributes:
        losses: specs, the first is the baseline.
        seeds: how many; the seeds are 0, 1, ...
        lr: `None` for the default of the model.
    """

    losses: tuple[str, ...]
    seeds: int
    steps: int
    batch_size: int
    lr: float | None = None
    noise: float = 0.0
    model: str | None = None
    text: tuple[str, ...] = ()
    dataset: tuple[str, ...] = ()

    def check(self) -> None:
        """A `StudyError` where an option is out of range."""
        for option, value in (("seeds", self.seeds), ("steps", self.steps), ("batch-size", self.batch_size)):
            if value < 1:
                raise StudyError(f"--{option} must be at least 1, got {value}")
        if self.lr is not None and not 0 < self.lr < inf:
            raise StudyError(f"--lr must be finite and positive, got {self.lr:g}")
        if not 0 <= self.noise <= 1:
            raise StudyError(f"--noise must be between 0 and 1, got {self.noise:g}")
        if not self.losses:
            raise StudyError("--loss: expected at least one")
        if self.text and self.dataset:
            raise StudyError("--text and --dataset exclude each other")

    def recipe(self) -> Recipe:
        lr = self.lr or (LR if self.model is None else LR_PRETRAINED)
        return Recipe(self.steps, self.batch_size, lr, self.noise, self.model)


class Grid(NamedTuple):
    """Token losses (nats) at which the distributions of all losses are given."""

    bin_edges: NDArray[np.float64]  # [BINS + 1]
    thresholds: NDArray[np.float64]  # [TAIL_POINTS]


class Display(Protocol):
    """Where a study shows how far it is."""

    def prepared(self, corpus: Corpus, runs: int, kept: int) -> None:
        """The text is ready; of `runs` runs, `kept` are finished already."""

    def run(self, loss: str, seed: int) -> Progress:
        """A run of this process begins."""

    def finished(self, record: Json) -> None:
        """A run is finished and kept, of this process or of another rank."""

    def waiting(self) -> None:
        """The runs of this process are finished, those of other ranks are not."""


class Store:
    """The finished runs of a study in a directory, each written whole or not at all."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def check(self) -> Json | None:
        """The conditions of the study in the directory; a `StudyError` where it holds something else."""
        try:
            return self._conditions() if self.out.exists() and any(self.out.iterdir()) else None
        except OSError as error:
            raise StudyError(f"--out {self.out}: {error.strerror}") from error

    def claim(self, conditions: Json, overwrite: bool) -> None:
        """Make the directory this study's; a `StudyError` where it holds runs made under other conditions."""
        kept = self.check()
        if kept and not overwrite and (changed := _changed(kept, conditions, "now", "has changed since")):
            raise StudyError(
                f"{self.out} holds runs of another study: {changed}; "
                "choose another --out, or start anew with --overwrite"
            )
        try:
            if overwrite:
                self._clear()
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self._settings, conditions)  # before anything else: by it a study is known
            for part in ("runs", "models", "inspect"):
                (self.out / part).mkdir(exist_ok=True)
        except OSError as error:
            raise StudyError(f"--out {self.out}: {error.strerror}") from error

    def join(self, conditions: Json, rank: int) -> None:
        """Look at what the first rank has claimed: a `StudyError` where it is not what this rank would."""
        if not self._settings.exists():
            raise StudyError(f"--out {self.out}: not the directory of the first rank")
        on = f"on rank {rank}"
        if changed := _changed(self._conditions(), conditions, on, f"is another {on}"):
            raise StudyError(f"the ranks differ: {changed}")

    @property
    def _settings(self) -> Path:
        return self.out / "settings.json"

    def _conditions(self) -> Json:
        """Those of the study in the directory; a `StudyError` where there is none."""
        kept = _read_json(self._settings) if self._settings.is_file() else {}
        if not {"nvamp", "--steps"} <= kept.keys():
            raise StudyError(f"--out {self.out}: not empty, and not a study's: choose another")
        return kept

    def _clear(self) -> None:
        """Remove what a study writes, and nothing else."""
        for part in ("runs", "models", "inspect"):
            for path in (self.out / part).glob("*"):
                if re.fullmatch(r".+-seed\d+(\.json|\.npy|\.html)?(\.part)?", path.name):
                    remove(path)
        for name in ("results.json", "report.html"):
            (self.out / name).unlink(missing_ok=True)

    def load(self, loss: Loss, seed: int) -> Json | None:
        """The record of a finished run; `None` where it is not finished, or has lost its token losses."""
        path = self._record(loss, seed)
        return _read_json(path) if path.exists() and self._nll(loss, seed).exists() else None

    def nll(self, loss: Loss, seed: int) -> NDArray[np.float32]:
        """The held-out token losses of a finished run, [tokens]."""
        path = self._nll(loss, seed)
        try:
            return np.asarray(np.load(path))
        except (OSError, ValueError, EOFError) as error:
            raise StudyError(f"{path} is damaged: delete it to train this run again") from error

    def save(self, loss: Loss, seed: int, record: Json, run: Run, corpus: Corpus) -> None:
        """Keep a finished run. The record comes last: where it is, all of the run is.

        Of the first seed, unless it diverged, a page of held-out text as the model reads it is part of it.
        """
        with replacing(self.out / "models" / f"{loss.slug}-seed{seed}") as directory:
            run.model.save_pretrained(directory)
            corpus.tokenizer.save_pretrained(directory)
        with replacing(self._nll(loss, seed)) as path, path.open("wb") as file:
            np.save(file, run.nll)
        if seed == 0 and not run.diverged:
            found = None
            with suppress(StudyError):  # a text that makes no page, of one token say, is no failed run
                found = inspect_text(run.model, corpus.tokenizer, corpus.excerpt)
            if found:
                write_page(found, f"{loss.name}, seed 0", "Held-out text", self.page(loss))
        write_json(self._record(loss, seed), record)

    def page(self, loss: Loss) -> Path:
        """Where the page of held-out text under the loss's first model is, if there is one."""
        return self.out / "inspect" / f"{loss.slug}-seed0.html"

    def _record(self, loss: Loss, seed: int) -> Path:
        return self.out / "runs" / f"{loss.slug}-seed{seed}.json"

    def _nll(self, loss: Loss, seed: int) -> Path:
        return self._record(loss, seed).with_suffix(".npy")


def compare(
    settings: Settings,
    out: Path,
    command: str,
    display: Display,
    overwrite: bool = False,
    peers: Peers = Peers(),  # noqa: B008  # it is immutable
) -> Json | None:
    """Train what is not trained yet and gather the results; they are written to `out` too.

    Several ranks share what is to train. The first one gathers, the others return `None`.
    """
    quiet()
    settings.check()
    losses = parse_losses(list(settings.losses))
    recipe = settings.recipe()
    store = Store(out)
    if overwrite and settings.model and out.resolve() in Path(settings.model).resolve().parents:
        raise StudyError(f"--model {settings.model} is in --out, which --overwrite would drop")
    if peers.rank == 0:  # to another rank, the first one's beginnings could look like something else's
        store.check()
    corpus = prepare(settings, out)
    # Seed by seed, so that an interrupted study has every loss from its first seeds.
    pairs = [(loss, seed) for seed in range(settings.seeds) for loss in losses]

    def claim() -> list[int]:
        store.claim(conditions(recipe, corpus), overwrite)
        return [index for index, pair in enumerate(pairs) if store.load(*pair) is None]

    missing = [pairs[index] for index in peers.of_first(claim)]
    if peers.rank > 0:
        store.join(conditions(recipe, corpus), peers.rank)
    display.prepared(corpus, len(pairs), len(pairs) - len(missing))
    _train_missing(missing, recipe, corpus, store, display, peers)
    if peers.rank > 0:
        return None
    results: Json = finite(
        {
            "command": command,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "settings": {**asdict(settings), "lr": recipe.lr, "out": str(out)},
            "text": describe_corpus(corpus),
            **gather(losses, settings.seeds, store),
        }
    )
    write_json(out / "results.json", results)
    return results


def _train_missing(
    missing: Sequence[Pair], recipe: Recipe, corpus: Corpus, store: Store, display: Display, peers: Peers
) -> None:
    """Train this rank's share of the missing runs. The first rank waits for the others'."""
    classes = frequency_classes(corpus.train, len(corpus.tokenizer))
    awaited = missing
    for loss, seed in missing[peers.rank :: peers.world]:
        run = train(loss, seed, recipe, corpus, display.run(loss.name, seed))
        store.save(loss, seed, describe(loss, seed, run, classes), run, corpus)
        awaited = _show_finished(awaited, store, display)
    if peers.rank == 0 and awaited:
        display.waiting()
        while awaited := _show_finished(awaited, store, display):
            time.sleep(POLL)


def _show_finished(awaited: Sequence[Pair], store: Store, display: Display) -> list[Pair]:
    """Show which of the awaited runs are finished; those that are not."""
    left = []
    for pair in awaited:
        record = store.load(*pair)
        if record is None:
            left.append(pair)
        else:
            display.finished(record)
    return left


def prepare(settings: Settings, out: Path | None = None) -> Corpus:
    """Read, split, tokenize and pack the text; what is in the directory `out` is none of it."""
    sequence, tokenizer = SEQUENCE, None
    if settings.model is not None:
        tokenizer = load_tokenizer(settings.model)
        sequence = min(SEQUENCE_PRETRAINED, max_positions(settings.model) or SEQUENCE_PRETRAINED)
    documents, source = read_documents(settings.text, settings.dataset, out)
    try:
        corpus = build_corpus(documents, source, sequence, tokenizer)
        if len(corpus.train) < settings.batch_size:
            raise StudyError(
                f"the text is too short: {len(corpus.train)} training blocks of {sequence} tokens "
                f"do not fill a batch of {settings.batch_size}"
            )
    except StudyError as error:
        raise StudyError(f"{'--dataset' if settings.dataset else '--text'}: {error}") from error
    return corpus


def conditions(recipe: Recipe, corpus: Corpus) -> Json:
    """All that must be the same for runs to be compared."""
    installed = versions()
    return {
        "--steps": recipe.steps,
        "--batch-size": recipe.batch_size,
        "--lr": recipe.lr,
        "--noise": recipe.noise,
        "--model": recipe.model,
        "content of --model": recipe.model and model_fingerprint(recipe.model),
        "text": corpus.fingerprint(),
        **{name: installed[name] for name in ("nvamp", "torch", "transformers", "device")},
    }


def _changed(kept: Json, asked: Json, now: str, other: str) -> str:
    """What of the conditions is not as it was, in words; empty where all is."""
    return ", ".join(
        f"the {name} {other}" if name in HASHED else f"{name} {kept.get(name)} ({now} {asked[name]})"
        for name in asked
        if kept.get(name) != asked[name]
    )


def versions() -> Json:
    """What the study runs on."""
    cuda = torch.cuda.is_available()
    return {
        "nvamp": nvamp.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def describe(loss: Loss, seed: int, run: Run, classes: NDArray[np.int64]) -> Json:
    """The record of a run: every number of it but its token losses."""
    return {
        "loss": loss.name,
        "seed": seed,
        "diverged": run.diverged,
        "steps": run.steps,
        "seconds": run.seconds,
        "parameters": run.model.num_parameters(),
        "curve": run.curve,
        "metrics": {
            **held_out_metrics(run.nll, run.correct, classes[run.labels]),
            "tokens_per_second": run.tokens_per_second,
            "loss_share": 100 * run.loss_share,
        },
    }


def describe_corpus(corpus: Corpus) -> Json:
    """How much text, and of what."""
    return {
        "source": corpus.source,
        "sequence": corpus.train.shape[1],
        "vocabulary": len(corpus.tokenizer),
        "train_tokens": corpus.train.numel(),
        "held_out_tokens": corpus.held_out[:, 1:].numel(),
        "unigram_cross_entropy": _unigram_cross_entropy(corpus),
    }


def _unigram_cross_entropy(corpus: Corpus) -> float:
    """Held-out cross-entropy (nats) of the training text's token frequencies, knowing no context."""
    counts = np.bincount(corpus.train.numpy().ravel(), minlength=len(corpus.tokenizer)) + 1
    labels = corpus.held_out[:, 1:].numpy().ravel()
    return float(np.log(counts.sum()) - np.log(counts[labels]).mean())


def gather(losses: Sequence[Loss], seeds: int, store: Store) -> Json:
    """The results of finished runs: per loss, over its seeds, and against the first loss."""
    records = {loss.name: [_stored(store, loss, seed) for seed in range(seeds)] for loss in losses}
    baseline = records[losses[0].name]
    tokens = {loss.name: _token_losses(store, loss, records[loss.name]) for loss in losses}
    largest = max((x.max().item() for x in tokens.values() if x is not None), default=1.0)
    grid = Grid(np.linspace(0, largest, BINS + 1), np.linspace(0, largest, TAIL_POINTS))
    return {
        "baseline": losses[0].name,
        "parameters": baseline[0]["parameters"],
        "grid": {name: points.tolist() for name, points in grid._asdict().items()},
        "losses": [
            _summary(loss.name, records[loss.name], baseline, tokens[loss.name], grid) for loss in losses
        ],
        "pages": {
            loss.name: store.page(loss).relative_to(store.out).as_posix()
            for loss in losses
            if store.page(loss).exists()
        },
        "runs": [record for loss in losses for record in records[loss.name]],
    }


def _stored(store: Store, loss: Loss, seed: int) -> Json:
    record = store.load(loss, seed)
    if record is None:
        raise StudyError(f"{store.out}: the run of {loss.name} from seed {seed} has gone missing")
    return record


def _token_losses(store: Store, loss: Loss, records: Sequence[Json]) -> NDArray[np.float32] | None:
    """Held-out token losses of all seeds, [seeds · tokens]; `None` where a run diverged."""
    if any(record["diverged"] for record in records):
        return None
    return np.concatenate([store.nll(loss, record["seed"]) for record in records])


def _summary(
    name: str,
    records: Sequence[Json],
    baseline: Sequence[Json],
    tokens: NDArray[np.float32] | None,
    grid: Grid,
) -> Json:
    metrics, differences, verdicts = {}, {}, {}
    for metric in METRICS:
        values = [record["metrics"][metric.key] for record in records]
        paired = difference(values, [record["metrics"][metric.key] for record in baseline])
        mean = estimate(values)
        metrics[metric.key] = mean and mean.as_json()
        if records is not baseline:
            differences[metric.key] = paired and paired.as_json()
            verdicts[metric.key] = verdict(paired, metric.lower_is_better)
    return {
        "name": name,
        "diverged_seeds": [record["seed"] for record in records if record["diverged"]],
        "metrics": metrics,
        "differences": differences,
        "verdicts": verdicts,
        "sentence": sentence(name, records, baseline, differences, verdicts),
        "curve": _curve(records),
        **_distribution(tokens, grid),
    }


def sentence(
    name: str, records: Sequence[Json], baseline: Sequence[Json], differences: Json, verdicts: Json
) -> str:
    """What the paired differences say, in plain words; for the baseline, that it is the baseline."""
    first = baseline[0]["loss"]
    for who, runs in ((name, records), (first, baseline)):
        diverged = [str(run["seed"]) for run in runs if run["diverged"]]
        if diverged:
            return f"{who} diverged on seed {', '.join(diverged)} of {len(runs)}: no verdict on {name}."
    if records is baseline:
        return f"{name} is what the others are compared to."
    labels = {metric.key: metric.label for metric in METRICS}
    clauses = [f"{labels[key]}: {verdicts[key]} ({_shown(differences[key])})" for key in VERDICT_KEYS]
    return f"{name} against {first}: {'; '.join(clauses)}."


def _shown(difference: Json) -> str:
    mean, half = difference["mean"], difference["half_width"]
    interval = "" if half is None else f", 95% interval {mean - half:+.3f} to {mean + half:+.3f}"
    return f"{mean:+.3f} nats{interval}".replace("-", "−")


def _curve(records: Sequence[Json]) -> list[Json]:
    """Over steps, the mean, least and largest cross-entropy of the seeds; as far as all of them got."""
    points = []
    for seeds in zip(*(record["curve"] for record in records), strict=False):
        values = [value for _, value in seeds]
        if any(value is None for value in values):
            break
        points.append(
            {"step": seeds[0][0], "mean": sum(values) / len(values), "low": min(values), "high": max(values)}
        )
    return points


def _distribution(tokens: NDArray[np.float32] | None, grid: Grid) -> Json:
    """Density of the token losses in the grid's bins, and the share of them above its thresholds."""
    if tokens is None:
        return {"density": None, "survival": None}
    # In float64: NumPy would round the edges to the dtype of the losses, and the widths with them.
    density, _ = np.histogram(tokens.astype(np.float64), bins=grid.bin_edges, density=True)
    at_most = np.searchsorted(np.sort(tokens), grid.thresholds, side="right")
    return {"density": density.tolist(), "survival": (1 - at_most / tokens.size).tolist()}


def kept_runs(out: Path) -> int:
    """How many finished runs a directory holds."""
    return len(list((out / "runs").glob("*.json")))


def finite(value: Any) -> Any:
    """`value` with `None` in place of all floats that JSON cannot write."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value if not isinstance(value, float) or np.isfinite(value) else None


def _read_json(path: Path) -> Json:
    """The object in a JSON file; a `StudyError` where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise StudyError(f"{path} is damaged: expected a JSON object, got {type(found).__name__}")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(finite(value), indent=1, allow_nan=False) + "\n")
