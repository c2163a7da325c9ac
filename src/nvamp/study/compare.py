"""A study: train every loss from every seed, keep each run as it finishes, and gather the results."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from math import ceil, inf
from pathlib import Path
from typing import Protocol

import torch

from nvamp.study import StudyError
from nvamp.study.chats import prefix_of
from nvamp.study.config import CONFIG, write_config
from nvamp.study.corpus import HELD_OUT_TOKENS, Corpus, build_corpus, frequency_classes, tokenize
from nvamp.study.examples import build_examples
from nvamp.study.losses import Loss, parse_losses
from nvamp.study.models import (
    check_tokens,
    keeps_apart,
    load_config,
    load_model,
    load_tokenizer,
    max_positions,
    model_bytes,
    quiet,
)
from nvamp.study.packing import Blocks, pack_text
from nvamp.study.peers import POLL, Peers
from nvamp.study.results import describe, describe_corpus, gather
from nvamp.study.rows import Rows, read_rows
from nvamp.study.settings import NO_COMPLETIONS, Lora, Settings
from nvamp.study.sources import bounded, read_documents, shuffled
from nvamp.study.store import Json, Store, conditions, finite, kept_runs, versions
from nvamp.study.training import Recipe, train
from nvamp.study.watching import Progress

SEQUENCE = 64  # tokens in a block, for the built-in model on text
SEQUENCE_LONG = 256  # for pretrained ones, and for examples
STEPS = 240
LR = 2e-3
LR_PRETRAINED = 5e-5
LR_LORA = 2e-4

Pair = tuple[Loss, int]  # the loss and the seed of a run


class Display(Protocol):
    """Shows the progress of a study."""

    def prepared(self, corpus: Corpus, steps: int, runs: int, kept: int) -> None:
        """The text is ready; each run takes so many steps, and `kept` of the `runs` are already finished."""

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
    if settings.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise StudyError(f"--bf16: {torch.cuda.get_device_name()} does not compute in bfloat16")
    losses = parse_losses(list(settings.losses))
    out = store.out
    if overwrite and settings.model and out.resolve() in Path(settings.model).resolve().parents:
        raise StudyError(f"--model {settings.model} is in --out, which --overwrite would drop")
    if peers.rank == 0:  # another rank might see the directory while the first one is creating it
        store.check()
    corpus = prepare(settings, out)
    recipe = recipe_of(settings, len(corpus.train))
    # Seed by seed: an interrupted study then has its first seeds under every loss.
    pairs = [(loss, seed) for seed in range(settings.seeds) for loss in losses]

    def claim() -> list[int]:
        store.claim(conditions(recipe, corpus), overwrite)
        write_config(asdict(settings), out / CONFIG)
        missing = [index for index, pair in enumerate(pairs) if store.load(*pair) is None]
        _check_space(len(missing), recipe, corpus, out)
        return missing

    missing = [pairs[index] for index in peers.of_first(claim)]
    if peers.rank > 0:
        store.join(conditions(recipe, corpus), peers.rank)
    display.prepared(corpus, recipe.steps, len(pairs), len(pairs) - len(missing))
    _train_missing(missing, recipe, corpus, store, display, peers)
    if peers.rank > 0:
        return None
    results = _results(settings, recipe, command, losses, corpus, store)
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
    classes = frequency_classes(corpus.training.labels, len(corpus.tokenizer))
    awaited = missing
    for loss, seed in missing[peers.rank :: peers.world]:
        run = train(loss, seed, recipe, corpus, display.run(loss.name, seed))
        store.save(loss, seed, describe(loss, seed, run, classes, corpus.evaluation.owners), run, corpus)
        del run  # the model of the next run takes its place in memory
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


def _results(
    settings: Settings, recipe: Recipe, command: str, losses: Sequence[Loss], corpus: Corpus, store: Store
) -> Json:
    """The contents of results.json, with `None` in place of numbers that are not finite."""
    results: Json = finite(
        {
            "command": command,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "settings": {**asdict(settings), "steps": recipe.steps, "lr": recipe.lr, "out": str(store.out)},
            "text": describe_corpus(corpus),
            "passes": recipe.steps * recipe.accumulate * recipe.batch_size / len(corpus.train),
            **gather(losses, settings.seeds, store),
        }
    )
    return results


def recipe_of(settings: Settings, examples: int) -> Recipe:
    """How each model is trained on so many examples."""
    lr = LR if settings.model is None else LR_PRETRAINED if settings.lora is None else LR_LORA
    return Recipe(
        steps=_steps(settings, examples),
        batch_size=settings.batch_size,
        lr=settings.lr or lr,
        noise=settings.noise,
        model=settings.model,
        bf16=settings.bf16,
        accumulate=settings.accumulate,
        gradient_checkpointing=settings.gradient_checkpointing,
        generate=settings.generate,
        lora=None if settings.lora is None else Lora.parse(settings.lora),
    )


def _steps(settings: Settings, examples: int) -> int:
    if settings.epochs is None:
        return settings.steps or STEPS
    # The last step of an epoch may be a smaller one.
    in_epoch = ceil(examples // settings.batch_size / settings.accumulate)
    return ceil(settings.epochs * in_epoch)


def prepare(settings: Settings, out: Path | None = None) -> Corpus:
    """Read, split, tokenize and pack the text; files in the directory `out` are ignored."""
    tokenizer, together, most = None, True, inf
    if settings.model is not None:
        tokenizer = load_tokenizer(settings.model)
        most = max_positions(settings.model) or inf
        if settings.sequence is not None and settings.sequence > most:
            raise StudyError(f"--sequence {settings.sequence}: the model takes at most {most} tokens")
        # What is wrong with the model is reported before the text is read.
        together = keeps_apart(load_model(settings.model))
    rows, source = _read(settings, out)
    short = settings.model is None and not rows.examples
    sequence = settings.sequence or int(min(SEQUENCE if short else SEQUENCE_LONG, most))
    try:
        if rows.examples:
            completions, special = settings.loss_on != "all", settings.special_tokens
            corpus = build_examples(rows, source, sequence, tokenizer, completions, special, together)
        else:
            corpus = build_corpus(rows.texts, source, sequence, tokenizer, settings.special_tokens)
        if len(corpus.train) < settings.batch_size:
            raise StudyError(
                f"the text is too short: {len(corpus.train)} training blocks of {sequence} tokens "
                f"do not fill a batch of {settings.batch_size}"
            )
        if settings.model is not None:
            check_tokens(load_config(settings.model), int(max(corpus.train.max(), corpus.held_out.max())))
    except StudyError as error:
        raise StudyError(f"{'--dataset' if settings.dataset else '--text'}: {error}") from error
    if settings.generate and not corpus.prompts:
        raise StudyError(
            f"--generate: no held-out prompt with its answer fits into {sequence} tokens (--sequence)"
            if corpus.counts.get("cut_examples")
            else "--generate: expected prompts with answers to complete: --dataset with messages, or with "
            "prompt and completion"
        )
    return corpus if settings.also is None else replace(corpus, also=_also(settings, corpus, out))


def _also(settings: Settings, corpus: Corpus, out: Path | None) -> Blocks:
    """The blocks of the other text to evaluate on."""
    sequence = corpus.train.shape[1]
    try:
        documents, _ = read_documents((settings.also or "",), out)
    except StudyError as error:
        raise StudyError(str(error).replace("--text", "--also", 1)) from error
    tokens = tokenize(documents, corpus.tokenizer, settings.special_tokens)
    try:
        blocks = pack_text(tokens, sequence, prefix_of(corpus.tokenizer))
        if not len(blocks):
            raise StudyError(f"the text is too short: not one block of {sequence} tokens")
        if settings.model is not None:
            check_tokens(load_config(settings.model), int(blocks.inputs.max()))
    except StudyError as error:
        raise StudyError(f"--also {settings.also}: {error}") from error
    return blocks.spread(HELD_OUT_TOKENS // sequence)


def _read(settings: Settings, out: Path | None) -> tuple[Rows, str]:
    """The text or the examples, and what they are in words."""
    if not settings.dataset:
        documents, source = read_documents(settings.text, out)
        return Rows(documents), source
    rows, source = read_rows(settings.dataset), ", ".join(settings.dataset)
    if rows.examples:
        return rows, source
    if settings.loss_on == "completions":
        raise StudyError(NO_COMPLETIONS)
    if empty := rows.dropped.total():
        source += f" ({empty:,} empty rows dropped)"
    return Rows(bounded(shuffled(rows.texts))), source
