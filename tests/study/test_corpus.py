import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvamp.study import StudyError
from nvamp.study.corpus import (
    EXCERPT,
    build_corpus,
    frequency_classes,
    pack,
    read_documents,
    split,
    spread,
    tokenize,
)
from tests.study.conftest import words


@given(st.lists(st.text(min_size=1, max_size=300), min_size=1, max_size=60))
def test_split_loses_nothing_and_shares_nothing(documents: list[str]) -> None:
    train, held_out = split(documents)
    if len(documents) < 10:
        assert [a + b for a, b in zip(train, held_out, strict=True)] == documents
    else:
        assert sorted(train + held_out) == sorted(documents)


@given(st.lists(st.integers(1, 5000), min_size=10, max_size=60))
def test_about_a_tenth_is_held_out(lengths: list[int]) -> None:
    train, held_out = split(["x" * length for length in lengths])
    assert train
    assert 0 < sum(map(len, held_out)) <= 0.2 * sum(lengths)


def test_a_single_document_is_split_by_position() -> None:
    assert split(["a" * 90 + "b" * 10]) == (["a" * 90], ["b" * 10])


@given(st.lists(st.lists(st.integers(0, 9), max_size=20), max_size=10), st.integers(1, 7))
def test_pack_keeps_the_stream(documents: list[list[int]], sequence: int) -> None:
    blocks = pack(documents, sequence)
    stream = [token for document in documents for token in document]
    assert blocks.shape == (len(stream) // sequence, sequence)
    assert blocks.flatten().tolist() == stream[: blocks.numel()]


@given(st.integers(1, 50), st.integers(1, 60))
def test_spread_takes_distinct_blocks_from_end_to_end(blocks: int, limit: int) -> None:
    taken = spread(torch.arange(blocks), limit).tolist()
    assert len(set(taken)) == len(taken) == min(blocks, limit)
    assert taken[0] == 0
    assert limit == 1 or taken[-1] == blocks - 1


def test_tokenize_gives_back_the_text_and_ends_each_document(tokenizer: Any) -> None:
    texts = ["alpha\n\tβeta 🙂", "", "gamma"]
    ids = list(tokenize(texts, tokenizer))
    assert [document[-1] for document in ids] == [tokenizer.eos_token_id] * 2
    assert [tokenizer.decode(document[:-1]) for document in ids] == ["alpha\n\tβeta 🙂", "gamma"]


def test_frequency_classes_by_hand() -> None:
    # Counts 50, 30, 15, 5, 0: type 0 is the first half; 2 and 1 begin before 90%; 3 begins at 95%.
    train = torch.tensor([0] * 50 + [2] * 30 + [1] * 15 + [3] * 5)[None]
    assert frequency_classes(train, 5).tolist() == [0, 1, 1, 2, 2]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=300))
def test_a_more_frequent_token_is_never_in_a_rarer_class(tokens: list[int]) -> None:
    classes = frequency_classes(torch.tensor([tokens]), 31)
    counts = np.bincount(tokens, minlength=31)
    assert classes[counts.argmax()] == 0
    assert (classes[counts == 0] == 2).all()
    order = np.lexsort((classes, -counts))
    assert (np.diff(classes[order]) >= 0).all()


def test_the_corpus_of_the_same_text_is_the_same(documents: list[str]) -> None:
    first, again = (build_corpus(documents, "words", 16) for _ in range(2))
    assert first.fingerprint() == again.fingerprint()
    assert first.fingerprint() != build_corpus([*documents, "more"], "words", 16).fingerprint()
    assert first.fingerprint() != build_corpus(documents, "words", 8).fingerprint()


def test_no_held_out_text_is_trained_on(documents: list[str], tokenizer: Any) -> None:
    marked = [f"mark{index} {document}" for index, document in enumerate(documents)]
    corpus = build_corpus(marked, "words", 16, tokenizer)
    trained = tokenizer.decode(corpus.train.flatten())
    held_out = tokenizer.decode(corpus.held_out.flatten())
    seen = [f"mark{index} " in trained for index in range(len(marked))]
    kept = [f"mark{index} " in held_out for index in range(len(marked))]
    assert sum(kept) >= 4
    assert sum(seen) >= 30
    assert not any(a and b for a, b in zip(seen, kept, strict=True))


