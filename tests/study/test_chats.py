from copy import deepcopy
from typing import Any

import pytest
from tokenizers import processors

from nvamp.study.chats import TEMPLATE, ChatError, Encoded, encode, prefix_of
from nvamp.study.corpus import train_tokenizer
from nvamp.study.rows import Chat, Pair
from tests.study.conftest import words

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# The last turn begins with an empty thought, as in Qwen3's.
THINKING = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}\
{{ message['content'].strip() + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
INSTRUCTIONS = """\
{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""
GENERATION = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)
MESSAGES = (
    {"role": "system", "content": "alpha"},
    {"role": "user", "content": "beta gamma"},
    {"role": "assistant", "content": "delta loss"},
    {"role": "user", "content": "token"},
    {"role": "assistant", "content": "mean tail"},
)


@pytest.fixture(scope="module")
def trained() -> Any:
    tokenizer = train_tokenizer([words(seed, 150) for seed in range(10)])
    tokenizer.add_special_tokens(
        {"bos_token": "<s>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    )
    return tokenizer


@pytest.fixture
def own(trained: Any) -> Any:
    """A tokenizer with special tokens, to change."""
    return deepcopy(trained)


def with_prefix(tokenizer: Any, template: str) -> None:
    """Let it put special tokens around every text."""
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=template,
        special_tokens=[
            (name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "<|im_start|>", "<|im_end|>")
        ],
    )


def learned(tokenizer: Any, encoded: Encoded) -> list[str]:
    """The runs of tokens to learn, as text."""
    runs: list[list[int]] = []
    before = False
    for index, learn in zip(encoded.ids, encoded.learned, strict=True):
        if learn:
            if not before:
                runs.append([])
            runs[-1].append(index)
        before = learn
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE, ["delta loss<|endoftext|>", "mean tail<|endoftext|>"]),
        (CHATML, ["delta loss<|im_end|>", "mean tail<|im_end|>"]),
        (GENERATION, ["delta loss<|im_end|>", "mean tail<|im_end|>"]),
        (THINKING, ["delta loss<|im_end|>", "<think>\n\n</think>\n\nmean tail<|im_end|>"]),
    ],
    ids=["default", "chatml", "generation", "thinking"],
)
def test_the_assistants_turns_are_learned(own: Any, template: str, expected: list[str]) -> None:
    own.chat_template = template
    encoded = encode(Chat(MESSAGES, 0), own, completions=True, special=False)
    assert learned(own, encoded) == expected
    text = own.apply_chat_template(list(MESSAGES), tokenize=False)
    assert own.decode(encoded.ids) == text
    assert own.decode(encoded.ids[encoded.answer :]).rstrip() == expected[-1]
    # As a prompt with a completion, only the last turn is learned.
    assert learned(own, encode(Chat(MESSAGES, 3), own, completions=True, special=False)) == expected[-1:]
    assert learned(own, encode(Chat(MESSAGES, 3), own, completions=False, special=False)) == [text]


def test_what_follows_the_last_answer_is_none_of_it(own: Any) -> None:
    own.chat_template = CHATML
    for completions in (True, False):
        encoded = encode(Chat((*MESSAGES, MESSAGES[1]), 0), own, completions, special=False)
        assert own.decode(encoded.ids[encoded.answer : encoded.end]) == "mean tail<|im_end|>"


def test_a_template_that_asks_for_no_answer_by_itself(own: Any) -> None:
    own.chat_template = INSTRUCTIONS
    encoded = encode(Chat(MESSAGES[1:], 0), own, completions=True, special=False)
    assert learned(own, encoded) == [" delta loss<|endoftext|>", " mean tail<|endoftext|>"]
    assert encoded.ids[:1] == [own.bos_token_id]
    with pytest.raises(ChatError, match=r"^refused by the chat template: roles must alternate$"):
        encode(Chat(MESSAGES, 0), own, completions=True, special=False)


def test_marked_turns_are_those_found_by_their_differences(own: Any) -> None:
    own.chat_template = CHATML
    differences = encode(Chat(MESSAGES, 0), own, completions=True, special=False)
    own.chat_template = GENERATION
    assert encode(Chat(MESSAGES, 0), own, completions=True, special=False) == differences


def test_a_template_knows_best_what_an_answer_is(own: Any) -> None:
    own.chat_template = GENERATION.replace("+ '<|im_end|>' }}{% endgen", "}}{% endgen")
    assert learned(own, encode(Chat(MESSAGES, 0), own, completions=True, special=False)) == [
        "delta loss",
        "mean tail",
    ]


@pytest.mark.parametrize("template", [TEMPLATE, CHATML, GENERATION, THINKING])
def test_special_tokens_in_a_message_stay_text(own: Any, template: str) -> None:
    spelled = "<|im_end|> <|endoftext|>\n<|im_start|>user"
    messages = ({"role": "user", "content": spelled}, {"role": "assistant", "content": f"a {spelled} b"})
    own.chat_template = template
    plain = encode(Chat(messages, 0), own, completions=True, special=False)
    parsed = encode(Chat(messages, 0), own, completions=True, special=True)
    text = own.apply_chat_template(list(messages), tokenize=False)
    assert own.decode(plain.ids) == own.decode(parsed.ids) == text
    assert parsed.ids == own(text)["input_ids"]
    special = set(own.all_special_ids)
    of_template = encode(
        Chat(({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}), 0), own, True, False
    )
    assert sum(index in special for index in plain.ids) == sum(index in special for index in of_template.ids)
    assert sum(index in special for index in parsed.ids) > sum(index in special for index in plain.ids)
    assert learned(own, plain)[-1].removeprefix("<think>\n\n</think>\n\n").startswith(f"a {spelled} b<|")


@pytest.mark.parametrize("spelled", ["<x>y<", "<x> y", "<x"])
def test_special_tokens_that_overlap_stay_text(own: Any, spelled: str) -> None:
    tokens = ["<x>", ">y<", "<x"]
    own.add_special_tokens({"additional_special_tokens": tokens})
    own.chat_template = CHATML
    chat = Chat(({"role": "user", "content": spelled}, {"role": "assistant", "content": "b"}), 0)
    encoded = encode(chat, own, completions=True, special=False)
    assert not set(own.convert_tokens_to_ids(tokens)) & set(encoded.ids)
    assert own.decode(encoded.ids) == own.apply_chat_template(list(chat.messages), tokenize=False)


def test_a_pair_is_its_text_and_an_end(own: Any) -> None:
    encoded = encode(Pair("alpha be", "ta <|endoftext|>"), own, completions=True, special=False)
    assert own.decode(encoded.ids) == "alpha beta <|endoftext|><|endoftext|>"
    assert encoded.ids.count(own.eos_token_id) == 1
    # " beta" is one token, on both sides of the boundary.
    assert learned(own, encoded) == [" beta <|endoftext|><|endoftext|>"]
    assert own.decode(encoded.ids[: encoded.answer]) == "alpha"
    parsed = encode(Pair("alpha be", "ta <|endoftext|>"), own, completions=True, special=True)
    assert parsed.ids.count(own.eos_token_id) == 2
    everything = encode(Pair("alpha", " beta"), own, completions=False, special=False)
    assert everything == Encoded(own(" alpha beta"[1:])["input_ids"] + [own.eos_token_id], [True] * 3, 1)
    assert encode(Pair("", "alpha"), own, completions=True, special=False).learned == [True, True]


@pytest.mark.parametrize(
    ("around", "prefix"),
    [("$A", []), ("<s> $A", ["<s>"]), ("<s> <|im_start|> $A <|im_end|>", ["<s>", "<|im_start|>"]), ("$A <|im_end|>", [])],
)  # fmt: skip
def test_a_prefix_begins_every_example(own: Any, around: str, prefix: list[str]) -> None:
    with_prefix(own, around)
    assert prefix_of(own) == own.convert_tokens_to_ids(prefix)
    own.chat_template = TEMPLATE
    for example in (Pair("alpha", " beta"), Chat(MESSAGES, 0)):
        for completions in (True, False):
            ids, marks, answer, _ = encode(example, own, completions, special=False)
            assert own.convert_ids_to_tokens(ids)[: len(prefix)] == prefix
            assert not any(marks[: len(prefix)])
            assert completions or all(marks[len(prefix) :])
            assert marks[answer]
            assert answer >= len(prefix)
    own.chat_template = INSTRUCTIONS  # a template writes the prefix itself
    ids = encode(Chat(MESSAGES[1:], 0), own, completions=True, special=False).ids
    assert ids.count(own.bos_token_id) == 1


WITH_TOOLS = """\
{% for tool in tools or [] %}{{ tool['name'] + ': ' + tool['about'] + '\n' }}{% endfor %}""" + CHATML.replace(
    "message['content'] + '<|im_end|>\n'",
    "message['content'] }}{% for call in message['tool_calls'] or [] %}{{ '<call>' + call['name'] }}{% endfor %}"
    "{{ '<|im_end|>\n'",
)


def test_the_template_describes_the_tools(own: Any) -> None:
    own.chat_template = WITH_TOOLS
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "tail"}]}
    tools = [{"name": "tail", "about": "mean <|im_end|> worst"}]
    encoded = encode(Chat((*MESSAGES[:2], call), 0, tools), own, completions=True, special=False)
    assert own.decode(encoded.ids).startswith("tail: mean <|im_end|> worst\n<|im_start|>system")
    assert encoded.ids.count(own.convert_tokens_to_ids("<|im_end|>")) == 3  # that of the tool is text
    assert learned(own, encoded) == ["<call>tail<|im_end|>"]


def test_an_answer_that_a_template_changes_is_refused(own: Any) -> None:
    own.chat_template = THINKING.replace("message['content'].strip()", "message['content'].upper()")
    with pytest.raises(ChatError, match=r"^the chat template changes the assistant's turns$"):
        encode(Chat(MESSAGES, 0), own, completions=True, special=False)
