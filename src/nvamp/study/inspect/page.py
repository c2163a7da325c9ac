"""The page of a text under one model or several: from the text file to the HTML file."""

import base64
import hashlib
import re
from collections.abc import Sequence
from inspect import getdoc
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray

from nvamp.objectives import Objective
from nvamp.study import StudyError
from nvamp.study.files import replacing, visible
from nvamp.study.inspect.inputs import Inputs, Subject, link
from nvamp.study.inspect.score import Inspection, Progress, inspect_text
from nvamp.study.inspect.weights import Term
from nvamp.study.losses import MODES, Loss, parse_losses
from nvamp.study.models import load_model, load_tokenizer

# The page holds the −ln p of alternatives in steps of this many nats, up to 65,535 of them: p is exact to one
# part in 8,000, down to 1e-7.
STEP = 1 / 4096
FEW = 1 / 3  # numbers that differ from the usual one are listed if they are at most this share of all


class Inspected(NamedTuple):
    """A model and what it makes of the text.

    Attributes:
        name: what the page calls the model.
        found: its scores of the text.
        trained: the text of the loss that it was trained with; `None` if that is not known.
        report: the address of the report of its study, for a link; `None` if there is none.
    """

    name: str
    found: Inspection
    trained: str | None = None
    report: str | None = None


def inspect_models(inputs: Inputs, losses: Sequence[str], progress: Progress) -> list[Inspected]:
    """Score a text under one model or several, and write the page.

    Args:
        losses: texts of the losses whose weights the page shows; if empty, those that the models were trained
            with, and NVAMP in each gradient mode.

    Raises:
        StudyError: a loss or a model cannot be read, two models do not have the same tokens, or the page
            cannot be written.
    """
    trained = [subject.trained for subject in inputs.subjects if subject.trained]
    weighed = parse_losses(losses or list(dict.fromkeys([*trained, *MODES])))
    inspected: list[Inspected] = []
    for index, subject in enumerate(inputs.subjects):

        def advance(done: int, of: int, before: int = index) -> None:
            progress(before * of + done, len(inputs.subjects) * of)

        found = _inspect(subject, inputs, weighed, advance)
        if inspected and not _same_tokens(found, inspected[0].found):
            first = inputs.subjects[0].source
            raise StudyError(f"--model {subject.source}: its tokens of the text are not those of {first}")
        report = link(subject.report, inputs.out) if subject.report else None
        inspected.append(Inspected(subject.name, found, subject.trained, report))
    try:
        inputs.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"--out {inputs.out}: {error.strerror}") from error
    write_page(inspected, inputs.path.name, inputs.out)
    return inspected


def _inspect(subject: Subject, inputs: Inputs, losses: Sequence[Loss], progress: Progress) -> Inspection:
    """The scores of the text under one model, which is not kept."""
    tokenizer, model = load_tokenizer(subject.source), load_model(subject.source)
    if torch.cuda.is_available():
        model.cuda()
    try:
        return inspect_text(model, tokenizer, inputs.text, losses, progress, inputs.special_tokens)
    except StudyError as error:
        raise StudyError(f"--text {inputs.path}: {error}") from error


def _same_tokens(one: Inspection, other: Inspection) -> bool:
    return np.array_equal(one.tokens.ids, other.tokens.ids) and len(one.scores.nll) == len(other.scores.nll)


def write_page(inspected: Sequence[Inspected], name: str, path: Path) -> None:
    """Write the page of the text `name` under models that have the same tokens to `path`."""
    here = Path(__file__)
    script = here.with_suffix(".js").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    page = environment.from_string(here.with_suffix(".html").read_text(encoding="utf-8")).render(
        inspected=[it._replace(name=visible(it.name)) for it in inspected],
        reports=list(dict.fromkeys(it.report for it in inspected if it.report)),
        name=visible(name),
        formulas={
            type(objective).__name__: formula(objective)
            for objective in (weights.spec.objective for weights in inspected[0].found.weights)
        },
        data=page_data(inspected),
        script=script,
        # The page allows no other script than this one: its texts cannot run, whatever they hold.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    with replacing(path) as temporary:
        temporary.write_bytes(page.encode("utf-8"))


def formula(objective: Objective) -> str:
    """What the docstring of an objective says before its arguments, where the formula is."""
    return re.split(r"\n\n(?:Args|Raises|References|Example):", getdoc(type(objective)) or "")[0]


def page_data(inspected: Sequence[Inspected]) -> dict[str, Any]:
    """The data that the page's script reads, ready for JSON."""
    tokens = inspected[0].found.tokens
    pieces = {index: piece for it in inspected for index, piece in it.found.pieces.items()}
    used = np.array(sorted(pieces), np.int64)
    return {
        "text": tokens.text,
        "lengths": typed_array(np.diff(_utf16(tokens.text)[tokens.ends], prepend=0)),
        "pieces": [pieces[index] for index in used.tolist()],
        "tokens": typed_array(np.searchsorted(used, tokens.ids)),
        "step": STEP,
        "models": [_model_data(it, used) for it in inspected],
    }


def _model_data(it: Inspected, used: NDArray[np.int64]) -> dict[str, Any]:
    """What one model makes of the text; its alternatives are places in `used`."""
    scores = it.found.scores
    steps = np.clip(np.rint(scores.alternative_nll / STEP), 0, 2**16 - 1)
    statistics = {key: float(x) for key, x in it.found.statistics._asdict().items()}
    z = (scores.nll.astype(np.float64) - statistics["mean"]) / statistics["std"]
    return {
        "name": visible(it.name),
        "trained": it.trained,
        "nll": typed_array(scores.nll),
        "alternatives": typed_array(np.searchsorted(used, scores.alternatives)),
        "alternativeSteps": typed_array(steps.astype(np.uint16)),
        "z": typed_array(z.astype(np.float32)),
        "statistics": statistics,
        "losses": [
            {"name": str(weights.spec), "terms": [_term_data(term) for term in weights.terms]}
            for weights in it.found.weights
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
