"""A study: every loss from every seed, each run kept as it finishes, and the results of them all."""

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
from nvamp.study.models import load_tokenizer, max_positions, quiet
from nvamp.study.peers import POLL, Peers
from nvamp.study.results import describe, describe_corpus, gather
from nvamp.study.sources import read_documents
from nvamp.study.store import Json, Store, conditions, finite, versions, write_json
from nvamp.study.training import Progress, Recipe, train

SEQUENCE = 64  # tokens of a block for the built-in model
SEQUENCE_PRETRAINED = 256
LR = 2e-3
LR_PRETRAINED = 5e-5

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
    results = _results(settings, command, losses, corpus, store)
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


def _results(settings: Settings, command: str, losses: Sequence[Loss], corpus: Corpus, store: Store) -> Json:
    """All that is known of a finished study; `None` in place of numbers that are not finite."""
    results: Json = finite(
        {
            "command": command,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "settings": {**asdict(settings), "lr": settings.recipe().lr, "out": str(store.out)},
            "text": describe_corpus(corpus),
            **gather(losses, settings.seeds, store),
        }
    )
    return results


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
