import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from nvamp.study import StudyError
from nvamp.study.rows import Chat, Pair, Rows, read_rows

CHATS = [
    {"id": 1, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"id": 2, "messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
]
EXPECTED = [Chat(tuple(row["messages"]), 0) for row in CHATS]  # type: ignore[arg-type]


def written(path: Path, rows: list[Any]) -> list[str]:
    """The rows in a file, a JSON object each, and its name."""
    path.write_text("\n".join(map(json.dumps, rows)))
    return [str(path)]


def refused(names: list[str]) -> str:
    with pytest.raises(StudyError) as error:
        read_rows(names)
    message = str(error.value)
    assert "\n" not in message
    option = f"--dataset {' '.join(names)}: "
    assert message.startswith(option)
    return message.removeprefix(option)


def save_csv(path: Path) -> str:
    path.write_text("n,prose\n1,eins\n2,zwei\n3,\n")
    return str(path)


def test_texts_of_local_files(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("eins\n\nzwei\n")
    (tmp_path / "TABS.TSV").write_text("n\tprose\n1\teins\n2\tzwei\n3\t\n")
    rows = [{"id": 1, "text": "eins", "title": "x"}, {"id": 2, "text": "zwei"}, {"id": 3, "text": None}]
    names = [save_csv(tmp_path / "ROWS.CSV"), str(tmp_path / "lines.txt"), str(tmp_path / "TABS.TSV")]
    names += written(tmp_path / "rows.jsonl", rows) + written(tmp_path / "rows.JSON", rows)
    for name in names:
        assert read_rows([name]) == Rows(texts=["eins", "zwei"], dropped=Counter({"no text": 1}))


SAVED: dict[str, Callable[[datasets.Dataset, Path], object]] = {
    "rows.jsonl": lambda rows, path: rows.to_json(path),
    "rows.JSONL": lambda rows, path: rows.to_json(path),
    "rows.jsonl.gz": lambda rows, path: path.write_bytes(
        gzip.compress(b"\n".join(json.dumps(r).encode() for r in rows))
    ),
    "rows.parquet": lambda rows, path: rows.to_parquet(path),
    "dataset": lambda rows, path: rows.save_to_disk(path),
    "splits": lambda rows, path: datasets.DatasetDict(train=rows, test=rows).save_to_disk(path),
    "folder": lambda rows, path: path.mkdir() or rows.to_json(path / "train.jsonl"),
}


@pytest.mark.parametrize("name", SAVED)
def test_chats_however_they_are_saved(tmp_path: Path, name: str) -> None:
    SAVED[name](datasets.Dataset.from_list(CHATS), tmp_path / name)
    assert read_rows([str(tmp_path / name)]) == Rows(examples=EXPECTED)


def test_files_of_one_dataset(tmp_path: Path) -> None:
    names = [*written(tmp_path / "a.jsonl", CHATS[:1]), *written(tmp_path / "b.jsonl", CHATS[1:])]
    assert read_rows(names).examples == EXPECTED


def test_a_saved_dataset_without_a_training_split(tmp_path: Path) -> None:
    datasets.DatasetDict(test=datasets.Dataset.from_list(CHATS)).save_to_disk(tmp_path / "saved")
    some = tmp_path / "saved" / "test"
    assert (
        refused([str(tmp_path / "saved")]) == f"no split train, the splits are test: name one, as in {some}"
    )
    assert read_rows([str(some)]).examples == EXPECTED


def test_prompts_and_completions(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "c"}]
    rows += [{"prompt": "d", "completion": None}, {"prompt": "e", "completion": ""}]
    found = read_rows(written(tmp_path / "strings.jsonl", rows))
    assert found == Rows(examples=[Pair("a", "b"), Pair("", "c")], dropped=Counter({"no completion": 2}))
    messages = CHATS[0]["messages"]
    assert isinstance(messages, list)
    found = read_rows(
        written(
            tmp_path / "lists.jsonl",
            [
                {"prompt": messages[:1], "completion": messages[1:]},
                {"prompt": messages, "completion": messages[:1]},
            ],
        )
    )
    dropped = Counter({"no message of an assistant": 1})  # in the completion
    assert found == Rows(examples=[Chat(tuple(messages), 1)], dropped=dropped)


def test_rows_that_are_no_chat_are_counted(tmp_path: Path) -> None:
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    rows: list[Any] = [
        [user, assistant],
        [user],
        [],
        None,
        [user, {"role": "assistant", "content": None}],
        [user, {"role": None, "content": "b"}],
        [user, call, assistant],
        [user, call],
        ["hello"],
        [{"role": "user", "content": ["a"]}, assistant],
    ]
    found = read_rows(written(tmp_path / "rows.jsonl", [{"messages": row} for row in rows]))
    # A table has the keys of all messages in each: those that are null are none.
    assert found.examples == [
        Chat((user, assistant), 0),
        Chat((user, {**call, "content": ""}, assistant), 0),
        Chat((user, {**call, "content": ""}), 0),
    ]
    assert found.dropped == {
        "no message of an assistant": 4,
        "a message that is not {role: string, content: string}": 3,
    }
    message = refused(written(tmp_path / "none.jsonl", [{"messages": [user]}] * 3))
    assert message == "nothing to learn in its 3 rows: 3 with no message of an assistant"


def test_chats_bring_their_tools(tmp_path: Path) -> None:
    """As TRL takes them: JSON schemas, or the text of them."""
    schema = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    messages = EXPECTED[0].messages
    expected = [Chat(messages, 0, [schema]), Chat(messages, 0)]
    rows: list[Any] = [{"messages": messages, "tools": [schema]}, {"messages": messages, "tools": []}]
    assert read_rows(written(tmp_path / "lists.jsonl", rows)).examples == expected
    texts = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    texts += [{"messages": messages, "tools": "[{"}, {"messages": messages, "tools": "{}"}]
    found = read_rows(written(tmp_path / "texts.jsonl", texts))
    assert found.examples == expected
    assert found.dropped == {"tools that are no JSON": 1, "tools that are no list": 1}
    prompts = [{"prompt": messages[:1], "completion": messages[1:], "tools": [schema]}]
    assert read_rows(written(tmp_path / "prompts.jsonl", prompts)).examples == [Chat(messages, 1, [schema])]


def test_a_column_of_several_is_named(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("n,question,answer\n1,what,that\n2,where,there\n")
    assert refused([str(rows)]) == (
        "several text columns: question, answer; rename two to prompt and completion, "
        "or append the one to read alone, as in #question"
    )
    assert read_rows([f"{rows}#answer"]).texts == ["that", "there"]
    columns = "the columns are n (int64), question (string), answer (string)"
    assert refused([f"{rows}#n"]) == f"n: expected strings or lists of messages, {columns}"
    assert refused([f"{rows}#m"]) == f"no column 'm', {columns}"
    with pytest.raises(StudyError, match=r"expected one column, got answer, question$"):
        read_rows([f"{rows}#answer", f"{rows}#question"])
    (named,) = written(tmp_path / "talks.jsonl", [{"talk": row["messages"], "text": "x"} for row in CHATS])
    assert read_rows([f"{named}#talk"]).examples == EXPECTED
    assert read_rows([named]).texts == ["x", "x"]
    (tmp_path / "a#b.txt").write_text("eins\n")
    assert read_rows([str(tmp_path / "a#b.txt")]).texts == ["eins"]


def test_files_that_do_not_fit_together_say_what_each_has(tmp_path: Path) -> None:
    chats = written(tmp_path / "chats.jsonl", CHATS)
    pairs = written(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b"}])
    assert refused([*chats, *pairs]) == (
        "the files do not fit together: "
        "chats.jsonl: the columns are id (int64), messages (list of {role: string, content: string}); "
        "pairs.jsonl: the columns are prompt (string), completion (string)"
    )
    (tmp_path / "bad.jsonl").write_text("{")
    assert "do not fit" not in refused([*chats, str(tmp_path / "bad.jsonl")])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"n": 1, "t": [1.5]}, "no messages, no prompt and completion and no text, the columns are n (int64), t (list of float64)"),
        ({"deep": {"a": {"b": "c"}}, "none": None}, "the columns are deep ({a: {b: string}}), none (null)"),
        ({"messages": "hello"}, "messages: expected lists of {role: string, content: string}, the columns are messages (string)"),
        ({"messages": [{"from": "human", "value": "a"}]}, "the columns are messages (list of {from: string, value: string})"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "(list of {role: string, content: list of {type: string}})"),
        ({"prompt": "a", "completion": ["b"]}, "prompt and completion: expected two strings, or two lists of {role: string, content: string}, the columns are prompt (string), completion (list of string)"),
        ({f"c{index:02}": index for index in range(20)}, "c11 (int64) and 8 more"),
        ({f"c{index:02}": index for index in range(12)}, "c10 (int64), c11 (int64)"),
    ],
)  # fmt: skip
def test_columns_that_are_something_else_are_named_with_their_types(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    assert refused(written(tmp_path / "rows.jsonl", [row])).endswith(message)


def test_damaged_files_say_what_is_wrong(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = gzip.compress("\n".join(map(json.dumps, CHATS)).encode())
    files = {
        "cut.jsonl.gz": (whole[:-20], "Compressed file ended before the end-of-stream marker was reached"),
        "cut.parquet": (
            b"PAR1",
            "Parquet file size is 4 bytes, smaller than the minimum file footer (8 bytes)",
        ),
        "empty.jsonl": (b"", "empty.jsonl: empty"),
        "latin.csv": ("text\nä\n".encode("latin1"), "utf-8"),
        "cut.json": (b"{", ""),
        "rows.xyz": (
            b"x",
            "expected files of one format, of .json, .jsonl, .csv, .tsv, .parquet, .txt, which may end in .gz",
        ),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        found = refused([str(tmp_path / name)])
        assert message in found
        assert "error occurred" not in found  # the library's words, not the cause
    assert capfd.readouterr() == ("", "")
    save_csv(tmp_path / "rows.csv")
    missing = tmp_path / "missing.csv"
    assert refused([str(tmp_path / "rows.csv"), str(missing)]).endswith(f"no such file: {missing}")
    assert (
        refused([str(missing)])
        == refused(["./missing"])
        == refused(["missing.CSV.gz"])
        == "no such file or directory"
    )
    with pytest.raises(StudyError, match=r"^--dataset: expected a name, got an empty one$"):
        read_rows([""])


def test_the_deepest_cause_that_says_something_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        try:
            raise ValueError("what is wrong\nand more") from TimeoutError()
        except ValueError as error:
            raise RuntimeError("an error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert refused(written(tmp_path / "rows.jsonl", CHATS)) == "what is wrong"


def test_a_hub_that_is_out_of_reach_is_asked_once(
    lookups: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    message = refused(["some/dataset"])
    assert message.startswith("no such file or directory here, and no such dataset among those downloaded")
    assert message.endswith("the hub is out of reach")
    assert len(lookups) == 1
    assert capfd.readouterr() == ("", "")
    assert constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE
    assert refused(["some/dataset"]) == message
    assert len(lookups) == 1


@pytest.mark.parametrize(
    ("dataset", "wanted"), [("some/dataset:small", "small"), ("some/dataset", None), ("some/dataset:", None)]
)
def test_a_hub_that_answers_is_used(
    dataset: str, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Session:
        def head(self, url: str, timeout: float) -> None:
            assert (url, timeout) == (constants.ENDPOINT, 5.0)

    def load(name: str, configuration: str | None, split: str) -> datasets.Dataset:
        assert (name, configuration, split) == ("some/dataset", wanted, "train")
        return datasets.Dataset.from_list(CHATS)

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows([dataset]).examples == EXPECTED
    assert not constants.HF_HUB_OFFLINE
