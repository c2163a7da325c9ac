"""A study on the terminal: its progress and its results."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from nvamp.study import watching
from nvamp.study.corpus import Corpus
from nvamp.study.metrics import METRICS, TIMES, measured
from nvamp.study.results import cautions
from nvamp.study.store import Json

_STYLES = {"better": "green", "worse": "red"}
LABELS = 24  # the least width for the names of the metrics
WIDE = 100  # columns that a bar, a name and the numbers beside them take
SPEED = TIMES[0]


class Terminal:
    """Shows a study's progress: the bar counts the optimizer steps of all runs that are left to train."""

    def __init__(self, console: Console) -> None:
        self._steps = 0  # of a run
        # In a narrow terminal the bar goes first, then the end of the loss's name.
        self._progress = Progress(
            TextColumn(
                "{task.description}",
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            *([BarColumn()] if console.width >= WIDE else []),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("left"),
            expand=console.width < WIDE,
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=120,
        )
        self._task = self._progress.add_task("reading the text", total=None, loss="")
        self._done = 0  # runs finished in this session
        self._with_logits = False  # whether it has been said

    def __enter__(self) -> "Terminal":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def prepared(self, corpus: Corpus, steps: int, runs: int, kept: int) -> None:
        """See `nvamp.study.compare.Display`."""
        self._steps = steps
        self._progress.update(self._task, total=(runs - kept) * self._steps, completed=0)
        learned = len(corpus.training.learned)
        some = f" ({learned:,} of them to learn)" if corpus.counts else ""
        self._print(
            f"{corpus.source}: {corpus.training.tokens:,} tokens to train on{some}, "
            f"{len(corpus.evaluation.learned):,} held out; {len(corpus.tokenizer):,} token types"
        )
        if kept:
            self._print(f"{kept} of {runs} runs are already finished")

    def run(self, loss: str, seed: int) -> watching.Progress:
        """See `nvamp.study.compare.Display`."""
        self._progress.update(self._task, description=escape(f"{loss}, seed {seed}"), loss="")

        def advance(step: int, value: float) -> None:
            completed = self._done * self._steps + step
            self._progress.update(self._task, completed=completed, loss=f"loss {value:.3f}")

        return advance

    def finished(self, record: Json) -> None:
        """See `nvamp.study.compare.Display`."""
        self._done += 1
        self._progress.update(self._task, completed=self._done * self._steps)
        mean = record["metrics"]["cross_entropy"]
        outcome = "diverged" if mean is None else f"held-out cross-entropy {mean:.3f} nats"
        self._print(f"{record['loss']}, seed {record['seed']}: {outcome} ({record['seconds']:.0f} s)")
        if (reason := record["logits_because"]) and not self._with_logits:
            self._with_logits = True
            self._print(f"this model trains with all of its logits in memory: {reason}")

    def replacing(self, runs: int) -> None:
        """See `nvamp.study.compare.Display`."""
        self._print(f"results and report replace earlier ones of {runs} runs more; these runs are kept")

    def waiting(self) -> None:
        """See `nvamp.study.compare.Display`."""
        self._progress.update(self._task, description="waiting for the other ranks", loss="")

    def _print(self, line: str) -> None:
        self._progress.console.print(line, style="dim", highlight=False, markup=False)


@contextmanager
def counting(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, which the function `(done, of)` moves."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, of: progress.update(task, completed=done, total=of)


def show_results(console: Console, results: Json) -> None:
    """Print tables of so many losses side by side as fit, the times, and what became of each loss."""
    losses = results["losses"]
    metrics = measured(METRICS, losses[0]["metrics"])
    width = max(len(metric.shown(loss["metrics"][metric.key])) for loss in losses for metric in metrics) + 3
    per_table = max(1, (console.width - LABELS) // width)
    for start in range(0, len(losses), per_table):
        console.print(_table(results, losses[start : start + per_table], width))
    speeds = [f"{loss['name']} {SPEED.shown_range(loss['times'][SPEED.key])}" for loss in losses]
    over = ", median (lowest to highest)" if results["settings"]["seeds"] > 1 else ""
    lines = [f"{SPEED.label}{over}: {', '.join(speeds)}."]
    told = [loss for loss in losses if loss["name"] != results["baseline"] or loss["diverged_seeds"]]
    if told:
        lines.append(
            f"Against {results['baseline']}, seed by seed; the tail is the worst 5%, "
            "the mean the cross-entropy:"
        )
    lines += [f"{loss['sentence']}." for loss in told]
    lines += [f"Caution: {caution}" for caution in cautions(results)]
    for line in lines:
        console.print(f"{line[0].upper()}{line[1:]}", highlight=False, markup=False)


def _table(results: Json, losses: Sequence[Json], width: int) -> Table:
    seeds = results["settings"]["seeds"]
    over = f"mean ± 95% interval over {seeds} seeds" if seeds > 1 else "one seed"
    table = Table(title=f"Held-out text, {over}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for loss in losses:
        name = re.sub("([:,])", r"\1 ", loss["name"])  # its parts become words, between which it wraps
        table.add_column(escape(name), justify="right", overflow="fold", min_width=width - 3)
    for metric in measured(METRICS, losses[0]["metrics"]):
        unit = f" ({metric.unit})" if metric.unit else ""
        cells = [
            _styled(metric.shown(loss["metrics"][metric.key]), loss["verdicts"].get(metric.key))
            for loss in losses
        ]
        table.add_row(metric.label + unit, *cells)
    return table


def _styled(text: str, verdict: str | None) -> str:
    style = _STYLES.get(verdict or "")
    return f"[{style}]{text}[/{style}]" if style else text
