"""The directory of a study: its conditions and its finished runs."""

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

import nvamp
from nvamp.study import StudyError
from nvamp.study.corpus import Corpus
from nvamp.study.files import hold, remove, replacing
from nvamp.study.inspect.inputs import REPORT
from nvamp.study.inspect.page import Inspected, write_page
from nvamp.study.inspect.score import inspect_text
from nvamp.study.losses import MODES, Loss, parse_losses
from nvamp.study.models import model_fingerprint
from nvamp.study.training import Recipe, Run

# Conditions that are kept as a hash, which would mean nothing to a reader.
HASHED = ("text", "content of --model")
_CUT_BY = {"--sequence", "--model", "content of --model"}  # what a text becomes tokens and blocks by
SETTINGS = "settings.json"  # the file that marks a directory as a study's
LOCK = ".nvamp.lock"
_MARKS = {"nvamp", "--steps"}  # conditions of every study
# A process that is killed before it has written the first file leaves no more than these.
_BEFORE = {f"{SETTINGS}.part", LOCK}

Json = dict[str, Any]


class Store:
    """The finished runs of a study in a directory; each run is written completely or not at all.

    The process that claims the directory holds it until the `with` block of the store ends.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._held = ExitStack()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()

    def check(self) -> Json | None:
        """The conditions of the study in the directory; `None` if the directory is empty or missing.

        Raises:
            StudyError: the directory holds something else.
        """
        try:
            names = {path.name for path in self.out.iterdir()} if self.out.exists() else set()
        except OSError as error:
            raise StudyError(f"--out {self.out}: {error.strerror}") from error
        return self._conditions() if names - _BEFORE else None

    def claim(self, conditions: Json, overwrite: bool) -> None:
        """Make the directory this study's.

        Raises:
            StudyError: it holds something else, or another process holds it; or without `overwrite`, it has
                runs made under other conditions.
        """
        self.check()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(hold(self.out / LOCK))
        except OSError as error:
            raise StudyError(f"--out {self.out}: {error.strerror}") from error
        kept = self.check()  # again: another process may have held it so far
        if kept and not overwrite and (changed := _changed(kept, conditions, "now", "has changed since")):
            raise StudyError(
                f"{self.out} holds runs of another study: {changed}; "
                "choose another --out, or start over with --overwrite"
            )
        try:
            if overwrite:
                self._clear()
            write_json(self._settings, conditions)  # first: without it the rest is not a study's
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
        return self.out / SETTINGS

    def _conditions(self) -> Json:
        """The conditions of the study in the directory; a `StudyError` if there is none."""
        kept = _read_json(self._settings) if self._settings.is_file() else {}
        if not kept.keys() >= _MARKS:
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
        """The record of a run; `None` if the run is not finished or its token losses are gone.

        Raises:
            StudyError: the record or the token losses are not what was saved.
        """
        found = self._read(loss, seed)
        return found and found[0]

    def kept(self, loss: Loss, seed: int) -> tuple[Json, NDArray[np.float32]]:
        """The record of a finished run and its held-out token losses in nats, [tokens].

        Raises:
            StudyError: the run is gone, or is not what was saved.
        """
        found = self._read(loss, seed)
        if found is None:
            raise StudyError(f"{self.out}: the run of {loss.name} from seed {seed} has gone missing")
        return found

    def _read(self, loss: Loss, seed: int) -> tuple[Json, NDArray[np.float32]] | None:
        path, nll_path = self._record(loss, seed), self._nll(loss, seed)
        if not (path.exists() and nll_path.exists()):
            return None
        try:
            record = _read_json(path)
            intact = record.pop("checksum", None) == _checksum(_canonical(record))
        except StudyError:
            intact = False
        if not intact:
            raise _damaged(path)
        saved = record.pop("nll")
        try:
            content = nll_path.read_bytes()
        except OSError as error:
            raise _damaged(nll_path) from error
        if _checksum(content) != saved["checksum"]:  # before NumPy believes what the header declares
            raise _damaged(nll_path)
        nll = np.load(BytesIO(content))
        if nll.dtype != np.float32 or nll.shape != (saved["tokens"],):
            raise _damaged(nll_path)
        return record, nll

    def save(self, loss: Loss, seed: int, record: Json, run: Run, corpus: Corpus) -> None:
        """Keep a finished run. The record is written last: once it is there, the run is complete.

        A run from the first seed that did not diverge includes a page of held-out text under its model, with
        the weights of its loss and of NVAMP in each gradient mode.

        Raises:
            StudyError: a file cannot be written; the message includes the number of runs that are kept.
        """
        with self._counting_kept():
            self._record(loss, seed).unlink(missing_ok=True)
            self._save_model(loss, seed, run, corpus)
            buffer = BytesIO()
            np.save(buffer, run.nll)
            with replacing(self._nll(loss, seed)) as path:
                path.write_bytes(buffer.getvalue())
            if seed == 0 and not run.diverged:
                self._save_page(loss, run, corpus)
            saved = {"tokens": len(run.nll), "checksum": _checksum(buffer.getvalue())}
            record = finite({**record, "nll": saved})
            write_json(self._record(loss, seed), {**record, "checksum": _checksum(_canonical(record))})

    def save_results(self, results: Json) -> None:
        """Write results.json; a `StudyError` as for `save`."""
        with self._counting_kept():
            write_json(self.out / "results.json", results)

    def reported(self) -> set[tuple[str, int]]:
        """The loss and the seed of each run in results.json; empty if that is missing or damaged."""
        with suppress(StudyError, KeyError, TypeError):
            return {(run["loss"], run["seed"]) for run in _read_json(self.out / "results.json")["runs"]}
        return set()

    @contextmanager
    def _counting_kept(self) -> Iterator[None]:
        try:
            yield
        except StudyError as error:
            kept = kept_runs(self.out)
            raise StudyError(f"{error}; {kept} finished runs are kept in {self.out}") from error

    def _save_model(self, loss: Loss, seed: int, run: Run, corpus: Corpus) -> None:
        with replacing(self.out / "models" / f"{loss.slug}-seed{seed}") as directory:
            try:
                run.model.save_pretrained(directory)
                corpus.tokenizer.save_pretrained(directory)
            except OSError:
                raise
            except Exception as error:  # the writers in Rust have errors of their own for a full disk
                raise OSError(str(error).partition("\n")[0]) from error

    def _save_page(self, loss: Loss, run: Run, corpus: Corpus) -> None:
        modes = (mode for mode in parse_losses(MODES) if str(mode.spec) != str(loss.spec))
        found, losses = None, [loss, *modes]
        with suppress(StudyError):  # a text of one token, say, has no page, and the run is fine
            found = inspect_text(
                run.model, corpus.tokenizer, corpus.excerpt, losses, special_tokens=corpus.special_tokens
            )
        if found:
            it = Inspected(f"{loss.name}, seed 0", found, str(loss.spec), f"../{REPORT}")
            write_page([it], "Held-out text", self.page(loss))

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
        "--accumulate": recipe.accumulate,
        "--bf16": recipe.bf16,
        "--gradient-checkpointing": recipe.gradient_checkpointing,
        "--lora": recipe.lora and str(recipe.lora),
        "--sequence": corpus.train.shape[1],
        "--noise": recipe.noise,
        "--generate": recipe.generate,
        "--model": recipe.model,
        "content of --model": recipe.model and model_fingerprint(recipe.model),
        "text": corpus.fingerprint(),
        "peft": recipe.lora and installed["peft"],
        **{name: installed[name] for name in ("nvamp", "torch", "transformers", "device")},
    }


def _changed(kept: Json, asked: Json, now: str, other: str) -> str:
    """The conditions that differ, in words; empty if none do."""
    differ = [name for name in asked if kept.get(name) != asked[name]]
    if not _CUT_BY.isdisjoint(differ):
        differ = [name for name in differ if name != "text"]  # as tokens it differs, whatever was read
    return ", ".join(
        f"the {name} {other}" if name in HASHED else f"{name} {kept.get(name)} ({now} {asked[name]})"
        for name in differ
    )


def versions() -> Json:
    """The versions and the machine that a study runs on."""
    cuda = torch.cuda.is_available()
    return {
        "nvamp": nvamp.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": version("peft") if find_spec("peft") else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def is_study(directory: Path) -> bool:
    """Whether a directory is a study's."""
    try:
        return _read_json(directory / SETTINGS).keys() >= _MARKS
    except StudyError:
        return False


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


def _canonical(record: Json) -> bytes:
    return json.dumps(record, sort_keys=True).encode()


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _damaged(path: Path) -> StudyError:
    return StudyError(f"{path} is damaged: delete it to train this run again")


def _read_json(path: Path) -> Json:
    """The object in a JSON file; a `StudyError` if the file holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StudyError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise StudyError(f"{path} is damaged: expected a JSON object, got {type(found).__name__}")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(finite(value), indent=1, allow_nan=False) + "\n")
