"""The rows of a dataset: texts, prompts with completions, and chats, in the columns that TRL knows."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nvamp.study import StudyError
from nvamp.study.hub import reach_hub

# A message: its "role", its "content", and whatever else the chat template of a tokenizer reads.
Message = Mapping[str, Any]


class Pair(NamedTuple):
    """A prompt and its completion, both plain text."""

    prompt: str
    completion: str

    @property
    def characters(self) -> int:
        return len(self.prompt) + len(self.completion)


class Chat(NamedTuple):
    """Messages, the index of the first one that is no prompt, and the tools that a chat template describes.

    The index is 0 for a chat, and later for its completion.
    """

    messages: tuple[Message, ...]
    completion: int
    tools: Sequence[Any] | None = None

    @property
    def characters(self) -> int:
        return sum(len(message["content"]) for message in self.messages) + len(str(self.tools or ""))


Example = Pair | Chat


@dataclass(frozen=True)
class Rows:
    """What is read of a dataset: `texts`, or else `examples`.

    Attributes:
        dropped: how many rows are left out, by the reason.
    """

    texts: list[str] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


# What a file of rows is read with, and how, by the end of its name.
FORMATS: dict[str, tuple[str, dict[str, str]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
_STRINGS = ("string", "large_string")
_MIXED = "mixed"  # the type of what differs from row to row
_MESSAGE = "{role: string, content: string}"
COLUMNS = 12  # no more columns are named


def ending(path: Path) -> str:
    """The end of a file's name that tells its format: in lower case, and without that of a compression."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_rows(names: Sequence[str]) -> Rows:
    """Read the column `messages`, or `prompt` and `completion`, or `text`, or the only text column.

    Args:
        names: the name of a dataset, `name:configuration`, a directory of `save_to_disk`, or local files.
            `#column` after them names the one to read, of texts or of messages.

    Raises:
        StudyError: the dataset cannot be read, or has no such column; the message names those it has.
    """
    if "" in names:
        raise StudyError("--dataset: expected a name, got an empty one")
    option = f"--dataset {' '.join(names)}"
    names, column = _named_column(names)
    try:
        rows = _take(_load(names), column)
        if not rows.texts and not rows.examples:
            reasons = "; ".join(f"{count:,} with {reason}" for reason, count in rows.dropped.most_common())
            raise StudyError(f"nothing to learn in its {rows.dropped.total():,} rows: {reasons or 'empty'}")
        return rows
    except StudyError as error:
        raise StudyError(f"{option}: {error}") from error
    except Exception as error:  # a loader can raise any error of any library
        nor = "" if all(map(os.path.exists, names)) else " (no such file here either)"
        raise StudyError(f"{option}: {_reason(error)}{nor}") from error


def _reason(error: BaseException) -> str:
    """The first line of what is at the root of an error: of the causes, the last one that says anything."""
    line = ""
    cause: BaseException | None = error
    while cause is not None:
        line = str(cause).strip().partition("\n")[0] or line
        cause = cause.__cause__
    return line or type(error).__name__


def _named_column(names: Sequence[str]) -> tuple[list[str], str]:
    """The name of each `name#column`, and the one column; empty if no column is named."""
    parts = [(name, "") if os.path.exists(name) else name.partition("#")[::2] for name in names]
    columns = sorted({column for _, column in parts if column})
    if len(columns) > 1:
        raise StudyError(f"--dataset {' '.join(names)}: expected one column, got {', '.join(columns)}")
    return [name for name, _ in parts], "".join(columns)


def _load(names: Sequence[str]) -> Any:
    """A `datasets.Dataset`."""
    import datasets

    datasets.disable_progress_bars()
    # What they log on the way to an error is in the error, or is of no use.
    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    paths = [Path(name) for name in names]
    if all(path.is_file() for path in paths):
        return _load_files(paths)
    if len(names) > 1:
        missing = ", ".join(str(path) for path in paths if not path.is_file())
        raise StudyError(f"expected one dataset, or local files; no such file: {missing}")
    if paths[0].is_dir():
        saved = _load_saved(paths[0])
        return datasets.load_dataset(names[0], split="train") if saved is None else saved
    if paths[0].is_absolute() or names[0].startswith(".") or ending(paths[0]) in FORMATS:
        raise StudyError("no such file or directory")
    reached = reach_hub()
    name, _, configuration = names[0].partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split="train")
    except Exception as error:
        if reached:
            raise
        raise StudyError(
            "no such file or directory here, and no such dataset among those downloaded earlier; "
            "the hub is out of reach"
        ) from error


def _load_files(paths: Sequence[Path]) -> Any:
    from datasets import load_dataset

    formats = {ending(path) for path in paths}
    if len(formats) != 1 or not formats <= FORMATS.keys():
        raise StudyError(f"expected files of one format, of {', '.join(FORMATS)}, which may end in .gz")
    if empty := [path.name for path in paths if not path.stat().st_size]:
        raise StudyError(f"{', '.join(empty)}: empty")
    loader, options = FORMATS[formats.pop()]

    def load(some: Sequence[Path]) -> Any:
        return load_dataset(loader, data_files=[str(path) for path in some], split="train", **options)

    try:
        return load(paths)
    except Exception as error:
        if len(paths) == 1:
            raise
        columns = [f"{path.name}: {_columns(load([path]).features)}" for path in paths]
        raise StudyError(f"the files do not fit together: {'; '.join(columns)}") from error


