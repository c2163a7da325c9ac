"""One store of runs for all questions: the text once, and a record and the held-out losses of every run."""

import json
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from benchmarks.evidence.plan import Job
from benchmarks.evidence.source import document_of, held_out_labels, kind_of
from benchmarks.evidence.texts import other_texts
from nvamp.study.compare import prepare
from nvamp.study.corpus import Corpus
from nvamp.study.files import replacing
from nvamp.study.packing import plain
from nvamp.study.settings import Settings
from nvamp.study.sources import read_documents
from nvamp.study.store import Json, write_json

TEXT = "text"  # the directory of the text within the store


class Runs:
    """Finished runs in a directory, in a file each, which any number of processes share.

    Attributes:
        corpus: the text, which the first process cuts into blocks and all others read.
        documents: the index of the document of each held-out token, [tokens].
        kinds: the index in `source.KINDS` of each held-out token, [tokens].
    """

    def __init__(self, directory: Path, text: tuple[str, ...] = ()) -> None:
        self.directory = directory
        kept = directory / TEXT
        if not kept.exists():
            _keep_text(kept, text)
        arrays = np.load(kept / "blocks.npz")
        about = json.loads((kept / "about.json").read_text())
        self.corpus = Corpus(
            AutoTokenizer.from_pretrained(kept),
            plain(torch.from_numpy(arrays["train"].astype(np.int64))),
            plain(torch.from_numpy(arrays["held_out"].astype(np.int64))),
            about["source"],
            excerpt="",
        )
        self.documents: NDArray[np.int64] = arrays["documents"].astype(np.int64)
        self.kinds: NDArray[np.int64] = arrays["kinds"].astype(np.int64)

    @cached_property
    def others(self) -> dict[str, Corpus]:
        """The texts to fine-tune on, in the tokens of the first one."""
        return other_texts(self.corpus)

    @property
    def start(self) -> Path:
        """The directory of the model to fine-tune."""
        return self.directory / "start-model"

    def path(self, job: Job) -> Path:
        return self.directory / f"{job.name}.json"

    def load(self, job: Job) -> Json | None:
        """The record of a run; `None` if it has not finished."""
        path = self.path(job)
        return json.loads(path.read_text()) if path.exists() else None

    def nll(self, job: Job) -> NDArray[np.float64]:
        """The held-out token losses of a finished run in nats, [tokens]."""
        losses: NDArray[np.float64] = np.load(self.path(job).with_suffix(".npy")).astype(np.float64)
        return losses

    def save(self, job: Job, record: Json, nll: NDArray[np.float32]) -> None:
        """Keep a run; the record is written last."""
        self.path(job).parent.mkdir(parents=True, exist_ok=True)
        buffer = BytesIO()
        np.save(buffer, nll)
        with replacing(self.path(job).with_suffix(".npy")) as path:
            path.write_bytes(buffer.getvalue())
        write_json(self.path(job), record)


def _keep_text(directory: Path, text: tuple[str, ...]) -> None:
    corpus = prepare(Settings(("ce",), 1, 1, 1, text=text))
    documents = read_documents(text)[0]
    arrays: dict[str, Any] = {
        "train": corpus.train.numpy().astype(np.int32),
        "held_out": corpus.held_out.numpy().astype(np.int32),
        "documents": held_out_labels(corpus, documents, document_of).astype(np.int32),
        "kinds": held_out_labels(corpus, documents, kind_of).astype(np.int8),
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    with replacing(directory) as temporary:
        corpus.tokenizer.save_pretrained(temporary)
        np.savez_compressed(temporary / "blocks.npz", **arrays)
        write_json(temporary / "about.json", {"source": corpus.source})
