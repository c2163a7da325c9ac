"""A study: train every loss from every seed, keep each run as it finishes, and gather the results."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from math import inf
from pathlib import Path
from typing import Protocol

from nvamp.study import StudyError
from nvamp.study.corpus import Corpus, build_corpus, frequency_classes
from nvamp.study.losses import Loss, parse_losses
from nvamp.study.models import load_tokenizer, max_positions, model_bytes, quiet
from nvamp.study.peers import POLL, Peers
from nvamp.study.results import describe, describe_corpus, gather
from nvamp.study.sources import read_documents
from nvamp.study.store import Json, Store, conditions, finite, kept_runs, versions
from nvamp.study.training import Progress, Recipe, train

SEQUENCE = 64  # tokens in a block, for the built-in model
SEQUENCE_PRETRAINED = 256
LR = 2e-3
LR_PRETRAINED = 5e-5

Pair = tuple[Loss, int]  # the loss and the seed of a run


@dataclass(frozen=True)
class Settings:
    """What the user asks of a study; the fields are the options of `nvamp compare`.

    Attributes:
        losses: specs; the first one is the baseline.
        seeds: the number of seeds, which are 0, 1, ...
        lr: `None` for the model's default.
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
        """Raise a `StudyError` if an option is out of range."""
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


class Display(Protocol):
    """Shows the progress of a study."""

    def prepared(self, corpus: Corpus, runs: int, kept: int) -> None:
        """The text is ready; `kept` of the `runs` runs are already finished."""

    def run(self, loss: str, seed: int) -> Progress:
        """A run of this process starts."""

    def finished(self, record: Json) -> None:
        """A run of this process or of another rank is finished and kept."""

    def replacing(self, runs: int) -> None:
        """The report of this study replaces one that has `runs` runs more; these are kept."""

    def waiting(self) -> None:
        """This process has finished its runs; other ranks have not."""


def compare(
    settings: Settings,
    store: Store,
    command: str,
    display: Display,
    overwrite: bool = False,
    peers: Peers = Peers(),  # noqa: B008  # it is immutable
) -> Json | None:
    """Train the runs that are missing, and gather the results, which are also written to the store.

    Several ranks share the training. The first one gathers the results; the others return `None`.

    Raises:
        StudyError: the settings, the text, the model or the directory do not allow the study.
    """
    quiet()
    settings.check()
    losses = parse_losses(list(settings.losses))
    recipe, out = settings.recipe(), store.out
    if overwrite and settings.model and out.resolve() in Path(settings.model).resolve().parents:
        raise StudyError(f"--model {settings.model} is in --out, which --overwrite would drop")
    if peers.rank == 0:  # another rank might see the directory while the first one is creating it
        store.check()
    corpus = prepare(settings, out)
    # Seed by seed: an interrupted study then has its first seeds under every loss.
    pairs = [(loss, seed) for seed in range(settings.seeds) for loss in losses]

    def claim() -> list[int]:
        store.claim(conditions(recipe, corpus), overwrite)
        missing = [index for index, pair in enumerate(pairs) if store.load(*pair) is None]
        _check_space(len(missing), recipe, corpus, out)
        return missing

    missing = [pairs[index] for index in peers.of_first(claim)]
    if peers.rank > 0:
        store.join(conditions(recipe, corpus), peers.rank)
    display.prepared(corpus, len(pairs), len(pairs) - len(missing))
    _train_missing(missing, recipe, corpus, store, display, peers)
    if peers.rank > 0:
        return None
    results = _results(settings, command, losses, corpus, store)
    if left_out := store.reported() - {(loss.name, seed) for loss, seed in pairs}:
        display.replacing(len(left_out))
    store.save_results(results)
    return results


def _check_space(runs: int, recipe: Recipe, corpus: Corpus, out: Path) -> None:
    """Raise a `StudyError` if the models of so many runs do not fit on the disk."""
    needed = runs * model_bytes(recipe.model, corpus)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise StudyError(
            f"--out {out}: the models of the {runs} runs to train take {needed / 1e6:,.2f} MB, "
            f"and the disk has {free / 1e6:,.2f} MB left; {kept_runs(out)} finished runs are kept"
        )


def _train_missing(
    missing: Sequence[Pair], recipe: Recipe, corpus: Corpus, store: Store, display: Display, peers: Peers
) -> None:
    """Train this rank's share of the missing runs. The first rank then waits for the others."""
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
    """Show the awaited runs that have finished, and return the others."""
    left = []
    for pair in awaited:
        record = store.load(*pair)
        if record is None:
            left.append(pair)
        else:
            display.finished(record)
    return left


def _results(settings: Settings, command: str, losses: Sequence[Loss], corpus: Corpus, store: Store) -> Json:
    """The contents of results.json, with `None` in place of numbers that are not finite."""
    results: Json = finite(
        {
            "command": command,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "settings": {**asdict(settings), "lr": settings.recipe().lr, "out": str(store.out)},
            "text": describe_corpus(corpus),
            "tokens_seen": settings.steps * settings.batch_size * corpus.train.shape[1],  # by each run
            **gather(losses, settings.seeds, store),
        }
    )
    return results


def prepare(settings: Settings, out: Path | None = None) -> Corpus:
    """Read, split, tokenize and pack the text; files in the directory `out` are ignored."""
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
