"""Losses against cross-entropy, each at a temperature of its own: the front of mean against tail."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.evidence.held_out import TEMPERATURES
from nvamp.study.metrics import Estimate, estimate
from nvamp.study.store import Json

CE = "ce"
AS_TRAINED = TEMPERATURES.index(1.0)
CHOSEN_ON, MEASURED_ON = "0", "1"  # halves of the held-out documents
PRICES = (0.5, 1.0, 2.0)  # percent of cross-entropy's mean
# Student's t for 1 to 4 degrees of freedom: quantiles of 97.5% for intervals, of 95% for the two one-sided
# tests of equivalence, of 80% for the power with which a difference is seen.
T975 = (12.70620, 4.30265, 3.18245, 2.77645)
T95 = (6.31375, 2.91999, 2.35336, 2.13185)
T80 = (1.37638, 1.06066, 0.97847, 0.94096)


@dataclass(frozen=True)
class Group:
    """The finished runs of a group, by loss, learning rate and seed; all changes are in percent of `ce`'s.

    A change is paired by seed with cross-entropy's run at the usual rate, and is an estimate over the seeds
    that both have. It is `None` if there are none, or if one diverged or does not reach what is asked for.
    """

    about: Json
    runs: dict[tuple[str, float, int], Json] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> "Group":
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(found, {(run["loss"], run["lr"], run["seed"]): run for run in found["runs"]})

    @property
    def usual(self) -> float:
        """The learning rate of the runs, unless another one is asked for."""
        return next(lr for loss, lr, _ in self.runs if loss == CE)

    def at(self, lr: float) -> "Group":
        """The runs at this learning rate alone, so that changes are from cross-entropy's at the same one."""
        return Group(self.about, {key: run for key, run in self.runs.items() if key[1] == lr})

    def losses(self, lr: float | None = None) -> list[str]:
        return list(dict.fromkeys(loss for loss, of, _ in self.runs if of == (lr or self.usual)))

    def seeds(self, loss: str, lr: float | None = None) -> list[int]:
        """Those that the loss and cross-entropy both have."""
        has = {seed for name, of, seed in self.runs if name == loss and of == (lr or self.usual)}
        return sorted(seed for seed in has if (CE, self.usual, seed) in self.runs)

    def steps(self) -> int:
        return int(next(iter(self.runs.values()))["steps"])

    def passes(self) -> float:
        """How often the runs see each token of the text."""
        run, text = next(iter(self.runs.values())), self.about["text"]
        return float(run["steps"] * run["batch_size"] / text["train_blocks"])

    def title(self, short: bool = False) -> str:
        steps = f"{self.steps():,} steps"
        return steps if short or self.about["group"] != "wide" else f"{steps} of the wider model"

    def devices(self) -> str:
        """Which devices have trained how many of the runs."""
        counts = Counter(
            f"{run['device']}, PyTorch {run['torch'].split('+')[0]}" for run in self.runs.values()
        )
        return "; ".join(f"{count} on {device}" for device, count in counts.items())

    def values(self, loss: str, key: str) -> Estimate | None:
        """A metric of the runs as trained, on all held-out tokens."""
        return self._each(loss, lambda run, base: run["metrics"][key])

    def change(self, loss: str, key: str) -> Estimate | None:
        """The change of a metric as trained, on all held-out tokens."""
        return self._each(loss, lambda run, base: _percent(run["metrics"][key], base["metrics"][key]))

    def change_of_seed(self, loss: str, key: str, lr: float, seed: int) -> Estimate | None:
        """The same of one seed, which has no interval."""
        if (loss, lr, seed) not in self.runs:
            return None
        run, base = self.runs[loss, lr, seed], self.runs[CE, self.usual, seed]
        return None if run["diverged"] else estimate([_percent(run["metrics"][key], base["metrics"][key])])

    def shift(self, loss: str, key: str) -> Estimate | None:
        """The change of a metric as trained, in nats."""
        return self._each(loss, lambda run, base: run["metrics"][key] - base["metrics"][key])

    def gained(self, loss: str, start: Json) -> Estimate | None:
        """The mean loss of the first text after fine-tuning, minus that of the model `start`, in nats."""
        return self._each(loss, lambda run, base: run["first"]["mean"] - start["metrics"]["mean"])

    def forgotten_more(self, loss: str) -> Estimate | None:
        """What a fine-tune forgets of the first text, minus what cross-entropy forgets, in nats."""
        return self._each(loss, lambda run, base: run["first"]["mean"] - base["first"]["mean"])

    def calibration(self, loss: str, index: int) -> Estimate | None:
        """The expected calibration error in percent, on the half to measure on, at a temperature."""
        return self._each(loss, lambda run, base: run["halves"][MEASURED_ON]["ece"][index])

    def smallest_visible(self, key: str, losses: Sequence[str]) -> str:
        """The range, over losses, of the smallest change that is seen as clear four times out of five."""
        found = [detectable(self.change(loss, key), len(self.seeds(loss))) for loss in losses]
        known = [value for value in found if value is not None]
        return f"{min(known):.1f} to {max(known):.1f}%" if known else "–"

    def equivalents(self, key: str, losses: Sequence[str]) -> str:
        """The losses whose metric is equivalent to cross-entropy's within 1%."""
        found = [loss for loss in losses if equivalent(self.change(loss, key), len(self.seeds(loss)))]
        return ", ".join(f"`{loss}`" for loss in found) or "none"

    def type_change(self, loss: str, kind: str) -> Estimate | None:
        """The change of the mean loss of a type of tokens."""
        return self._each(loss, lambda run, base: _percent(run["types"][kind][0], base["types"][kind][0]))

    def effort(self, loss: str, kind: str) -> Estimate | None:
        """The effort that a loss gives a type of tokens; `None` if it takes more than token losses."""
        return self._each(
            loss, lambda run, base: run["types"][kind][1] if len(run["types"][kind]) > 1 else None
        )

    def at_price(self, loss: str, price: float) -> Estimate | None:
        """The change of the tail at the temperature at which the mean is `price` percent higher."""
        return self._each(loss, lambda run, base: tail_at(run, base, price))

    def beyond(self, loss: str, price: float) -> Estimate | None:
        """The same minus that of cross-entropy's model: below zero is beyond its front."""

        def gap(run: Json, base: Json) -> float | None:
            ours, theirs = tail_at(run, base, price), tail_at(base, base, price)
            return None if ours is None or theirs is None else ours - theirs

        return self._each(loss, gap)

    def lowest(self, loss: str) -> Estimate | None:
        """The change of the mean at the temperature at which it is lowest."""
        return self._each(loss, lambda run, base: float(front(run, base)[0].min()))

    def at_temperature(
        self, loss: str, key: str, index: int, seeds: Sequence[int] | None = None
    ) -> Estimate | None:
        """The change of a metric, on the half to measure on, at a temperature for all (or these) seeds."""
        return self._each(
            loss,
            lambda run, base: _percent(
                run["halves"][MEASURED_ON][key][index], base["halves"][MEASURED_ON][key][AS_TRAINED]
            ),
            seeds,
        )

    def mixed(self, key: str, index: int) -> Estimate | None:
        """The change of a metric by mixing cross-entropy's model with the uniform distribution."""
        return self._each(
            CE,
            lambda run, base: _percent(
                run["mixes"][MEASURED_ON][key][index], base["halves"][MEASURED_ON][key][AS_TRAINED]
            ),
        )

    def choose(self, loss: str, price: float) -> int | None:
        """The place of the temperature with the lightest tail for at most `price`, on one half."""
        found = self._affordable(loss, price, self.seeds(loss))
        return min(found, key=lambda index: found[index]) if found else None

    def best(self, losses: Sequence[str], price: float, seeds: Sequence[int]) -> tuple[str, int] | None:
        """The loss and the place of its temperature with the lightest tail for at most `price`.

        It is chosen on some seeds and one half of the documents, to be measured on the others.
        """
        found = {
            (loss, index): tail
            for loss in losses
            if set(seeds) < set(self.seeds(loss))
            for index, tail in self._affordable(loss, price, seeds).items()
        }
        return min(found, key=lambda pair: found[pair]) if found else None

    def _affordable(self, loss: str, price: float, seeds: Sequence[int]) -> dict[int, float]:
        """The places of the temperatures at which the mean costs at most `price`, and their tails."""
        found: dict[int, float] = {}
        for index in range(len(TEMPERATURES)):
            changes = [
                [
                    _percent(
                        self.runs[loss, self.usual, seed]["halves"][CHOSEN_ON][key][index],
                        self.runs[CE, self.usual, seed]["halves"][CHOSEN_ON][key][AS_TRAINED],
                    )
                    for key in ("mean", "cvar")
                ]
                for seed in seeds
            ]
            mean, tail = np.mean(changes, axis=0)
            if mean <= price:
                found[index] = float(tail)
        return found

    def _each(
        self,
        loss: str,
        number: Callable[[Json, Json], float | None],
        seeds: Sequence[int] | None = None,
    ) -> Estimate | None:
        of = self.seeds(loss) if seeds is None else seeds
        pairs = [(self.runs[loss, self.usual, seed], self.runs[CE, self.usual, seed]) for seed in of]
        if any(run["diverged"] or base["diverged"] for run, base in pairs):
            return None
        return estimate([number(run, base) for run, base in pairs])