def test_too_short_a_text() -> None:
    with pytest.raises(
        StudyError, match="the text is too short: not one held-out block of 64 tokens in words"
    ):
        build_corpus(["a few words"], "words", 64)


def test_files_and_directories(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a.md").write_text("ä")
    (tmp_path / "in" / "b.py").write_text("b")
    (tmp_path / "in" / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "in" / "zeros").write_bytes(b"a\0b")
    (tmp_path / "in" / ".git").mkdir()
    (tmp_path / "in" / ".git" / "config").write_text("hidden")
    (tmp_path / "c").write_text("c")
    documents, source = read_documents([str(tmp_path / "in"), str(tmp_path / "c")], [])
    assert sorted(documents) == ["b", "c", "ä"]
    assert source == f"{tmp_path / 'in'}, {tmp_path / 'c'}"


def test_unreadable_text_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("")
    (tmp_path / "directory").mkdir()
    for name, reason in (
        ("missing", "no such file or directory"),
        ("binary", "empty, or not readable UTF-8 text"),
        ("empty", "empty, or not readable UTF-8 text"),
        ("directory", "no readable UTF-8 text in it"),
    ):
        with pytest.raises(StudyError) as error:
            read_documents([str(tmp_path / name)], [])
        assert str(error.value) == f"--text {tmp_path / name}: {reason}"


def test_the_default_text_is_the_standard_library() -> None:
    documents, source = read_documents([], [])
    assert any("class JSONEncoder" in document for document in documents)
    assert "Python" in source


def test_local_dataset_files(tmp_path: Path) -> None:
    rows = [{"id": 1, "text": "one"}, {"id": 2, "text": "two"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "prose.csv").write_text("n,prose\n1,eins\n2,zwei\n")
    (tmp_path / "lines.txt").write_text("uno\ndos\n")
    for name, expected in (
        ("rows.jsonl", ["one", "two"]),
        ("prose.csv", ["eins", "zwei"]),
        ("lines.txt", ["dos", "uno"]),
    ):
        documents, _ = read_documents([], [str(tmp_path / name)])
        assert sorted(documents) == expected


def test_a_column_of_several_is_named(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("n,question,answer\n1,what,that\n2,where,there\n")
    with pytest.raises(
        StudyError, match=f"^--dataset {rows}: several columns .*: question, answer; .* #question"
    ):
        read_documents([], [str(rows)])
    documents, source = read_documents([], [f"{rows}#answer"])
    assert sorted(documents) == ["that", "there"]
    assert source == f"{rows}#answer"
    with pytest.raises(StudyError, match=r"#n: no column of text 'n', there are question, answer$"):
        read_documents([], [f"{rows}#n"])
    with pytest.raises(StudyError, match=r"expected one column, got answer, question$"):
        read_documents([], [f"{rows}#answer", f"{rows}#question"])


def test_a_bad_dataset_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "numbers.csv").write_text("n\n1\n2\n")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "rows.xyz").write_text("")
    for name, reason in (
        ("numbers.csv", "no column of text among n"),
        ("broken.json", ""),
        ("rows.xyz", "expected files of one format, of .json, .jsonl, .csv, .parquet, .txt"),
        ("no-such-dataset", ""),
    ):
        with pytest.raises(StudyError) as error:
            read_documents([], [str(tmp_path / name)])
        assert str(error.value).startswith(f"--dataset {tmp_path / name}: {reason}")
        assert "\n" not in str(error.value)
        assert str(error.value).endswith("(no such file here either)") == (name == "no-such-dataset")
    with pytest.raises(StudyError, match=f"no such file: {tmp_path / 'missing.csv'}$"):
        read_documents([], [str(tmp_path / "numbers.csv"), str(tmp_path / "missing.csv")])


def test_the_excerpt_is_held_out_text(tokenizer: Any) -> None:
    documents = [words(seed, 100 + seed) for seed in range(40)]
    longest = sorted(split(documents)[1], key=len, reverse=True)
    excerpt = build_corpus(documents, "words", 16, tokenizer).excerpt
    assert excerpt == "\n\n".join(longest)
    documents = [document * 40 for document in documents]
    assert build_corpus(documents, "words", 16, tokenizer).excerpt == (longest[0] * 40)[:EXCERPT]
