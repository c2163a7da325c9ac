"""The runs that the questions need, fixed before the first: which losses, seeds, lengths and rates."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from nvamp.study.compare import LR

BEST = "nvamp:gamma=0.04,tail=0.05,label_smoothing=0.1"
LOSSES = (
    "ce",
    "ce:label_smoothing=0.1",
    "nvamp:gamma=0.04,tail=0.05",
    BEST,
    "nvamp",
    "ce:label_smoothing=0.05",
    "nvamp:gamma=0.02,tail=0.05",
    "nvamp:gamma=0.08,tail=0.05",
    "nvamp:gamma=0.08,tail=0.1",
    "nvamp:gamma=0.02,tail=0.05,label_smoothing=0.05",
    "ce:label_smoothing=0.2",
    "tail",
    "tail:strength=2",
    "ce>tail:strength=2",
    "tilted:t=0.1",
    "nvamp:gradient=token",
    "truncated:share=0.05",
    "focal:gamma=1",
    "gce:q=0.3",
    "entropy",
    "entropy:kind=mile",
    "dft",
    "ce:z_loss=0.0001",
)
CORE = (
    *LOSSES[:6],
    "nvamp:gamma=0.02,tail=0.05",
    "ce>tail:strength=2",
    "nvamp:gamma=0.02,tail=0.05,label_smoothing=0.05",
    "tilted:t=0.1",
)
LONG = CORE[:8]
SLOWER = ("ce", "ce:label_smoothing=0.1", "nvamp:gamma=0.04,tail=0.05", *LONG[5:])  # at the better rate
BEYOND = ("ce", "nvamp:gamma=0.04,tail=0.05", "ce>tail:strength=2")  # whose fronts are clearly apart there
WIDE = LOSSES[:3]
RATED = (*LOSSES[:6], "tail:strength=2", "tilted:t=0.1", "nvamp:gradient=token")
NOISY = ("ce", "nvamp:gamma=0.04,tail=0.05", "ce:label_smoothing=0.1", "truncated:share=0.05", "gce:q=0.3")
RATES = (LR / 4, LR / 2, 2 * LR)  # beside LR
TUNED = (
    "ce",
    "nvamp:gamma=0.02,tail=0.05",
    "ce:label_smoothing=0.05",
    "entropy",
    "entropy:kind=mile",
    "dft",
)


@dataclass(frozen=True)
class Job:
    """A run: where it belongs, and all that decides its outcome.

    Attributes:
        group: names the directory of its result.
        loss: as for `nvamp compare`; "A>B" trains with A, and with B from `SWITCH` of the steps on.
        changes: to the recipe of the built-in model.
        text: what to fine-tune the model of `START` on, of `store.TEXTS`; "" to train from scratch.
    """

    group: str
    loss: str
    seed: int
    steps: int
    lr: float = LR
    batch_size: int = 8
    changes: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    @property
    def name(self) -> str:
        slug = re.sub(r"[:,>]", "-", self.loss)
        return f"{self.group}/{slug}-lr{self.lr:g}-seed{self.seed}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _each(group: str, losses: Sequence[str], seeds: Sequence[int], steps: int, **more: Any) -> Iterator[Job]:
    """Seed by seed, so that an interrupted plan has its first seeds under every loss."""
    for seed in seeds:
        for loss in losses:
            yield Job(group, loss, seed, steps, **more)


ON_A_CARD = ("wide",)  # groups that a processor would need days for
START = Job("start", "ce", 0, 1500)  # its model is what is fine-tuned


def plan() -> list[Job]:
    """All runs, the most important first; the longest of them early, so that none is left over at the end."""
    jobs = [
        *_each("6000", LONG, range(3), 6000),
        START,
        *(
            job
            for seed in range(5)
            for text in ("reference", "answers")
            for job in _each(text, TUNED, (seed,), 240, lr=LR / 4, text=text)
        ),
        *_each("1500", LOSSES, range(2), 1500),
        *_each("240", LOSSES, range(5), 240),
        *_each("1500", CORE, range(2, 5), 1500),
        *_each("noise30", NOISY, range(2), 1500, changes={"noise": 0.3}),
        *(job for lr in RATES for job in _each("1500", RATED, range(1), 1500, lr=lr)),
        *_each("1500", LOSSES, range(2, 5), 1500),
        *_each("noise30", NOISY, range(2, 3), 1500, changes={"noise": 0.3}),
        *_each("noise10", NOISY, range(3), 1500, changes={"noise": 0.1}),
        *_each("1500", CORE, range(3), 1500, lr=LR / 2),
        *_each("1500", SLOWER, range(3, 5), 1500, lr=LR / 2),
        *_each("6000", BEYOND, range(3), 6000, lr=LR / 2),
        *(
            job
            for lr in (LR / 2, 2 * LR)
            for job in _each("240", (*BEYOND, "ce:label_smoothing=0.1"), range(3), 240, lr=lr)
        ),
        *_each("wide", WIDE, range(3), 3000, batch_size=32, changes={"scale": 2}),
    ]
    return list({job.name: job for job in jobs}.values())  # what is wanted early is part of a whole, too
