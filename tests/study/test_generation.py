"""Greedy completions, and how they compare with the answers."""

import copy
from typing import Any

import pytest
import torch

import nvamp.study.generation
from nvamp.study.corpus import Prompt
from nvamp.study.generation import LONGER, complete, generation_metrics, token_f1
from tests.study.conftest import dropping, small_llama


@pytest.fixture
def model(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    return small_llama(tokenizer, positions=32, initializer_range=0.5).train()


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The likeliest continuation, token by token, without a cache."""
    ids = [*ids]
    model.eval()
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def test_a_completion_is_greedy_and_ends(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("alpha beta")["input_ids"]
    expected = greedy(model, ids, LONGER + 1)[len(ids) :]
    end = model.generation_config.eos_token_id
    assert end not in expected
    model.train()
    state = torch.get_rng_state()
    answer = tokenizer.decode(tokenizer("gamma")["input_ids"][:1])
    assert complete(model, tokenizer, Prompt(ids, answer)) == tokenizer.decode(expected)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)

    first = expected.index(expected[3])
    ended = tokenizer.decode(expected[: first + 1], skip_special_tokens=True)
    assert complete(model, tokenizer, Prompt(ids, answer, expected[3])) == ended
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = expected[3]
    assert complete(model, tokenizer, Prompt(ids, answer)) == ended


def test_the_tokenizers_end_ends_a_completion(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("alpha beta")["input_ids"]
    model.generation_config.eos_token_id = None
    whole = complete(model, tokenizer, Prompt(ids, "gamma"))
    own = copy.deepcopy(tokenizer)
    own.eos_token = own.convert_ids_to_tokens(greedy(model, ids, 2)[-1])
    assert len(complete(model, own, Prompt(ids, "gamma"))) < len(whole)


def test_a_completion_is_greedy_whatever_the_model_would_do(tokenizer: Any) -> None:
    model = dropping(len(tokenizer))
    ids = tokenizer("alpha")["input_ids"]
    expected = complete(model.eval(), tokenizer, Prompt(ids, "beta"))
    config = model.generation_config
    config.do_sample, config.num_beams, config.repetition_penalty = True, 3, 5.0
    assert [complete(model.train(), tokenizer, Prompt(ids, "beta")) for _ in range(3)] == [expected] * 3


def test_a_prompt_that_leaves_little_room(model: Any, tokenizer: Any) -> None:
    ids = (tokenizer("alpha beta gamma delta")["input_ids"] * 32)[:30]
    expected = tokenizer.decode(greedy(model, ids, 2)[30:])
    assert complete(model, tokenizer, Prompt(ids, "alpha " * 20)) == expected
    assert complete(model, tokenizer, Prompt([*ids, 5, 6], "alpha")) == ""


@pytest.mark.parametrize(
    ("found", "wanted", "f1"),
    [
        ("The cat", "the CAT", 1.0),
        ("cat the", "the cat", 1.0),
        ("a b c d", "a b", 2 / 3),
        ("a a", "a", 2 / 3),
        ("x", "a b", 0.0),
        ("", "a", 0.0),
        (" ", "", 1.0),
    ],
)
def test_token_f1(found: str, wanted: str, f1: float) -> None:
    assert token_f1(found, wanted) == pytest.approx(f1)


def test_the_metrics_of_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {1: "the cat\n", 2: "the dog", 3: "a"}
    monkeypatch.setattr(
        nvamp.study.generation, "complete", lambda model, tokenizer, prompt: said[prompt.ids[0]]
    )
    prompts = [Prompt([1], " the cat"), Prompt([2], "the cat"), Prompt([3], "b")]
    found = generation_metrics(None, None, prompts)
    assert found == {
        "exact_match": pytest.approx(100 / 3),
        "token_f1": pytest.approx(100 * (1 + 0.5 + 0) / 3),
    }
