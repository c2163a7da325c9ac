import json
from pathlib import Path

import pytest

from nvamp.study import StudyError
from nvamp.study.sources import read_documents


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
        StudyError, match=f"^--dataset {rows}: several text columns: question, answer; .* #question"
    ):
        read_documents([], [str(rows)])
    documents, source = read_documents([], [f"{rows}#answer"])
    assert sorted(documents) == ["that", "there"]
    assert source == f"{rows}#answer"
    with pytest.raises(StudyError, match=r"#n: no text column 'n', the text columns are question, answer$"):
        read_documents([], [f"{rows}#n"])
    with pytest.raises(StudyError, match=r"expected one column, got answer, question$"):
        read_documents([], [f"{rows}#answer", f"{rows}#question"])


def test_a_bad_dataset_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "numbers.csv").write_text("n\n1\n2\n")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "rows.xyz").write_text("")
    for name, reason in (
        ("numbers.csv", "no text column among n"),
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
