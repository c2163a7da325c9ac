"""Questions about Python's standard library with answers from its docstrings: chats to fine-tune on.

    python -m tools.chats [--rows 320] > examples/data/chat.jsonl

The answers are those of the Python that runs this, so the file differs between its versions.
"""

import argparse
import ast
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nvamp.study.sources import standard_library

SHORTEST, LONGEST = 40, 400  # characters of an answer


class Question(NamedTuple):
    """A question about a function, a class or a method, and its answer."""

    prompt: str
    completion: str


def questions() -> Iterator[Question]:
    """Every public function, class and method whose docstring's first paragraph is an answer."""
    root = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    for path in standard_library(root):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        if re.search(r"(^|\.)_|[^\w.]", module):
            continue
        for name, docstring in _documented(ast.parse(path.read_bytes()), module):
            answer = " ".join(docstring.partition("\n\n")[0].split())
            if SHORTEST <= len(answer) <= LONGEST and answer.isascii() and answer not in seen:
                seen.add(answer)  # subclasses repeat what their base says
                yield Question(f"What does {name} do?", answer)


def _documented(tree: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name[0] == "_":
            continue
        name = f"{prefix}.{node.name}"
        if docstring := ast.get_docstring(node):
            yield name, docstring
        if isinstance(node, ast.ClassDef):
            yield from _documented(node, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=320)
    found = list(questions())
    random.Random(0).shuffle(found)
    for question, answer in sorted(found[: parser.parse_args().rows]):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        print(json.dumps({"messages": messages}))


if __name__ == "__main__":
    main()
