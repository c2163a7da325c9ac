"""Means, paired differences and verdicts from the recorded runs of an experiment."""

from dataclasses import dataclass

from nvamp.study.metrics import Estimate, difference, estimate, verdict
from nvamp.study.store import Json


@dataclass(frozen=True)
class Results:
    """An experiment's JSON; `group` is the group of its runs, by default the only one or the first."""

    json: Json

    def groups(self) -> list[str]:
        return list(dict.fromkeys(run["group"] for run in self.json["runs"]))

    def losses(self, group: str | None = None) -> list[str]:
        return list(dict.fromkeys(run["loss"] for run in self._runs(group)))

    def seeds(self, loss: str, group: str | None = None) -> list[int]:
        return [run["seed"] for run in self._runs(group) if run["loss"] == loss]

    def values(self, loss: str, key: str, group: str | None = None) -> list[float | None]:
        """A metric of each seed's run, in the order of the seeds."""
        runs = sorted(
            (run["seed"], run["metrics"].get(key)) for run in self._runs(group) if run["loss"] == loss
        )
        return [value for _, value in runs]

    def diverged(self, loss: str, group: str) -> int:
        """How many of the runs diverged."""
        return sum(run["diverged"] for run in self._runs(group) if run["loss"] == loss)

    def mean(self, loss: str, key: str, group: str | None = None) -> Estimate | None:
        return estimate(self.values(loss, key, group))

    def difference(
        self, loss: str, key: str, group: str | None = None, to: str = "ce", to_group: str | None = None
    ) -> Estimate | None:
        """Paired by seed, to the loss `to`, of the same group unless `to_group` names another."""
        return difference(self.values(loss, key, group), self.values(to, key, to_group or group))

    def percent(self, loss: str, key: str, group: str | None = None, to: str = "ce") -> Estimate | None:
        """The paired difference in percent of what the loss `to` has, seed by seed."""
        pairs = zip(self.values(loss, key, group), self.values(to, key, group), strict=True)
        return estimate([None if a is None or not b else 100 * (a / b - 1) for a, b in pairs])

    def cost(self, loss: str, key: str, group: str, usual: str) -> list[float | None]:
        """How much higher a metric is in `group` than in the group `usual`, for each seed."""
        pairs = zip(self.values(loss, key, group), self.values(loss, key, usual), strict=True)
        return [None if a is None or b is None else a - b for a, b in pairs]

    def extra_cost(self, loss: str, key: str, group: str, usual: str, to: str = "ce") -> Estimate | None:
        """How much more `group` costs this loss than it costs the loss `to`, paired by seed."""
        return difference(self.cost(loss, key, group, usual), self.cost(to, key, group, usual))

    def verdict(
        self, loss: str, key: str, group: str | None = None, to: str = "ce", to_group: str | None = None
    ) -> str:
        return verdict(self.difference(loss, key, group, to, to_group), lower_is_better=True)

    def _runs(self, group: str | None) -> list[Json]:
        group = group or self.groups()[0]
        return [run for run in self.json["runs"] if run["group"] == group]


def plain(value: Estimate | None, decimals: int = 3) -> str:
    """`4.473 ± 0.012`: mean and half of the 95% interval; "–" if there is no value."""
    if value is None:
        return "–"
    half = "" if value.half_width is None else f" ± {value.half_width:.{decimals}f}"
    return f"{value.mean:.{decimals}f}{half}".replace("-", "−")


def mean_only(value: Estimate | None, decimals: int = 3) -> str:
    """`+0.035`: a difference, if the interval of few seeds would say nothing."""
    return "–" if value is None else f"{value.mean:+.{decimals}f}".replace("-", "−")


def size(value: Estimate | None, decimals: int = 3) -> str:
    """`0.035`: how large a difference is, for a sentence that says which way it goes."""
    return "–" if value is None else f"{abs(value.mean):.{decimals}f}"


def signed(value: Estimate | None, decimals: int = 3) -> str:
    """`+0.035 (−0.049 to +0.119)`: a difference and its 95% interval; "–" if there is no value."""
    if value is None:
        return "–"
    low_high = ""
    if (half := value.half_width) is not None:
        low_high = f" ({value.mean - half:+.{decimals}f} to {value.mean + half:+.{decimals}f})"
    return f"{value.mean:+.{decimals}f}{low_high}".replace("-", "−")