def _load_saved(directory: Path) -> Any:
    """The dataset that `save_to_disk` wrote in a directory, or its split "train"; `None` if there is none."""
    from datasets import load_from_disk

    if not any((directory / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return None
    saved = load_from_disk(str(directory))
    if not isinstance(saved, dict):
        return saved
    if "train" not in saved:
        some = directory / next(iter(saved))
        raise StudyError(f"no split train, the splits are {', '.join(saved)}: name one, as in {some}")
    return saved["train"]


def _take(rows: Any, wanted: str) -> Rows:
    """What the rows hold in the column `wanted`, or if that is empty in the columns that are known."""
    features: Mapping[str, Any] = rows.features
    if wanted:
        if wanted not in features:
            raise StudyError(f"no column {wanted!r}, {_columns(features)}")
        return _chats(rows, wanted) if _is_chat(features[wanted]) else _texts(rows, wanted)
    if "messages" in features:
        if not _is_chat(features["messages"]):
            raise StudyError(f"messages: expected lists of {_MESSAGE}, {_columns(features)}")
        return _chats(rows, "messages")
    if {"prompt", "completion"} <= features.keys():
        return _pairs(rows)
    return _texts(rows, _text_column(features))


def _pairs(rows: Any) -> Rows:
    both = [rows.features[name] for name in ("prompt", "completion")]
    if all(map(_is_chat, both)):
        return _chats(rows, "completion", "prompt")
    if not all(map(_is_text, both)):
        raise StudyError(
            f"prompt and completion: expected two strings, or two lists of {_MESSAGE}, "
            + _columns(rows.features)
        )
    return _gather(
        Pair(row["prompt"] or "", row["completion"]) if row["completion"] else "no completion"
        for row in rows.select_columns(["prompt", "completion"])
    )


def _chats(rows: Any, column: str, prompt: str = "") -> Rows:
    """The chats of a column, with a prompt from another one, and what the column "tools" has for them."""
    columns = [name for name in (column, prompt, "tools") if name in rows.features]
    return _gather(
        _chat(row[column], row.get(prompt), row.get("tools")) for row in rows.select_columns(columns)
    )


def _texts(rows: Any, column: str) -> Rows:
    if not _is_text(rows.features[column]):
        raise StudyError(f"{column}: expected strings or lists of messages, {_columns(rows.features)}")
    found = list(rows[column])
    texts = [text for text in found if text]
    empty = len(found) - len(texts)
    return Rows(texts=texts, dropped=Counter({"no text": empty} if empty else {}))


def _text_column(features: Mapping[str, Any]) -> str:
    """The column "text", or the only column of texts."""
    columns = [name for name, feature in features.items() if _is_text(feature)]
    if "text" in columns:
        return "text"
    if not columns:
        raise StudyError(f"no messages, no prompt and completion and no text, {_columns(features)}")
    if len(columns) > 1:
        raise StudyError(
            f"several text columns: {', '.join(columns)}; rename two to prompt and completion, or append "
            f"the one to read alone, as in #{columns[0]}"
        )
    return columns[0]


def _gather(found: Iterable[Example | str]) -> Rows:
    """The examples, and how many rows have none, each of which is the reason instead."""
    rows = Rows()
    for one in found:
        if isinstance(one, str):
            rows.dropped[one] += 1
        else:
            rows.examples.append(one)
    return rows


def _chat(messages: Sequence[Any] | None, prompt: Sequence[Any] | None, tools: Any) -> Chat | str:
    """The chat of a row, or why it has none. Tools are a list of JSON schemas, or JSON text of one."""
    try:
        tools = _without_nulls(json.loads(tools) if isinstance(tools, str) else tools)
    except json.JSONDecodeError:
        return "tools that are no JSON"
    if not isinstance(tools, list | None):
        return "tools that are no list"
    before, after = ([_message(message) for message in some or ()] for some in (prompt, messages))
    kept = [message for message in (*before, *after) if message is not None]
    if len(kept) < len(before) + len(after):
        return f"a message that is not {_MESSAGE}"
    if not any(map(_says_something, kept[len(before) :])):
        return "no message of an assistant"
    return Chat(tuple(kept), len(before), tools or None)


def _says_something(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message["content"] or message.get("tool_calls"))


def _message(found: Any) -> Message | None:
    """A message whose content is a string; `None` if it has no role, or its content is something else."""
    if not isinstance(found, Mapping):
        return None
    message = {"content": "", **_without_nulls(found)}
    return message if all(isinstance(message.get(key), str) for key in ("role", "content")) else None


def _without_nulls(value: Any) -> Any:
    """The value without keys that are null, at any depth: a row has them for keys of other rows."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in _STRINGS


def _is_chat(feature: Any) -> bool:
    """Whether a column holds lists of messages, or of what differs from row to row and may be messages."""
    message = _element(feature)
    if not isinstance(message, dict):
        return message is not None and _type(message) == _MIXED
    return all(key in message and _type(message[key]) in ("string", _MIXED) for key in ("role", "content"))


def _element(feature: Any) -> Any:
    """The feature of a list's elements; `None` if it is none."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", None)


def _columns(features: Mapping[str, Any]) -> str:
    """The columns of a dataset and their types, in words."""
    named = [f"{name} ({_type(feature)})" for name, feature in list(features.items())[:COLUMNS]]
    more = f" and {len(features) - COLUMNS:,} more" if len(features) > COLUMNS else ""
    return f"the columns are {', '.join(named)}{more}"


def _type(feature: Any) -> str:
    if isinstance(feature, dict):
        return "{" + ", ".join(f"{key}: {_type(inner)}" for key, inner in feature.items()) + "}"
    element = _element(feature)
    if element is not None:
        return f"list of {_type(element)}"
    dtype = getattr(feature, "dtype", None)
    return _MIXED if dtype is None else "string" if dtype in _STRINGS else str(dtype)
