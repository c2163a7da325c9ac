"""The page of a text under a model: from the text file to the HTML file."""

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from inspect import getdoc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from nvamp.objectives import Objective
from nvamp.study import StudyError
from nvamp.study.files import replacing, visible
from nvamp.study.inspect.score import Inspection, Progress, inspect_text
from nvamp.study.inspect.weights import Term
from nvamp.study.losses import parse_losses
from nvamp.study.models import load_model, load_tokenizer

# The page holds the −ln p of alternatives in steps of this many nats, up to 65,535 of them: p is exact to one
# part in 8,000, down to 1e-7.
STEP = 1 / 4096
FEW = 1 / 3  # numbers that differ from the usual one are listed if they are at most this share of all


def inspect_file(name: str, path: Path, out: Path, losses: Sequence[str], progress: Progress) -> Inspection:
    """Write the page of the text in `path` under the model `name` (a directory or hub id) to `out`.

    Args:
        losses: texts of the losses whose weights the page shows, at least one.

    Raises:
        StudyError: a loss, the text or the model cannot be read, or the page cannot be written.
    """
    weighed = parse_losses(losses)
    text = read_text(path)
    _check_output(out, path)
    model, tokenizer = load_model(name), load_tokenizer(name)
    if torch.cuda.is_available():
        model.cuda()
    try:
        found = inspect_text(model, tokenizer, text, weighed, progress)
    except StudyError as error:
        raise StudyError(f"--text {path}: {error}") from error
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"--out {out}: {error.strerror}") from error
    write_page(found, Path(name).name or name, path.name, out)
    return found


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


def write_page(found: Inspection, model: str, name: str, path: Path) -> None:
    """Write the page of the text `name` under the model `model` to `path`."""
    here = Path(__file__)
    script = here.with_suffix(".js").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    page = environment.from_string(here.with_suffix(".html").read_text(encoding="utf-8")).render(
        model=visible(model),
        name=visible(name),
        found=found,
        statistics={key: float(x) for key, x in found.statistics._asdict().items()},
        formulas={
            type(objective).__name__: formula(objective)
            for objective in (weights.spec.objective for weights in found.weights)
        },
        data=page_data(found),
        script=script,
        # The page allows no other script than this one: its texts cannot run, whatever they hold.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    with replacing(path) as temporary:
        temporary.write_bytes(page.encode("utf-8"))


def formula(objective: Objective) -> str:
    """What the docstring of an objective says before its arguments, where the formula is."""
    return re.split(r"\n\n(?:Args|Raises|References|Example):", getdoc(type(objective)) or "")[0]


def page_data(found: Inspection) -> dict[str, Any]:
    """The data that the page's script reads, ready for JSON."""
    tokens, scores = found.tokens, found.scores
    used = np.array(list(found.pieces), np.int64)  # in ascending order
    steps = np.clip(np.rint(scores.alternative_nll / STEP), 0, 2**16 - 1)
    statistics = {key: float(x) for key, x in found.statistics._asdict().items()}
    z = (scores.nll.astype(np.float64) - statistics["mean"]) / statistics["std"]
    return {
        "text": tokens.text,
        "lengths": typed_array(np.diff(_utf16(tokens.text)[tokens.ends], prepend=0)),
        "pieces": list(found.pieces.values()),
        "tokens": typed_array(np.searchsorted(used, tokens.ids)),
        "nll": typed_array(scores.nll),
        "alternatives": typed_array(np.searchsorted(used, scores.alternatives)),
        "alternativeSteps": typed_array(steps.astype(np.uint16)),
        "step": STEP,
        "z": typed_array(z.astype(np.float32)),
        "statistics": statistics,
        "losses": [
            {"name": str(weights.spec), "terms": [_term_data(term) for term in weights.terms]}
            for weights in found.weights
        ],
    }


def _term_data(term: Term) -> dict[str, Any]:
    """A term for the page. Its weights are relative to cross-entropy, which gives each of N tokens 1/N."""
    relative = sparse_array((term.weights * len(term.weights)).astype(np.float32))
    return {**term._asdict(), "weights": relative}


def _utf16(text: str) -> NDArray[np.int64]:
    """[characters + 1] where each character begins, and the end, in the UTF-16 units of JavaScript."""
    characters = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return np.concatenate(([0], np.cumsum(1 + (characters > 0xFFFF))))


def typed_array(numbers: NDArray[Any]) -> dict[str, str]:
    """A JavaScript typed array: float32, or non-negative integers in the fewest bytes that hold them."""
    if numbers.dtype == np.float32:
        kind, dtype = "Float32Array", "<f4"
    else:
        size = next(size for size in (1, 2, 4) if numbers.max(initial=0) < 256**size)
        kind, dtype = f"Uint{8 * size}Array", f"<u{size}"
    return {"type": kind, "base64": base64.b64encode(numbers.astype(dtype).tobytes()).decode()}


def sparse_array(numbers: NDArray[np.float32]) -> dict[str, Any]:
    """Numbers of which many may be the same: that one, and where others stand, if they are few; or all."""
    usual = np.sort(numbers)[len(numbers) // 2]
    others = np.flatnonzero(numbers != usual)
    if len(others) > FEW * len(numbers):
        return {"all": typed_array(numbers)}
    return {"usual": float(usual), "at": typed_array(others), "others": typed_array(numbers[others])}
