"""From text to token blocks: documents, their split, the tokenizer, and how frequent each token is."""

import hashlib
import os
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nvamp.study import StudyError

VOCABULARY = 2048  # tokens of the built-in tokenizer
END_OF_TEXT = "<|endoftext|>"
MAX_CHARACTERS = 20_000_000  # read no more than this: minutes of training see a fraction of it
HELD_OUT_SHARE = 0.1
HELD_OUT_TOKENS = 32_768  # evaluate on no more than this: keeps evaluation cheap
MIN_DOCUMENTS = 10  # with fewer, each document is split by position
EXCERPT = 12_000  # characters of held-out text to read token by token, some thousand tokens
CLASSES = ("frequent", "mid", "rare")
# Of the training tokens, by falling frequency of their type: the first half is frequent, the last tenth rare.
CLASS_BOUNDS = (0.5, 0.9)

# Directories of the standard library that are no Python source to learn from: other projects' code, tests and
# generated tables, whose near-copies would sit on both sides of the split.
_NOT_SOURCE = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "encodings",
    "pydoc_data",
    "lib2to3",
    "idlelib",
}
_DATASET_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Corpus:
    """Token blocks to train and to evaluate on.

    Attributes:
        tokenizer: a `PreTrainedTokenizerBase`.
        train: [blocks, sequence] int64.
        held_out: [blocks, sequence] int64, from documents (or ends of documents) that are not in `train`.
        source: what the text is, for the report.
        excerpt: the beginning of the longest held-out document; of the next ones too, where it is short.
    """

    tokenizer: Any
    train: Tensor
    held_out: Tensor
    source: str
    excerpt: str

    def fingerprint(self) -> str:
        """The same for the same blocks."""
        digest = hashlib.sha256()
        for blocks in (self.train, self.held_out):
            digest.update(str(tuple(blocks.shape)).encode())
            digest.update(blocks.numpy().tobytes())
        return digest.hexdigest()[:16]


