"""What is kept of the runs for good: their numbers, in one file a group, which the pages are written from."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.evidence.plan import Job
from benchmarks.evidence.source import KINDS
from benchmarks.evidence.store import Runs
from nvamp.functional import token_weights
from nvamp.objectives.spec import parse_loss
from nvamp.study.corpus import CLASSES, frequency_classes
from nvamp.study.files import replacing
from nvamp.study.results import describe_corpus
from nvamp.study.store import Json

DIGITS = 6  # significant ones


def gather(jobs: list[Job], runs: Runs, directory: Path) -> None:
    """Write the finished runs of each group to `directory`, a run a line."""
    types = token_types(runs)
    for group in dict.fromkeys(job.group for job in jobs):
        found = [
            summary(job, record, runs, types)
            for job in jobs
            if job.group == group and (record := runs.load(job)) is not None
        ]
        if found:
            text = next(job.text for job in jobs if job.group == group)
            corpus = runs.others[text] if text else runs.corpus
            about = {"group": group, "text": describe_corpus(corpus)}
            write(directory / f"{group}.json", about, found)


def write(path: Path, about: Json, runs: list[Json]) -> None:
    lines = ",\n  ".join(json.dumps(rounded(run), allow_nan=False) for run in runs)
    head = json.dumps(about, indent=1)[1:-1].rstrip()
    with replacing(path) as temporary:
        temporary.write_text(f'{{{head},\n "runs": [\n  {lines}\n ]\n}}\n', encoding="utf-8")


def rounded(value: Any) -> Any:
    """`value` with all of its floats rounded to `DIGITS` significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def summary(job: Job, record: Json, runs: Runs, types: Mapping[str, NDArray[np.bool_]]) -> Json:
    """The numbers of a run: of each half of the held-out documents by temperature, and by type of token."""
    kept = {key: record[key] for key in ("loss", "seed", "lr", "steps", "batch_size", "diverged")}
    kept |= {name: record["versions"][name] for name in ("device", "torch")}
    if record["diverged"]:
        return kept
    kept["metrics"] = record["metrics"]
    if job.text:
        return {**kept, "first": record["first"]}
    halves = {half: _columns(found["temperatures"]) for half, found in record["halves"].items()}
    mixes = {half: _columns(found["mixes"]) for half, found in record["halves"].items()}
    return {
        **kept,
        "halves": halves,
        "mixes": mixes,
        "types": type_metrics(job, runs, types),
    }


def _columns(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def token_types(runs: Runs) -> dict[str, NDArray[np.bool_]]:
    """For each type, by frequency and by Python's grammar, which held-out tokens are of it: [tokens] bool."""
    labels = runs.corpus.held_out[:, 1:].reshape(-1).numpy()
    classes = frequency_classes(runs.corpus.train, len(runs.corpus.tokenizer))[labels]
    types = {name: classes == index for index, name in enumerate(CLASSES)}
    types |= {name: runs.kinds == index for index, name in enumerate(KINDS)}
    return {name: tokens for name, tokens in types.items() if tokens.any()}


def type_metrics(job: Job, runs: Runs, types: Mapping[str, NDArray[np.bool_]]) -> dict[str, list[float]]:
    """Of each type, the mean loss in nats and the effort that the loss gives it.

    The effort is a type's share of the weights `∂L/∂ℓ` over its share of the tokens, which is 1 for all
    types under cross-entropy. Weights depend on the batch: held-out blocks are taken `batch_size` at a time.
    Losses that need more than the token losses have no effort here.
    """
    nll = torch.from_numpy(runs.nll(job))
    weights = _weights(job, nll.view(-1, runs.corpus.held_out.shape[1] - 1))
    found: dict[str, list[float]] = {}
    for name, tokens in types.items():
        of_type = torch.from_numpy(tokens)
        found[name] = [float(nll[of_type].mean())]
        if weights is not None:
            found[name].append(float(weights[of_type].mean() / weights.mean()))
    return found


def _weights(job: Job, blocks: torch.Tensor) -> torch.Tensor | None:
    objective = parse_loss(job.loss.rpartition(">")[2]).objective
    if objective.needs_entropy:
        return None
    weights = torch.zeros_like(blocks)
    step = max(1, len(blocks) // job.batch_size)
    for first in range(step):  # blocks from all over the text, as in training
        weights[first::step] = token_weights(objective, blocks[first::step])
    return weights.view(-1)