def front(run: Json, base: Json) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and tail at each temperature, in percent of what the run `base` has as trained."""
    ours, theirs = run["halves"][MEASURED_ON], base["halves"][MEASURED_ON]
    mean, tail = (np.array(ours[key]) / theirs[key][AS_TRAINED] for key in ("mean", "cvar"))
    return 100 * (mean - 1), 100 * (tail - 1)


def tail_at(run: Json, base: Json, price: float) -> float | None:
    """The tail at the temperature at which the mean is `price` percent higher, between the measured ones.

    `None` if no temperature has so low a mean, or if the measured ones end before.
    """
    mean, tail = front(run, base)
    rising = slice(int(mean.argmin()), None)  # with the temperature, above the one with the lowest mean
    if not mean[rising][0] <= price <= mean[rising][-1]:
        return None
    return float(np.interp(price, mean[rising], tail[rising]))


def _percent(ours: float, theirs: float) -> float:
    return 100 * (ours / theirs - 1)


def standard_error(value: Estimate, seeds: int) -> float | None:
    """The standard error of a mean over seeds, from its interval."""
    return None if value.half_width is None else value.half_width / T975[seeds - 2]


def equivalent(value: Estimate | None, seeds: int, within: float = 1.0) -> bool:
    """Whether two one-sided tests at 5% find the mean within ±`within`."""
    if value is None or (error := standard_error(value, seeds)) is None:
        return False
    return abs(value.mean) + T95[seeds - 2] * error < within


def detectable(value: Estimate | None, seeds: int) -> float | None:
    """The smallest difference that so many seeds would have seen as clear, four times out of five."""
    error = None if value is None else standard_error(value, seeds)
    return None if error is None else (T975[seeds - 2] + T80[seeds - 2]) * error


def predicted(weight: float, share: float) -> tuple[float, float]:
    """Mean and tail in nats that a weight of 1 + `weight` on the hardest `share` of the tokens should move.

    A weight w on a token moves the optimum of its loss by −log w + log E[w].
    """
    moved = float(np.log1p(weight * share))
    return moved - share * float(np.log1p(weight)), moved - float(np.log1p(weight))
