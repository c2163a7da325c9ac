import os
from pathlib import Path

import pytest

from nvamp.study import StudyError, sources
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
    documents, source = read_documents([str(tmp_path / "in"), str(tmp_path / "c")])
    assert sorted(documents) == ["b", "c", "ä"]
    unread = "1 hidden: .git; 1 not UTF-8: binary; 1 binary: zeros"
    assert source.startswith(f"{tmp_path / 'in'}, {tmp_path / 'c'} (3 files read; not read: ")
    assert sorted(source[:-1].partition(": ")[2].split("; ")) == sorted(unread.split("; "))


def test_files_that_are_not_read_are_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a")
    for name in "bcdef":
        (tmp_path / name).write_bytes(b"\xff")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")  # to open it would be to wait for ever
    documents, source = read_documents([str(tmp_path)])
    assert documents == ["a"]
    assert source.startswith(f"{tmp_path} (1 file read; not read: 2 unreadable: ")
    assert {"gone", "pipe"} <= set(source.replace(";", ",").replace(": ", ", ").split(", "))
    assert "; 5 not UTF-8: " in source
    assert source.endswith(", ...)")

    def refused(path: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.txt").unlink()
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(
        StudyError, match=f"no readable UTF-8 text in it, not read: 1 unreadable: {tmp_path.name}$"
    ):
        read_documents([str(tmp_path)])


def test_names_of_files_that_are_not_read_fit_on_a_line_and_a_page(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n\xe2\x80\xae")).write_bytes(b"\xff")
    _, source = read_documents([str(tmp_path)])
    assert source == f"{tmp_path} (1 file read; not read: 1 not UTF-8: ⟨U+DCFF⟩⟨U+000A⟩⟨U+202E⟩)"


def test_what_nvamp_writes_is_no_text(tmp_path: Path) -> None:
    study = tmp_path / "earlier"
    (study / "runs").mkdir(parents=True)
    (study / "settings.json").write_text('{"--steps": 1, "nvamp": "0.1.0"}')
    (study / "runs" / "ce-seed0.json").write_text("{}")
    (tmp_path / "editor").mkdir()
    (tmp_path / "editor" / "settings.json").write_text("{}")
    page = "<!doctype html>\n<title>nvamp inspect: a under b</title>"
    (tmp_path / "page.html").write_text(page)
    (tmp_path / "prose.html").write_text("prose on " + page)
    (tmp_path / "link").symlink_to(study / "runs" / "ce-seed0.json")
    documents, source = read_documents([str(tmp_path)])
    assert sorted(documents) == ["prose on " + page, "{}"]
    assert source.startswith(f"{tmp_path} (2 files read; not read: 3 written by nvamp: ")
    for path in (study, study / "runs", study / "runs" / "ce-seed0.json", tmp_path / "link"):
        with pytest.raises(StudyError, match=f"^--text {path}: in the directory of a study"):
            read_documents([str(path)])
    (study / "settings.json").write_text("{}")
    assert len(read_documents([str(tmp_path)])[0]) == 5
    assert len(read_documents([str(tmp_path)], study)[0]) == 2


@pytest.mark.parametrize("suffix", ["json", "JSONL", "csv", "parquet", "tsv", "jsonl.gz"])
def test_rows_are_a_dataset(tmp_path: Path, suffix: str) -> None:
    rows = tmp_path / f"rows.{suffix}"
    rows.write_text('{"text": "a"}')
    with pytest.raises(StudyError) as error:
        read_documents([str(rows)])
    assert str(error.value) == f"--text {rows}: expected text, got rows, which --dataset takes"
    assert read_documents([str(tmp_path)])[0] == ['{"text": "a"}']  # among other files it may be text


def test_text_is_read_up_to_the_limit_and_not_beyond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_CHARACTERS", 10)
    opened = []

    def read(path: Path) -> object:
        opened.append(path)
        return real(path)

    real = sources._read_text
    monkeypatch.setattr(sources, "_read_text", read)
    for index in range(20):
        (tmp_path / str(index)).write_text(f"{index:07}")
    documents, source = read_documents([str(tmp_path)])
    assert [len(text) for text in documents] == [7, 3]
    assert len(opened) == 2
    assert source == f"{tmp_path} (2 files read; 18 more lie beyond 10 characters)"
    long = tmp_path / "long"
    long.write_bytes(b"a" * 100_000 + b"\xff")  # its end is not looked at
    assert read_documents([str(long)])[0] == ["a" * 10]
    # What lies beyond the limit is still checked for some text.
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x").write_bytes(b"\xff")
    with pytest.raises(StudyError, match=f"^--text {tmp_path / 'more'}: no readable UTF-8 text in it"):
        read_documents([str(long), str(tmp_path / "more")])


def test_documents_are_shuffled_the_same_way_always(tmp_path: Path) -> None:
    """Else the text that is held out, which comes first, would follow the names of the files."""
    names = [f"{index:02}" for index in range(40)]
    for name in names:
        (tmp_path / f"{name}.txt").write_text(name)
    documents, _ = read_documents([str(tmp_path)])
    assert sorted(documents) == names
    assert documents != names
    assert documents == read_documents([str(tmp_path)])[0]


def test_unreadable_text_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("")
    (tmp_path / "page").write_text("<!doctype html>\n<title>nvamp compare: ce</title>")
    (tmp_path / "directory").mkdir()
    for name, reason in (
        ("missing", "no such file or directory"),
        ("binary", "not UTF-8"),
        ("empty", "empty"),
        ("page", "written by nvamp"),
        ("directory", "no readable UTF-8 text in it"),
    ):
        with pytest.raises(StudyError) as error:
            read_documents([str(tmp_path / name)])
        assert str(error.value) == f"--text {tmp_path / name}: {reason}"


def test_the_default_text_is_the_standard_library() -> None:
    documents, source = read_documents([])
    assert any("class JSONEncoder" in document for document in documents)
    assert "Python" in source
