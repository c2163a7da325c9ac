"""What `nvamp inspect` is asked for, checked without PyTorch: mistakes are reported at once."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from nvamp.study import StudyError
from nvamp.study.model_files import check_model, models_below, read_object

REPORT = "report.html"


class Subject(NamedTuple):
    """A model to inspect.

    Attributes:
        source: a directory or hub id.
        name: what the page calls it.
        trained: the name of the loss that a study trained it with; `None` for a model from elsewhere.
        report: the report of that study; `None` if there is none.
    """

    source: str
    name: str
    trained: str | None = None
    report: Path | None = None


class Inputs(NamedTuple):
    """Models, a text, and the page to write.

    Attributes:
        text: the text of the file; line ends are not converted.
        special_tokens: whether special tokens that the text spells out are such, or else text.
    """

    subjects: list[Subject]
    path: Path
    text: str
    out: Path
    special_tokens: bool


def read_inputs(models: Sequence[str], path: Path, out: Path, special_tokens: bool = False) -> Inputs:
    """Read the text in `path`, and find the models; a study's directory means its models of the first seed.

    Raises:
        StudyError: a model is named twice or its directory holds none, the text cannot be read, or the page
            cannot be written.
    """
    text = read_text(path)
    _check_output(out, path)
    subjects = [subject for name in models for subject in _subjects(name)]
    for index, subject in enumerate(subjects):
        if subject.source in [other.source for other in subjects[:index]]:
            raise StudyError(f"--model {subject.source}: named twice")
        check_model(subject.source)
    return Inputs(_told_apart(subjects), path, text, out, special_tokens)


def _subjects(name: str) -> list[Subject]:
    """The model of this name, or the first of each loss if it is a study's directory."""
    study = Path(name)
    if name and not (study / "config.json").exists() and read_object(study / "settings.json"):
        found = [_subject(str(path)) for path in models_below(study / "models")]
        first = [subject for subject in found if subject.source.endswith("-seed0")]
        if not first:
            raise StudyError(f"--model {name}: the directory of a study without a model of its first seed")
        runs = read_object(study / "results.json").get("runs", [])
        order = [_title(run) for run in runs]  # the baseline first
        return sorted(first, key=lambda it: order.index(it.name) if it.name in order else len(order))
    return [_subject(name)]


def _subject(name: str) -> Subject:
    """The model of this name; if a study has a record of its run, under the name of its loss and seed."""
    path = Path(os.path.abspath(name))  # also of "." and "../model"
    study = path.parent.parent
    record = read_object(study / "runs" / f"{path.name}.json")
    if not (isinstance(record.get("loss"), str) and "seed" in record):
        return Subject(name, path.name)
    report = study / REPORT
    trained = record["loss"].partition("@")[0]  # without the learning rate that the loss may have
    return Subject(name, _title(record), trained, report if report.exists() else None)


def _title(run: dict[str, Any]) -> str:
    return f"{run['loss']}, seed {run['seed']}"


def _told_apart(subjects: list[Subject]) -> list[Subject]:
    """The same models, by their sources if two have the same name."""
    names = [subject.name for subject in subjects]
    return [it._replace(name=it.source) if names.count(it.name) > 1 else it for it in subjects]


def link(target: Path, page: Path) -> str:
    """The address of a file as a link of the page: a relative one, so that both can be moved together."""
    try:
        return quote(Path(os.path.relpath(target, page.parent)).as_posix())
    except ValueError:  # on another drive
        return target.absolute().as_uri()


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; line ends are not converted."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise StudyError(f"--text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"--text {path}: not UTF-8, see byte {error.start}") from error
    if not text:
        raise StudyError(f"--text {path}: empty")
    return text


def _check_output(out: Path, text: Path) -> None:
    """Check `out` before the model takes its time to read the text."""
    above = next(path for path in out.absolute().parents if os.path.exists(path))
    if out.is_dir():
        wrong = "Is a directory"
    elif os.path.exists(out) and out.samefile(text):
        wrong = "the file of --text, which the page would replace"
    elif not above.is_dir():
        wrong = f"{above} is not a directory"
    elif not os.access(above, os.W_OK):
        wrong = f"{above} is not writable"
    else:
        return
    raise StudyError(f"--out {out}: {wrong}")
