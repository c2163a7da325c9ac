"""The held-out text of a corpus, token by token: of which document, and of which part of Python's grammar."""

import keyword
import tokenize
from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvamp.study.corpus import HELD_OUT_TOKENS, Corpus, split
from nvamp.study.packing import pack, spread

KINDS = (
    "layout",
    "operator",
    "keyword",
    "identifier",
    "number",
    "string",
    "docstring",
    "comment",
    "unparsed",
)
_TYPES = {
    tokenize.OP: "operator",
    tokenize.NUMBER: "number",
    tokenize.COMMENT: "comment",
    tokenize.STRING: "string",
    # Python 3.12 takes f-strings apart.
    **{
        getattr(tokenize, name): "string"
        for name in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")
        if hasattr(tokenize, name)
    },
}
# Tokens after which a string is a statement of its own: a docstring, or as good as one.
_STARTS = (
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.NL,
    tokenize.COMMENT,
    tokenize.ENCODING,
)


def held_out_labels(
    corpus: Corpus, documents: Sequence[str], label: Callable[[int, str, Any], Sequence[int]]
) -> NDArray[np.int64]:
    """A number for each held-out label that `corpus` evaluates, [tokens].

    Args:
        documents: those that `corpus` was built from, in its order.
        label: from the index of a held-out document, its text and its encoding by the tokenizer, a number for
            each token and one for the end-of-text token.
    """
    sequence = corpus.held_out.shape[1]
    ids, labels = [], []
    for index, document in enumerate(split(documents)[1]):
        if document:
            encoding = corpus.tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)
            ids.append([*encoding["input_ids"], corpus.tokenizer.eos_token_id])
            labels.append(list(label(index, document, encoding)))
    limit = HELD_OUT_TOKENS // sequence
    if not bool((spread(pack(ids, sequence), limit) == corpus.held_out).all()):
        raise ValueError("documents: expected those that the corpus was built from, in its order")
    packed: NDArray[np.int64] = spread(pack(labels, sequence), limit)[:, 1:].reshape(-1).numpy()
    return packed


def document_of(index: int, document: str, encoding: Any) -> list[int]:
    """For `held_out_labels`: the index of the document."""
    return [index] * (len(encoding["input_ids"]) + 1)


def kind_of(index: int, document: str, encoding: Any) -> list[int]:
    """For `held_out_labels`: the index in `KINDS` of each token: of its first character that is no space."""
    kinds = character_kinds(document)
    found = []
    for start, end in encoding["offset_mapping"]:
        text = document[start:end]
        first = start + len(text) - len(text.lstrip()) if text.strip() else start
        found.append(int(kinds[first]))
    return [*found, KINDS.index("layout")]


def character_kinds(document: str) -> NDArray[np.int8]:
    """The index in `KINDS` of each character of Python source; all are unparsed if it is no such source."""
    kinds = np.full(len(document) + 1, KINDS.index("layout"), dtype=np.int8)
    lines = np.cumsum([0, *(len(line) for line in StringIO(document))])
    try:
        for name, (row, column), (end_row, end_column) in _python_tokens(document):
            kinds[lines[row - 1] + column : lines[end_row - 1] + end_column] = KINDS.index(name)
    except (tokenize.TokenError, SyntaxError):
        kinds[:] = KINDS.index("unparsed")
    return kinds


def _python_tokens(document: str) -> Iterator[tuple[str, tuple[int, int], tuple[int, int]]]:
    """Kind, begin and end (row from 1, column from 0) of each of Python's tokens that is not layout."""
    before = tokenize.ENCODING
    for token in tokenize.generate_tokens(StringIO(document).readline):
        name = _TYPES.get(token.type)
        if token.type == tokenize.NAME:
            name = "keyword" if keyword.iskeyword(token.string) else "identifier"
        if token.type == tokenize.STRING and before in _STARTS:
            name = "docstring"
        if name is not None:
            yield name, token.start, token.end
        before = token.type
