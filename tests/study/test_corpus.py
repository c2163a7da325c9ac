from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvamp.study import StudyError, corpus
from nvamp.study.corpus import EXCERPT, build_corpus, frequency_classes, split, tokenize
from tests.study.conftest import words


@given(st.lists(st.text(min_size=1, max_size=300), min_size=1, max_size=60))
def test_split_loses_nothing_and_shares_nothing(documents: list[str]) -> None:
    train, held_out = split(documents)
    if len(documents) < 10:
        assert [a + b for a, b in zip(train, held_out, strict=True)] == documents
    else:
        assert sorted(train + held_out) == sorted(documents)


@given(st.lists(st.integers(1, 5000), min_size=10, max_size=60))
def test_about_a_tenth_is_held_out(lengths: list[int]) -> None:
    train, held_out = split(["x" * length for length in lengths])
    assert train
    assert 0 < sum(map(len, held_out)) <= 0.2 * sum(lengths)


def test_of_ten_documents_one_is_held_out() -> None:
    assert split(["x" * 100] * 10) == (["x" * 100] * 9, ["x" * 100])


def test_a_single_document_is_split_by_position() -> None:
    assert split(["a" * 90 + "b" * 10]) == (["a" * 90], ["b" * 10])


def test_tokenize_gives_back_the_text_and_ends_each_document(tokenizer: Any) -> None:
    texts = ["alpha\n\tβeta 🙂", "", "gamma"]
    ids = list(tokenize(texts, tokenizer))
    assert [document[-1] for document in ids] == [tokenizer.eos_token_id] * 2
    assert [tokenizer.decode(document[:-1]) for document in ids] == ["alpha\n\tβeta 🙂", "gamma"]


def test_tokenize_leaves_no_document_out(tokenizer: Any) -> None:
    texts = [f"alpha {index}" for index in range(600)]
    assert [tokenizer.decode(ids[:-1]) for ids in tokenize(texts, tokenizer)] == texts


def test_frequency_classes_by_hand() -> None:
    # Counts 50, 30, 15, 5, 0: type 0 is the first half; 2 and 1 begin before 90%; 3 begins at 95%.
    train = torch.tensor([0] * 50 + [2] * 30 + [1] * 15 + [3] * 5)[None]
    assert frequency_classes(train, 5).tolist() == [0, 1, 1, 2, 2]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=300))
def test_a_more_frequent_token_is_never_in_a_rarer_class(tokens: list[int]) -> None:
    classes = frequency_classes(torch.tensor([tokens]), 31)
    counts = np.bincount(tokens, minlength=31)
    assert classes[counts.argmax()] == 0
    assert (classes[counts == 0] == 2).all()
    order = np.lexsort((classes, -counts))
    assert (np.diff(classes[order]) >= 0).all()


def test_the_corpus_of_the_same_text_is_the_same(documents: list[str]) -> None:
    first, again = (build_corpus(documents, "words", 16) for _ in range(2))
    assert first.fingerprint() == again.fingerprint()
    assert first.fingerprint() != build_corpus([*documents, "more"], "words", 16).fingerprint()
    assert first.fingerprint() != build_corpus(documents, "words", 8).fingerprint()


def test_no_held_out_text_is_trained_on(documents: list[str], tokenizer: Any) -> None:
    marked = [f"mark{index} {document}" for index, document in enumerate(documents)]
    found = build_corpus(marked, "words", 16, tokenizer)
    trained = tokenizer.decode(found.train.flatten())
    held_out = tokenizer.decode(found.held_out.flatten())
    seen = [f"mark{index} " in trained for index in range(len(marked))]
    kept = [f"mark{index} " in held_out for index in range(len(marked))]
    assert sum(kept) >= 4
    assert sum(seen) >= 30
    assert not any(a and b for a, b in zip(seen, kept, strict=True))


def test_the_tokenizer_is_made_of_the_training_text(
    documents: list[str], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def trained(texts: list[str]) -> Any:
        seen.append(texts)
        return tokenizer

    monkeypatch.setattr(corpus, "train_tokenizer", trained)
    build_corpus(documents, "words", 16)
    assert seen == [split(documents)[0]]


def test_no_more_is_evaluated_than_the_limit(
    documents: list[str], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = build_corpus(documents, "words", 16, tokenizer).held_out
    monkeypatch.setattr(corpus, "HELD_OUT_TOKENS", 64)
    some = build_corpus(documents, "words", 16, tokenizer).held_out
    assert len(every) > len(some) == 4
    assert torch.equal(some[[0, -1]], every[[0, -1]])


def test_too_short_a_text() -> None:
    with pytest.raises(
        StudyError, match="the text is too short: not one held-out block of 64 tokens in words"
    ):
        build_corpus(["a few words"], "words", 64)


def test_the_excerpt_is_held_out_text(tokenizer: Any) -> None:
    documents = [words(seed, 100 + seed) for seed in range(40)]
    longest = sorted(split(documents)[1], key=len, reverse=True)
    excerpt = build_corpus(documents, "words", 16, tokenizer).excerpt
    assert excerpt == "\n\n".join(longest)
    documents = [document * 40 for document in documents]
    assert build_corpus(documents, "words", 16, tokenizer).excerpt == (longest[0] * 40)[:EXCERPT]
