"""What the experiments share: the size of their runs, the runs themselves, and each run's record."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.measure import machine
from nvamp.study.compare import LR, Settings
from nvamp.study.compare import prepare as prepare_corpus
from nvamp.study.corpus import Corpus, frequency_classes
from nvamp.study.losses import parse_losses
from nvamp.study.results import describe, describe_corpus
from nvamp.study.store import Json, Store, conditions, versions
from nvamp.study.training import Recipe, train

RECENT = 20  # a spike stands out from the median of so many steps before it
SPIKE = 2.0  # by this factor


@dataclass(frozen=True)
class Preset:
    """The size of an experiment's runs. Numbers of different presets are not comparable.

    Attributes:
        seeds: of the runs that a verdict rests on.
        search_seeds: of the runs that only choose what to look at again.
        scale: of the built-in model.
        text: files or directories; the standard library's source if there are none.
    """

    steps: int
    batch_size: int
    seeds: int = 5
    search_seeds: int = 2
    scale: int = 1
    text: tuple[str, ...] = ()

    def recipe(self, **changes: Any) -> Recipe:
        """The recipe of `nvamp compare`'s built-in model at this size, but for `changes`."""
        return Recipe(
            **{"steps": self.steps, "batch_size": self.batch_size, "lr": LR, "scale": self.scale, **changes}
        )

    def corpus(self) -> Corpus:
        """The text that models are trained on from scratch."""
        return prepare_corpus(Settings(("ce",), 1, self.steps, self.batch_size, text=self.text))


PRESETS = {
    "cpu": Preset(steps=240, batch_size=8),
    "gpu": Preset(steps=3000, batch_size=64, search_seeds=5, scale=2),
}


class Finished(NamedTuple):
    """A finished run: its record, and its held-out token losses in nats, [tokens]."""

    record: Json
    nll: NDArray[np.float32]


class GradientNorms(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """The norm of the gradient at every step, before it is clipped."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Json, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            self.values.append(float(logs["grad_norm"]))


def run_all(
    directory: Path,
    losses: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    corpus: Corpus,
    noise: Callable[[int], Tensor] | None = None,
) -> Iterator[Finished]:
    """Every loss from every seed, trained unless `directory` holds the run already.

    Args:
        noise: for a seed, the probability of each training label to be replaced, [blocks, sequence].
    """
    with Store(directory) as store:
        store.claim(_conditions(recipe, corpus, noise and noise(0)), overwrite=False)
        yield from _run_all(store, losses, seeds, recipe, corpus, noise)


def _run_all(
    store: Store,
    losses: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    corpus: Corpus,
    noise: Callable[[int], Tensor] | None,
) -> Iterator[Finished]:
    classes = frequency_classes(corpus.train, len(corpus.tokenizer))
    for seed in seeds:
        for loss in parse_losses(list(losses)):
            if store.load(loss, seed) is None:
                norms = GradientNorms()
                run = train(
                    loss, seed, recipe, corpus, lambda step, value: None, noise and noise(seed), [norms]
                )
                record = {
                    **describe(loss, seed, run, classes, corpus.evaluation.owners),
                    "gradient_norms": norms.values,
                }
                store.save(loss, seed, record, run, corpus)
                print(f"{store.out.name}: {loss.name}, seed {seed}: {run.seconds:.0f} s", flush=True)
            yield Finished(*store.kept(loss, seed))


def _conditions(recipe: Recipe, corpus: Corpus, noise: Tensor | None) -> Json:
    digest = noise is not None and hashlib.sha256(noise.numpy().tobytes()).hexdigest()[:16]
    return {
        **conditions(recipe, corpus),
        "bf16": recipe.bf16,
        "scale": recipe.scale,
        "noise by token": digest or None,
    }


def compact(group: str, run: Finished, metrics: Json | None = None) -> Json:
    """What is kept of a run for good: `metrics`, or else its held-out numbers and its gradient norms'."""
    record = run.record
    if metrics is None:
        times = ("tokens_per_second", "loss_share", "peak_memory")
        metrics = {key: value for key, value in record["metrics"].items() if key not in times}
        metrics |= gradient_metrics(record["gradient_norms"])
    return {
        "group": group,
        "loss": record["loss"],
        "seed": record["seed"],
        "diverged": record["diverged"],
        "metrics": metrics,
    }


def gradient_metrics(norms: Sequence[float | None]) -> dict[str, float | None]:
    """The largest gradient norm of a run's steps over the median, and the number of spikes; no warm-up.

    A spike is a step whose norm is more than `SPIKE` times the median of the `RECENT` steps before it. If a
    norm is not finite (a record holds `None` for it), there is no value.
    """
    values = [norm for norm in norms if norm is not None and np.isfinite(norm)]
    warm = max(1, len(norms) // 10)
    if len(values) < len(norms) or len(values) <= warm:
        return {"gradient_peak": None, "spikes": None}
    recent = [median(values[max(0, step - RECENT) : step]) for step in range(warm, len(values))]
    spikes = sum(norm > SPIKE * usual for norm, usual in zip(values[warm:], recent, strict=True))
    return {"gradient_peak": max(values[warm:]) / median(values[warm:]), "spikes": float(spikes)}


def results(preset: Preset, corpus: Corpus, runs: Sequence[Json], **more: Any) -> Json:
    """What an experiment leaves: every run's numbers, and what they were measured with."""
    here = machine()
    return {
        "preset": asdict(preset),
        "versions": {**versions(), "processor": here["processor"], "threads": here["threads"]},
        "text": describe_corpus(corpus),
        **more,
        "runs": list(runs),
    }
