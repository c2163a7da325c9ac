"""The texts to fine-tune on, which come with every Python: English prose, and questions with answers."""

import random
from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]  # typeshed may lack it

from nvamp.study.corpus import Corpus, build_corpus
from nvamp.study.examples import build_examples
from nvamp.study.rows import Pair, Rows
from tools.chats import questions

PROSE = "the language reference in pydoc_data.topics"
ANSWERS = "questions about the standard library, answered by its docstrings"


def other_texts(first: Corpus) -> dict[str, Corpus]:
    """The texts by name, in the tokens of the first text and in blocks as long as its own."""
    sequence = first.train.shape[1]
    pairs = Rows(examples=[Pair(f"{prompt}\n", completion) for prompt, completion in questions()])
    return {
        "reference": build_corpus(
            reference(), "the language reference in pydoc_data.topics", sequence, first.tokenizer
        ),
        "answers": build_examples(
            pairs,
            "questions about the standard library, answered by its docstrings",
            sequence,
            first.tokenizer,
        ),
    }


def reference() -> list[str]:
    """The topics of Python's language reference, in one shuffled order."""
    documents = [topics[name] for name in sorted(topics)]
    random.Random(0).shuffle(documents)
    return documents
