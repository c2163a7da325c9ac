from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvamp.study import StudyError
from nvamp.study.chats import Encoded
from nvamp.study.held_out import score
from nvamp.study.models import keeps_apart
from nvamp.study.packing import IGNORED, Blocks, noisy, pack, pack_examples, pack_text, plain, spread
from tests.integrations.architectures import LANGUAGE, build

examples = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=8).map(
        lambda pairs: Encoded([index for index, _ in pairs], [learn for _, learn in pairs], 0)
    ),
    min_size=1,
    max_size=12,
)


@given(st.lists(st.lists(st.integers(0, 9), max_size=20), max_size=10), st.integers(1, 7))
def test_pack_keeps_the_stream(documents: list[list[int]], sequence: int) -> None:
    blocks = pack(documents, sequence)
    stream = [token for document in documents for token in document]
    assert blocks.shape == (len(stream) // sequence, sequence)
    assert blocks.flatten().tolist() == stream[: blocks.numel()]


@given(st.integers(1, 50), st.integers(1, 60))
def test_spread_takes_distinct_blocks_from_end_to_end(blocks: int, limit: int) -> None:
    taken = spread(torch.arange(blocks), limit).tolist()
    assert len(set(taken)) == len(taken) == min(blocks, limit)
    assert taken[0] == 0
    assert limit == 1 or taken[-1] == blocks - 1
    assert spread(torch.arange(blocks), 0).tolist() == [0]  # of blocks longer than the limit in tokens, one


@given(st.lists(st.lists(st.integers(3, 9), max_size=9), max_size=10), st.integers(3, 7), st.integers(0, 2))
def test_a_prefix_begins_each_document_and_each_block(
    documents: list[list[int]], sequence: int, length: int
) -> None:
    prefix = [1, 2][:length]
    if sequence < length + 2:  # no token to see, or none to predict
        with pytest.raises(StudyError, match=f"expected blocks of at least {length + 2} tokens"):
            pack_text(documents, sequence, prefix)
        return
    blocks = pack_text(documents, sequence, prefix)
    assert blocks.positions is blocks.examples is None
    text = [token for document in documents for token in document]
    found = blocks.labels[blocks.labels != IGNORED].tolist()
    assert found == text[: len(found)]  # the prefix is not learned, and nothing else is left out,
    assert len(text) - len(found) < sequence  # but the end
    assert all(row[:length] == prefix for row in blocks.inputs.tolist())
    assert torch.equal(blocks.labels == IGNORED, torch.isin(blocks.inputs, torch.tensor(prefix)))
    # No prefix without a document, and none twice.
    assert not any(
        row[length : 2 * length] == prefix and length
        for row in blocks.inputs.tolist()
        if documents.count([]) == 0
    )


def test_the_last_block_may_be_just_full() -> None:
    for prefix in ([], [1]):
        assert pack_text([[5] * (4 - len(prefix))], 4, prefix).inputs.tolist() == [[*prefix, 5, 5, 5, 5][:4]]


@settings(deadline=None)  # each example is looked for in all blocks
@given(examples, st.integers(8, 20), st.booleans())
def test_examples_are_whole_and_apart(found: list[Encoded], sequence: int, together: bool) -> None:
    blocks = pack_examples(found, sequence, 77, together)
    assert blocks.examples is not None
    assert blocks.tokens == sum(len(example.ids) for example in found)
    for index, example in enumerate(found):
        own = blocks.examples == index
        assert own.any(1).sum() == 1  # in one block
        assert blocks.inputs[own].tolist() == example.ids
        learned = [
            i if learn and at else IGNORED
            for at, (i, learn, _) in enumerate(zip(*example[:2], example.ids, strict=True))
        ]
        assert blocks.labels[own].tolist() == learned  # its first token follows nothing
        if together:
            assert blocks.positions is not None
            assert blocks.positions[own].tolist() == list(range(len(example.ids)))
    padding = blocks.examples == -1
    assert (blocks.inputs[padding] == 77).all()
    assert (blocks.labels[padding] == IGNORED).all()
    assert len(blocks.learned) == sum(sum(example.learned[1:]) for example in found)
    if not together:
        assert blocks.positions is None
        assert len(blocks) == len(found)
    else:  # two blocks less than half full would be one
        assert ((~padding).sum(1) <= sequence // 2).sum() <= 1


def test_examples_that_fill_a_block_share_it() -> None:
    found = [Encoded([1] * length, [True] * length, 0) for length in (5, 6, 2, 3)]
    examples = pack_examples(found, 8, 77, together=True).examples
    assert examples is not None
    assert examples.tolist() == [[0] * 5 + [3] * 3, [1] * 6 + [2] * 2]


ALL = {architecture.name: architecture for architecture in LANGUAGE}


@pytest.mark.parametrize(
    ("name", "apart"),
    [
        ("LlamaForCausalLM", True),
        ("GPT2LMHeadModel", True),  # learned positions
        ("Gemma2ForCausalLM", True),  # windows that slide in some layers
        ("Qwen2MoeForCausalLM", True),
        ("BloomForCausalLM", False),  # takes no positions
        ("OPTForCausalLM", False),  # takes them, and looks beyond
        ("MambaForCausalLM", False),  # its state runs on
    ],
)
def test_losses_of_a_packed_example_are_those_of_the_example_alone(name: str, apart: bool) -> None:
    model: Any = build(ALL[name]).eval()
    assert keeps_apart(model) is apart
    generator = torch.Generator().manual_seed(0)
    found = [
        Encoded(torch.randint(3, 99, (length,), generator=generator).tolist(), [True] * length, 0)
        for length in (9, 14, 6, 20, 3)
    ]
    blocks = pack_examples(found, 32, 2, together=apart)
    assert len(blocks) == (2 if apart else 5)
    nll = score(model, blocks).nll
    assert blocks.examples is not None
    owners = blocks.examples[:, 1:][blocks.labels[:, 1:] != IGNORED]
    for index, example in enumerate(found):
        ids = torch.tensor([example.ids])
        alone = score(model, plain(ids)).nll
        torch.testing.assert_close(
            torch.from_numpy(nll)[owners == index], torch.from_numpy(alone), rtol=1e-4, atol=1e-5
        )


def test_gradients_of_packed_examples_are_those_of_the_examples() -> None:
    def gradient(blocks: Any) -> Tensor:
        model = build(ALL["LlamaForCausalLM"])
        items = transformers.default_data_collator([blocks[index] for index in range(len(blocks))])
        labels = items.pop("labels")
        logits = model(**items, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        loss.backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    generator = torch.Generator().manual_seed(0)
    found = [
        Encoded(
            torch.randint(3, 99, (length,), generator=generator).tolist(),
            [i % 3 > 0 for i in range(length)],
            0,
        )
        for length in (9, 14, 6)
    ]
    packed = pack_examples(found, 32, 2, together=True)
    torch.testing.assert_close(gradient(packed), gradient(pack_examples(found, 20, 2, together=False)))


def test_noise_leaves_what_is_not_learned() -> None:
    labels = torch.tensor([[IGNORED, 5, IGNORED, 6]]).repeat(200, 1)
    data = noisy(Blocks(torch.full((200, 4), 7), labels), 1000, 1.0, 0)
    assert torch.equal(data.labels == IGNORED, labels == IGNORED)
    assert (data.labels[labels != IGNORED] > 6).float().mean() > 0.9


def test_the_owner_of_each_learned_token() -> None:
    found = [Encoded([1, 2, 3], [True, False, True], 0), Encoded([4, 5, 6, 7, 8], [True] * 5, 0)]
    together = pack_examples(found, 8, 0, together=True)
    assert together.owners.tolist() == [0, 1, 1, 1, 1]
    assert pack_examples(found, 8, 0, together=False).owners.tolist() == [0, 1, 1, 1, 1]
    text = pack_text([list(range(9))], 4, [])
    assert text.owners.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(text.owners) == len(text.learned)
