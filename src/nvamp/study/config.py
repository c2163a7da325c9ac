"""A study's options as a TOML file, whose keys are the names of the options."""

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from nvamp.study import StudyError
from nvamp.study.files import replacing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

CONFIG = "study.toml"  # the file in the directory of each study


def read_config(path: Path, options: Collection[str]) -> dict[str, Any]:
    """The values in a file, by their keys.

    Args:
        options: the keys that may occur.

    Raises:
        StudyError: there is no such file, it is no TOML, or has another key.
    """
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"--config {path}: {error.strerror}") from error
    except ValueError as error:  # of the encoding or of TOML
        raise StudyError(f"--config {path}: {error}") from error
    for key in values:
        if key not in options:
            raise StudyError(f"--config {path}: unknown key {key!r}, known are {', '.join(options)}")
    return values


def write_config(settings: Mapping[str, Any], path: Path) -> None:
    """Write the fields of `Settings`, for `read_config`, without those that are off or the default's."""
    names = {field: "loss" if field == "losses" else field.replace("_", "-") for field in settings}
    given = {
        names[field]: list(value) if isinstance(value, tuple) else value
        for field, value in settings.items()
        if value not in (None, False, ())
    }
    with replacing(path) as temporary:
        temporary.write_text(tomli_w.dumps(given), encoding="utf-8")
