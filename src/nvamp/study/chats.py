"""Prompts, completions and chats as tokens, and which of these a model learns."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from nvamp.study.rows import Chat, Example, Message, Pair

# The chat template of tokenizers that have none. A line names the role, and the end-of-text token ends a turn
# of the assistant. (Jinja drops a newline that follows a tag, so it is written as an expression.)
TEMPLATE = """\
{%- for message in messages %}
{{- '### ' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}
{%- else %}{{ message['content'] }}
{%- endif %}{{ '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '### assistant\\n' }}
{%- endif %}"""
_MARKS_ANSWERS = re.compile(r"{%-?\s*generation\s*-?%}")
_PRIVATE = range(0xE000, 0xF900)  # characters without a meaning, which no tokenizer joins to others


class Encoded(NamedTuple):
    """An example as tokens.

    Attributes:
        ids: the tokens.
        learned: of each token, whether it is to be learned.
        answer: where the last completion, or turn of the assistant, begins: the tokens before it ask for it.
        end: where it ends; `None` if nothing follows.
    """

    ids: list[int]
    learned: list[bool]
    answer: int
    end: int | None = None


class ChatError(Exception):
    """A chat that the template of the tokenizer has no place for; the message is a reason in a few words."""


def prefix_of(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer puts before every text; those it puts after one are not among them."""
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    around: list[int] = tokenizer("a")["input_ids"]
    starts = (at for at in range(len(around)) if around[at : at + len(alone)] == alone)
    return around[: next(starts, 0)]


def end_of(tokenizer: Any) -> list[int]:
    """The end-of-text token, if the tokenizer has one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def encode(example: Example, tokenizer: Any, completions: bool, special: bool) -> Encoded:
    """The tokens of an example.

    Args:
        tokenizer: a fast `PreTrainedTokenizerBase`, with a chat template for chats.
        completions: whether only completions and turns of an assistant are learned, or else all tokens.
        special: whether special tokens that the example spells out are such, or else text.

    Raises:
        ChatError: the chat template does not take the messages.
    """
    if isinstance(example, Pair):
        encoded = _encode_pair(example, tokenizer, special)
    else:
        encoded = _encode_chat(example, tokenizer, special)
    if completions:
        return encoded
    prefix = prefix_of(tokenizer)
    given = len(prefix) if encoded.ids[: len(prefix)] == prefix else 0
    return encoded._replace(learned=[index >= given for index in range(len(encoded.ids))])


def _encode_pair(pair: Pair, tokenizer: Any, special: bool) -> Encoded:
    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=not special)[
            "input_ids"
        ]
        return found

    whole, prefix = ids(pair.prompt + pair.completion), prefix_of(tokenizer)
    # A token that lies on both sides of the boundary belongs to the completion.
    prompt = len(prefix) + _shared(ids(pair.prompt) if pair.prompt else [], whole)
    tokens = [*prefix, *whole, *end_of(tokenizer)]
    return Encoded(tokens, [index >= prompt for index in range(len(tokens))], prompt)


def _encode_chat(chat: Chat, tokenizer: Any, special: bool) -> Encoded:
    messages, tools, mark = chat.messages, chat.tools, ""
    if not special:
        (messages, tools), mark = _protected((messages, tools), tokenizer.all_special_tokens)

    def render(count: int, ask: bool = False) -> str:
        """The first messages as text, and if `ask` what precedes an answer to them."""
        if not count:
            return ""
        rendered: str = tokenizer.apply_chat_template(
            list(messages[:count]), tools=tools, tokenize=False, add_generation_prompt=ask
        )
        return rendered

    try:
        text = render(len(messages))
        if chat.completion == 0 and _MARKS_ANSWERS.search(tokenizer.get_chat_template()):
            found = tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"return_offsets_mapping": True},
            )
            learned = list(map(bool, found["assistant_masks"]))
        else:
            turns = _turns(chat.completion, messages, text, render)
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            learned = [
                any(begin < turn_end and end > turn for turn, turn_end in turns)
                for begin, end in found["offset_mapping"]
            ]
    except ChatError:
        raise
    except Exception as error:  # the code of a template can raise any error
        raise ChatError(f"refused by the chat template: {str(error).partition(chr(10))[0]}") from error
    kept = [
        (index, learn)
        for index, learn, (begin, end) in zip(
            found["input_ids"], learned, found["offset_mapping"], strict=True
        )
        if not mark or mark not in text[begin:end]
    ]
    # Templates of others write the prefix themselves.
    prefix = prefix_of(tokenizer) if tokenizer.chat_template == TEMPLATE else []
    ids = [*prefix, *(index for index, _ in kept)]
    learned = [*(False for _ in prefix), *(learn for _, learn in kept)]
    return Encoded(ids, learned, *_last_run(learned))


def _protected(chat: Any, special: Sequence[str]) -> tuple[Any, str]:
    """The strings of a chat, at any depth, with a mark inside every special token that they spell out.

    The mark, returned too, is a character that the chat does not have; a token of it is to be left out. It is
    empty if no special token is spelled out.
    """
    text = "".join(_strings(chat))
    spelled = [token for token in special if token in text]
    if not spelled:
        return chat, ""
    mark = next(chr(code) for code in _PRIVATE if chr(code) not in text)
    # Its first character alone is matched, because the rest may begin another one.
    found = re.compile("|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in spelled))

    def protect(value: Any) -> Any:
        if isinstance(value, str):
            return found.sub(lambda match: match[0] + mark, value)
        if isinstance(value, Mapping):
            return {key: protect(inner) for key, inner in value.items()}
        return [protect(inner) for inner in value] if isinstance(value, list | tuple) else value

    return protect(chat), mark


def _strings(value: Any) -> Iterator[str]:
    """All strings in a value, but keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _turns(
    first: int, messages: Sequence[Message], text: str, render: Callable[[int, bool], str]
) -> list[tuple[int, int]]:
    """Where in the text the assistant's turns begin and end, from the message `first` on.

    A turn is what its message adds to the text of those before it. Some templates write the last turn
    otherwise than one in the middle: such a turn is where its content is.
    """
    turns: list[tuple[int, int]] = []
    at = 0
    for index in range(first, len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        content = messages[index]["content"].strip()
        before, through = render(index, True), render(index + 1, False)
        begin = len(before) if text.startswith(before) else text.find(content, at)
        at = len(through)
        if not text.startswith(through):
            begins, close = text.find(content, begin), through[through.rfind(content) + len(content) :]
            if begin < 0 or begins < 0 or not content:
                raise ChatError("the chat template changes the assistant's turns")
            at = begins + len(content)
            at += _shared(text[at:], close)
        turns.append((begin, at - len(text[begin:at]) + len(text[begin:at].rstrip())))
    return turns


def _shared(one: Sequence[object], other: Sequence[object]) -> int:
    """How many elements two sequences have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _last_run(learned: Sequence[bool]) -> tuple[int, int]:
    """Where the last run of tokens to learn begins and ends; both are 0 if there is none."""
    end = len(learned)
    while end and not learned[end - 1]:
        end -= 1
    begin = end
    while begin and learned[begin - 1]:
        begin -= 1
    return begin, end
