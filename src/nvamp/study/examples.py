"""From the rows of a dataset to blocks: which are held out, what of them is learned, what is left out."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from nvamp.study import StudyError
from nvamp.study.chats import TEMPLATE, ChatError, Encoded, encode, prefix_of
from nvamp.study.corpus import (
    HELD_OUT_SHARE,
    HELD_OUT_TOKENS,
    Corpus,
    Prompt,
    excerpt_of,
    train_tokenizer,
)
from nvamp.study.files import visible
from nvamp.study.packing import pack_examples
from nvamp.study.rows import Chat, Example, Pair, Rows
from nvamp.study.sources import MAX_CHARACTERS, NAMED, shuffled


class _Encoder:
    """Turns examples into tokens, at most `sequence` each, and counts those that it cuts or leaves out."""

    def __init__(self, tokenizer: Any, sequence: int, completions: bool, special: bool) -> None:
        self.cut = 0
        self.dropped: Counter[str] = Counter()
        self._tokenizer = tokenizer
        self._sequence = sequence
        self._options = completions, special

    def encode(self, examples: Sequence[Example]) -> list[tuple[Encoded, bool]]:
        """The examples that have something to learn, and whether each is whole."""
        kept = []
        for example in examples:
            try:
                found = encode(example, self._tokenizer, *self._options)
            except ChatError as error:
                self.dropped[visible(str(error))] += 1
                continue
            whole = len(found.ids) <= self._sequence
            if any(found.learned[1 : self._sequence]):
                self.cut += not whole
                cut = found._replace(ids=found.ids[: self._sequence], learned=found.learned[: self._sequence])
                kept.append((cut, whole))
            else:
                self.dropped[f"no token to learn in the first {self._sequence}"] += 1
        return kept


def build_examples(
    rows: Rows,
    source: str,
    sequence: int,
    tokenizer: Any = None,
    completions: bool = True,
    special: bool = False,
    together: bool = True,
) -> Corpus:
    """Split examples, turn them into tokens and put them whole into blocks of `sequence` tokens.

    A tenth of the examples is held out. Examples longer than a block are cut at its end. An example that is
    among those held out is not trained on.

    Args:
        rows: of examples, in any order.
        tokenizer: a `PreTrainedTokenizerBase`, which gets a chat template if it has none; `None` to train
            one.
        completions: whether only completions and turns of an assistant are learned, or else all tokens.
        special: whether special tokens that an example spells out are such, or else text.
        together: whether a block may hold several examples, or else one and padding.
    """
    dropped = Counter(rows.dropped)
    examples = _bounded(shuffled([*rows.examples]))
    if beyond := len(rows.examples) - len(examples):
        dropped[f"beyond {MAX_CHARACTERS:,} characters"] = beyond
    held_out_count = max(1, round(HELD_OUT_SHARE * len(examples)))
    held_out, train = examples[:held_out_count], examples[held_out_count:]
    if tokenizer is None:
        tokenizer = train_tokenizer([_words(example) for example in train])
    if not tokenizer.is_fast:
        raise StudyError("expected a fast tokenizer, which knows the place of each token in a text")
    if not tokenizer.chat_template:
        tokenizer.chat_template = TEMPLATE
    encoder = _Encoder(tokenizer, sequence, completions, special)
    evaluation, training = encoder.encode(held_out), encoder.encode(train)
    seen = {tuple(example.ids) for example, _ in evaluation}
    new = [example for example, _ in training if tuple(example.ids) not in seen]
    if same := len(training) - len(new):
        encoder.dropped["the same as one held out"] = same
    dropped.update(encoder.dropped)
    counts = {
        "examples": len(new),
        "held_out_examples": len(evaluation),
        "cut_examples": encoder.cut,
        "dropped_examples": dict(dropped),
    }
    source += _told(counts, sequence)
    if not new or not evaluation:
        raise StudyError(f"too few examples: {source}")
    padding = next(
        (index for index in (tokenizer.pad_token_id, tokenizer.eos_token_id) if index is not None), 0
    )
    blocks, held_out_blocks = (
        pack_examples(some, sequence, padding, together)
        for some in (new, [example for example, _ in evaluation])
    )
    return Corpus(
        tokenizer,
        blocks,
        held_out_blocks.spread(HELD_OUT_TOKENS // sequence),
        source,
        excerpt_of([_spelled(example.ids, tokenizer) for example, _ in evaluation]),
        tuple(_prompt(example, tokenizer) for example, whole in evaluation if whole and example.answer),
        counts,
        special_tokens=True,
    )


def _prompt(example: Encoded, tokenizer: Any) -> Prompt:
    """The prompt of an example that has one."""
    answer = example.ids[example.answer : example.end]
    special = answer and not tokenizer.decode(answer[-1:], skip_special_tokens=True)
    text = tokenizer.decode(answer, skip_special_tokens=True)
    return Prompt(example.ids[: example.answer], text, answer[-1] if special else None)


def _spelled(ids: list[int], tokenizer: Any) -> str:
    """The text of an example, special tokens spelled out, without the prefix of the tokenizer."""
    prefix = prefix_of(tokenizer)
    text: str = tokenizer.decode(ids[len(prefix) :] if ids[: len(prefix)] == prefix else ids)
    return text


def _bounded(examples: list[Example]) -> list[Example]:
    """The first examples, of `MAX_CHARACTERS` in total."""
    left = MAX_CHARACTERS
    for index, example in enumerate(examples):
        left -= example.characters
        if left < 0:
            return examples[:index]
    return examples


def _words(example: Example) -> str:
    """An example as text to train a tokenizer on, in the layout of the template that it will have."""
    match example:
        case Pair(prompt, completion):
            return prompt + completion
        case Chat(messages):
            return "".join(f"### {message['role']}\n{message['content']}\n" for message in messages)


def _told(counts: dict[str, Any], sequence: int) -> str:
    """How many examples there are, and what was cut and dropped, in words."""
    told = f"{counts['examples'] + counts['held_out_examples']:,} examples"
    if cut := counts["cut_examples"]:
        told += f", {cut:,} of them cut at {sequence} tokens"
    if dropped := Counter(counts["dropped_examples"]):
        reasons = [f"{count:,} {reason}" for reason, count in dropped.most_common(NAMED)]
        more = ["..."] if len(dropped) > NAMED else []
        told += f"; {dropped.total():,} dropped: {', '.join(reasons + more)}"
    return f" ({told})"
