import json
from pathlib import Path

from tools.chats import LONGEST, SHORTEST, questions

CHATS = Path(__file__).parents[2] / "examples" / "data" / "chat.jsonl"


def test_questions_have_answers_of_their_own() -> None:
    found = dict(questions())
    assert len(found) > 1000
    assert len(set(found.values())) == len(found)
    assert found["What does textwrap.dedent do?"].startswith("Remove any common leading whitespace")
    assert all(SHORTEST <= len(answer) <= LONGEST for answer in found.values())
    assert not any("._" in question for question in found)


def test_the_chats_of_the_examples_are_questions_and_answers() -> None:
    rows = [json.loads(line)["messages"] for line in CHATS.read_text().splitlines()]
    assert len(rows) == 320
    for user, assistant in rows:
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"].startswith("What does ")
        assert SHORTEST <= len(assistant["content"]) <= LONGEST