def build_corpus(documents: Sequence[str], source: str, sequence: int, tokenizer: Any = None) -> Corpus:
    """Split `documents`, tokenize them and pack them into blocks of `sequence` tokens.

    Args:
        documents: texts, in any order that does not change from run to run.
        tokenizer: a `PreTrainedTokenizerBase`; one is trained on the training documents where it is `None`.
    """
    train, held_out = split(documents)
    if tokenizer is None:
        tokenizer = train_tokenizer(train)
    blocks = pack(tokenize(train, tokenizer), sequence)
    held_out_blocks = pack(tokenize(held_out, tokenizer), sequence)
    if not len(blocks) or not len(held_out_blocks):
        raise StudyError(f"the text is too short: not one held-out block of {sequence} tokens in {source}")
    excerpt = "\n\n".join(sorted(held_out, key=len, reverse=True))[:EXCERPT]
    return Corpus(tokenizer, blocks, spread(held_out_blocks, HELD_OUT_TOKENS // sequence), source, excerpt)


def read_documents(
    text: Sequence[str], dataset: Sequence[str], out: Path | None = None
) -> tuple[list[str], str]:
    """The documents of files and directories, of a dataset, or of the standard library; and what they are.

    In one shuffled order, and no more than `MAX_CHARACTERS` of them.

    Args:
        out: what this directory holds is no text, where it lies in one that is read.
    """
    for option, names in (("text", text), ("dataset", dataset)):
        if "" in names:
            raise StudyError(f"--{option}: expected a name, got an empty one")
    if text:
        return _bounded(_read_paths([Path(name) for name in text], out)), ", ".join(text)
    if dataset:
        return _bounded(_read_dataset(dataset)), ", ".join(dataset)
    version = sysconfig.get_python_version()
    return _bounded(_read_standard_library()), f"the standard library source of Python {version}"


def split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents: a tenth of the characters held out.

    By document, none that is itself more than a tenth; by position, the end of each, where documents are few.
    """
    if len(documents) < MIN_DOCUMENTS:
        cuts = [len(document) - int(HELD_OUT_SHARE * len(document)) for document in documents]
        return (
            [document[:cut] for document, cut in zip(documents, cuts, strict=True)],
            [document[cut:] for document, cut in zip(documents, cuts, strict=True)],
        )
    wanted = HELD_OUT_SHARE * sum(map(len, documents))
    train: list[str] = []
    held_out: list[str] = []
    taken = 0
    for document in documents:
        if taken < wanted and len(document) <= wanted:
            held_out.append(document)
            taken += len(document)
        else:
            train.append(document)
    return train, held_out


def tokenize(documents: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    """The token ids of each document, closed by the end-of-text token where the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # Empty documents would fail in some tokenizers, and all at once would double the memory.
    kept = [document for document in documents if document]
    for start in range(0, len(kept), 256):
        for ids in tokenizer(kept[start : start + 256], add_special_tokens=False)["input_ids"]:
            yield ids + end


def pack(documents: Iterable[list[int]], sequence: int) -> Tensor:
    """Token ids end to end, cut to blocks [blocks, sequence] int64; what fills no block is dropped."""
    ids = np.fromiter(chain.from_iterable(documents), dtype=np.int64)
    blocks = len(ids) // sequence
    return torch.from_numpy(ids[: blocks * sequence].reshape(blocks, sequence))


def spread(blocks: Tensor, limit: int) -> Tensor:
    """At most `limit` of the blocks, evenly spread over them."""
    if len(blocks) <= limit:
        return blocks
    return blocks[torch.linspace(0, len(blocks) - 1, max(limit, 1)).round().long()]


def frequency_classes(train: Tensor, vocabulary: int) -> NDArray[np.int64]:
    """The index in `CLASSES` of every token type: [vocabulary].

    Types are taken by falling count in `train`; a type belongs where its first occurrence falls within
    `CLASS_BOUNDS`. Types that do not occur are rare.
    """
    counts = np.bincount(train.numpy().ravel(), minlength=vocabulary)
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    classes = np.empty(len(counts), dtype=np.int64)
    classes[order] = np.searchsorted(np.array(CLASS_BOUNDS) * counts.sum(), before, side="right")
    return classes


def train_tokenizer(documents: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer of `VOCABULARY` types, a `PreTrainedTokenizerFast`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def _bounded(documents: list[str]) -> list[str]:
    random.Random(0).shuffle(documents)
    kept: list[str] = []
    left = MAX_CHARACTERS
    for document in documents:
        if left <= 0:
            break
        kept.append(document[:left])
        left -= len(document)
    return kept


def _read_standard_library() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        path for path in root.rglob("*.py") if not _NOT_SOURCE.intersection(path.relative_to(root).parts)
    )
    documents = [text for path in paths if (text := _read_text(path)) is not None]
    if not documents:
        raise StudyError(f"this Python has no standard library source in {root}: name some text with --text")
    return documents


def _read_paths(paths: list[Path], out: Path | None) -> list[str]:
    documents: list[str] = []
    for path in paths:
        if not path.exists():
            raise StudyError(f"--text {path}: no such file or directory")
        found = _read_directory(path, out) if path.is_dir() else [_read_text(path)]
        texts = [text for text in found if text]
        if not texts:
            wanted = "no readable UTF-8 text in it" if path.is_dir() else "empty, or not readable UTF-8 text"
            raise StudyError(f"--text {path}: {wanted}")
        documents += texts
    return documents


def _read_directory(root: Path, out: Path | None) -> list[str | None]:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    left_out = out and out.resolve()
    return [
        _read_text(path)
        for path in paths
        if not _hidden(path.relative_to(root)) and not (left_out and path.resolve().is_relative_to(left_out))
    ]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _read_text(path: Path) -> str | None:
    """The text of a file; `None` where it is none or cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return None if "\0" in text else text


def _read_dataset(names: Sequence[str]) -> list[str]:
    import datasets

    datasets.disable_progress_bars()
    told = f"--dataset {' '.join(names)}"
    names, column = _named_column(names)
    try:
        rows = _load_dataset(names)
        return [text for text in rows[_text_column(rows, column)] if text]
    except StudyError as error:
        raise StudyError(f"{told}: {error}") from error
    except Exception as error:  # what a loader raises is any library's any error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        nor = "" if all(map(os.path.exists, names)) else " (no such file here either)"
        raise StudyError(f"{told}: {reason}{nor}") from error


def _named_column(names: Sequence[str]) -> tuple[list[str], str]:
    """The names of `name#column`, and the column; empty where none is named."""
    parts = [(name, "") if os.path.exists(name) else name.partition("#")[::2] for name in names]
    columns = sorted({column for _, column in parts if column})
    if len(columns) > 1:
        raise StudyError(f"--dataset {' '.join(names)}: expected one column, got {', '.join(columns)}")
    return [name for name, _ in parts], "".join(columns)


def _load_dataset(names: Sequence[str]) -> Any:
    from datasets import load_dataset

    if all(Path(name).is_file() for name in names):
        suffixes = {Path(name).suffix for name in names}
        formats = {_DATASET_FORMATS.get(suffix) for suffix in suffixes}
        if len(formats) != 1 or None in formats:
            raise StudyError(f"expected files of one format, of {', '.join(_DATASET_FORMATS)}")
        return load_dataset(formats.pop(), data_files=list(names), split="train")
    if len(names) > 1:
        missing = ", ".join(name for name in names if not Path(name).is_file())
        raise StudyError(f"expected one dataset, or local files; no such file: {missing}")
    name, _, configuration = names[0].partition(":")
    return load_dataset(name, configuration or None, split="train")


def _text_column(rows: Any, wanted: str) -> str:
    """The column of strings to read: `wanted`, or without a wish "text", or the only one."""
    columns = [
        name
        for name, feature in rows.features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    if not columns:
        raise StudyError(f"no column of text among {', '.join(rows.features)}")
    if wanted and wanted not in columns:
        raise StudyError(f"no column of text {wanted!r}, there are {', '.join(columns)}")
    if not wanted and "text" not in columns and len(columns) > 1:
        raise StudyError(
            f"several columns of text: {', '.join(columns)}; name one, as #{columns[0]} behind it"
        )
    return wanted or ("text" if "text" in columns else columns[0])
