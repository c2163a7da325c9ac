"""Fine-tuning on a text of which a fifth of the documents is mislabelled."""

import random
from pathlib import Path
from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]  # typeshed may lack it

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.evidence.drawing import intervals, panels
from benchmarks.evidence.running import Preset, compact, results, run_all
from benchmarks.evidence.summary import Results
from nvamp.study.compare import LR
from nvamp.study.corpus import Corpus, build_corpus, split, tokenize
from nvamp.study.models import load_tokenizer
from nvamp.study.packing import pack
from nvamp.study.store import Json

LOSSES = ("ce", "nvamp", "nvamp:gradient=token", "nvamp:gamma=0.05", "dft")
MISLABELLED = 0.2  # of the documents
SLOWER = 4  # the peak learning rate is so many times lower than from scratch
SOURCE = "the language reference in pydoc_data.topics"


def run(preset: Preset, out: Path) -> Json:
    first = preset.corpus()
    list(run_all(out / "plain", ("ce",), (0,), preset.recipe(), first))
    model = str(out / "plain" / "models" / "ce-seed0")
    documents, sequence = reference(), first.train.shape[1]
    corpus = build_corpus(documents, SOURCE, sequence, load_tokenizer(model))
    recipe = preset.recipe(steps=max(1, preset.steps // 2), lr=LR / SLOWER, model=model)
    noise = {seed: mislabelled(corpus, documents, seed) for seed in range(preset.seeds)}
    runs, before = [], 0.0
    for group, of_seed in (("clean", None), ("mislabelled", noise.__getitem__)):
        for one in run_all(out / f"finetuning-{group}", LOSSES, range(preset.seeds), recipe, corpus, of_seed):
            runs.append(compact(group, one))
            before = one.record["curve"][0][1]
    shares = [float(flags.mean()) for flags in noise.values()]
    return results(
        preset,
        corpus,
        runs,
        steps=recipe.steps,
        lr=recipe.lr,
        first_text=first.source,
        before=before,  # cross-entropy on a slice of the held-out text
        mislabelled_tokens=[min(shares), max(shares)],
    )


def reference() -> list[str]:
    """English prose that comes with every Python, in one shuffled order."""
    documents = [topics[name] for name in sorted(topics)]
    random.Random(0).shuffle(documents)
    return documents


def mislabelled(corpus: Corpus, documents: list[str], seed: int) -> Tensor:
    """The probability of each training label to be replaced: 1 in a fifth of the documents, else 0."""
    train = [document for document in split(documents)[0] if document]
    bad = set(random.Random(seed).sample(range(len(train)), round(MISLABELLED * len(train))))
    lengths = [len(ids) for ids in tokenize(train, corpus.tokenizer)]
    flags = [[int(index in bad)] * length for index, length in enumerate(lengths)]
    return pack(flags, corpus.train.shape[1]).to(torch.float32)


def figure(results: Results) -> Figure:
    drawn, axes = panels(2)
    groups = results.groups()
    for one, key, name in zip(
        axes, ("cross_entropy", "cvar"), ("cross-entropy", "worst-5% mean"), strict=True
    ):
        losses = [loss for loss in results.losses()[1:] if loss != "dft"]  # which is far off the chart
        changes = {loss: [results.difference(loss, key, group) for group in groups] for loss in losses}
        intervals(one, groups, changes, first=1)
        one.axvline(0, color="black", linewidth=0.8)
        one.set_xlabel(f"held-out {name} minus ce's (nats)")
    drawn.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return drawn
