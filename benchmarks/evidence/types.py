"""Which token types get the effort, and which gain: rare and frequent ones, code, comments, identifiers."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.evidence.drawing import intervals, panels
from benchmarks.evidence.running import Finished, Preset, compact, results, run_all
from benchmarks.evidence.source import KINDS, held_out_labels, kind_of
from benchmarks.evidence.summary import Results
from benchmarks.evidence.tail import LOSSES
from nvamp.functional import token_weights
from nvamp.objectives import parse
from nvamp.study.corpus import CLASSES, frequency_classes
from nvamp.study.sources import read_documents
from nvamp.study.store import Json


def run(preset: Preset, out: Path) -> Json:
    corpus = preset.corpus()
    labels = corpus.held_out[:, 1:].reshape(-1)
    classes = frequency_classes(corpus.train, len(corpus.tokenizer))[labels]
    kinds = held_out_labels(corpus, read_documents(preset.text)[0], kind_of)
    types = {name: torch.from_numpy(classes == index) for index, name in enumerate(CLASSES)}
    types |= {name: torch.from_numpy(kinds == index) for index, name in enumerate(KINDS)}
    types = {name: of_type for name, of_type in types.items() if of_type.any()}
    runs = [
        compact("plain", one, type_metrics(one, types, preset.batch_size, corpus.held_out.shape[1] - 1))
        for one in run_all(out / "plain", LOSSES, range(preset.seeds), preset.recipe(), corpus)
    ]
    return results(preset, corpus, runs, tokens={name: int(of_type.sum()) for name, of_type in types.items()})


def type_metrics(
    run: Finished, types: Mapping[str, Tensor], batch_size: int, length: int
) -> dict[str, float | None]:
    """Cross-entropy of the tokens of each type, and the effort that the loss gives them.

    The effort is a type's share of the weights `∂L/∂ℓ` over its share of the tokens: 1 for all under plain
    cross-entropy. Weights depend on the batch: held-out blocks are taken `batch_size` at a time.

    Args:
        types: for each type, which of the held-out tokens are of it: [tokens] bool.
        length: held-out tokens of a block.
    """
    if run.record["diverged"]:
        return {}
    nll = torch.from_numpy(run.nll.astype(np.float64))
    objective, blocks = parse(run.record["loss"]), nll.view(-1, length)
    of_blocks = torch.zeros_like(blocks)
    step = max(1, len(blocks) // batch_size)
    for first in range(step):  # blocks from all over the text, as in training
        of_blocks[first::step] = token_weights(objective, blocks[first::step])
    weights = of_blocks.view(-1)
    means = {name: float(nll[of_type].mean()) for name, of_type in types.items()}
    effort = {
        f"effort {name}": float(weights[of_type].mean() / weights.mean()) for name, of_type in types.items()
    }
    return {**means, **effort}


def figure(results: Results) -> Figure:
    drawn, (left, right) = panels(2, height=3.9)
    losses, types = results.losses()[1:], list(results.json["tokens"])
    intervals(
        left, types, {loss: [results.difference(loss, name) for name in types] for loss in losses}, first=1
    )
    effort = {loss: [results.mean(loss, f"effort {name}") for name in types] for loss in losses}
    intervals(right, types, effort, first=1)
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel("cross-entropy minus ce's (nats)")
    right.axvline(1, color="black", linewidth=0.8)
    right.set_xlabel("effort: share of weight / share of tokens")
    drawn.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return drawn
