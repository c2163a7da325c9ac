"""The directory of a study: its conditions and its finished runs."""

import json
import os
import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

import nvamp
from nvamp.study import StudyError
from nvamp.study.corpus import Corpus
from nvamp.study.files import remove, replacing
from nvamp.study.inspect.page import write_page
from nvamp.study.inspect.score import inspect_text
from nvamp.study.losses import MODES, Loss, parse_losses
from nvamp.study.models import model_fingerprint
from nvamp.study.training import Recipe, Run

# Conditions that are kept as a hash, which would mean nothing to a reader.
HASHED = ("text", "content of --model")

Json = dict[str, Any]


class Store:
    """The finished runs of a study in a directory; each run is written completely or not at all."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def check(self) -> Json | None:
        """The conditions of the study in the directory; `None` if the directory is empty or missing.

        Raises:
            StudyError: the directory holds something else.
        """
        try:
            return self._conditions() if self.out.exists() and any(self.out.iterdir()) else None
        except OSError as error:
            raise StudyError(f"--out {self.out}: {error.strerror}") from error

    def claim(self, conditions: Json, overwrite: bool) -> None:
        """Make the directory this study's.

        Raises:
            StudyError: it holds something else; or without `overwrite`, runs made under other conditions.
        """
        kept = self.check()
        if kept and not overwrite and (changed := _changed(kept, conditions, "now", "has changed since")):
            raise StudyError(
                f"{self.out} holds runs of another study: {changed}; "
                "choose another --out, or start over with --overwrite"
            )
        try:
            if overwrite:
                self._clear()
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self._settings, conditions)  # first: this file is what marks a directory as a study's
            for part in ("runs", "models", "inspect"):
                (self.out / part).mkdir(exist_ok=True)
        except OSError as error:
            raise StudyError(f"--out {self.out}: {error.strerror}") from error

    def join(self, conditions: Json, rank: int) -> None:
        """Check that the first rank has claimed the directory under this rank's conditions.

        Raises:
            StudyError: the conditions differ, or the first rank has claimed another directory.
        """
        if not self._settings.exists():
            raise StudyError(f"--out {self.out}: not the directory of the first rank")
        on = f"on rank {rank}"
        if changed := _changed(self._conditions(), conditions, f"{on}:", f"is another one {on}"):
            raise StudyError(f"the ranks differ: {changed}")

    @property
    def _settings(self) -> Path:
        return self.out / "settings.json"

    def _conditions(self) -> Json:
        """The conditions of the study in the directory; a `StudyError` if there is none."""
        kept = _read_json(self._settings) if self._settings.is_file() else {}
        if not {"nvamp", "--steps"} <= kept.keys():
            raise StudyError(f"--out {self.out}: not empty, and not a study's directory: choose another")
        return kept

    def _clear(self) -> None:
        """Remove the files that a study writes, and nothing else."""
        for part in ("runs", "models", "inspect"):
            for path in (self.out / part).glob("*"):
                if re.fullmatch(r".+-seed\d+(\.json|\.npy|\.html)?(\.part)?", path.name):
                    remove(path)
        for name in ("results.json", "report.html"):
            (self.out / name).unlink(missing_ok=True)

    def load(self, loss: Loss, seed: int) -> Json | None:
        """The record of a run; `None` if the run is not finished or its token losses are gone."""
        path = self._record(loss, seed)
        return _read_json(path) if path.exists() and self._nll(loss, seed).exists() else None

    def nll(self, loss: Loss, seed: int) -> NDArray[np.float32]:
        """The held-out token losses (nats) of a finished run, [tokens]."""
        path = self._nll(loss, seed)
        try:
            return np.asarray(np.load(path))
        except (OSError, ValueError, EOFError) as error:
            raise StudyError(f"{path} is damaged: delete it to train this run again") from error

    def save(self, loss: Loss, seed: int, record: Json, run: Run, corpus: Corpus) -> None:
        """Keep a finished run. The record is written last: once it is there, the run is complete.

        A run from the first seed that did not diverge includes a page of held-out text under its model, with
        the weights of its loss and of NVAMP in each gradient mode.
        """
        with replacing(self.out / "models" / f"{loss.slug}-seed{seed}") as directory:
            run.model.save_pretrained(directory)
            corpus.tokenizer.save_pretrained(directory)
        with replacing(self._nll(loss, seed)) as path, path.open("wb") as file:
            np.save(file, run.nll)
        if seed == 0 and not run.diverged:
            found, losses = None, [loss, *(mode for mode in parse_losses(MODES) if mode.name != loss.name)]
            with suppress(StudyError):  # a text of one token, say, has no page, and the run is fine
                found = inspect_text(run.model, corpus.tokenizer, corpus.excerpt, losses)
            if found:
                write_page(found, f"{loss.name}, seed 0", "Held-out text", self.page(loss))
        write_json(self._record(loss, seed), record)

    def page(self, loss: Loss) -> Path:
        """The path of the page of held-out text under the loss's model from seed 0; it may not exist."""
        return self.out / "inspect" / f"{loss.slug}-seed0.html"

    def _record(self, loss: Loss, seed: int) -> Path:
        return self.out / "runs" / f"{loss.slug}-seed{seed}.json"

    def _nll(self, loss: Loss, seed: int) -> Path:
        return self._record(loss, seed).with_suffix(".npy")


def conditions(recipe: Recipe, corpus: Corpus) -> Json:
    """Everything that must be the same for runs to be comparable."""
    installed = versions()
    return {
        "--steps": recipe.steps,
        "--batch-size": recipe.batch_size,
        "--lr": recipe.lr,
        "--noise": recipe.noise,
        "--model": recipe.model,
        "content of --model": recipe.model and model_fingerprint(recipe.model),
        "text": corpus.fingerprint(),
        **{name: installed[name] for name in ("nvamp", "torch", "transformers", "device")},
    }


def _changed(kept: Json, asked: Json, now: str, other: str) -> str:
    """The conditions that differ, in words; empty if none do."""
    return ", ".join(
        f"the {name} {other}" if name in HASHED else f"{name} {kept.get(name)} ({now} {asked[name]})"
        for name in asked
        if kept.get(name) != asked[name]
    )


def versions() -> Json:
    """The versions and the machine that a study runs on."""
    cuda = torch.cuda.is_available()
    return {
        "nvamp": nvamp.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def kept_runs(out: Path) -> int:
    """The number of finished runs in a directory."""
    return len(list((out / "runs").glob("*.json")))


def finite(value: Any) -> Any:
    """`value` with `None` in place of every float that JSON cannot represent."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value if not isinstance(value, float) or np.isfinite(value) else None


def _read_json(path: Path) -> Json:
    """The object in a JSON file; a `StudyError` if the file holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise StudyError(f"{path} is damaged: expected a JSON object, got {type(found).__name__}")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(finite(value), indent=1, allow_nan=False) + "\n")
