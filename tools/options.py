"""Prints the places in src/ that list three or more of the library's options, and their number.

    python -m tools.options [--most 20]

It exits with 1 if there are more than `--most`. An option is meant to be spelled once, where it is declared:
every further list has to change with it, and can be wrong.

A place is one list in the syntax of a module:

- the parameters of a function or a lambda;
- the arguments of a call: keywords, and names, attributes and strings by position;
- the keys of a dict;
- the names, attributes and strings in a tuple, a list or a set, or in the target of an unpacking;
- the names and attributes that the statements of one body assign: the fields of a class, or what an
  `__init__` sets;
- the words of a string other than a docstring, such as the schema of an operator.

It lists an option if it has the option's name, or the name with the prefix `nvamp_`, which a configuration
needs if others share it. A list inside another is a place of its own, and neither counts for the other.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parents[1] / "src"
PREFIX = "nvamp_"
LEAST = 3
OPTIONS = {
    "alpha", "beta", "gamma", "eps", "tail", "gradient", "ignore_index", "shift", "label_smoothing", "z_loss",
    "softcap", "logit_scale", "inplace_backward", "accum_dtype", "process_group", "vocab_group",
    "reduce_grad_hidden", "backend", "class_weight", "temperature",
}  # fmt: skip


class Place(NamedTuple):
    line: int
    kind: str
    options: tuple[str, ...]  # each once, in the order of the list


def places(source: str) -> list[Place]:
    """The places of a module that list at least three options, in the order of its lines."""
    found = []
    for line, kind, names in lists(ast.parse(source)):
        options = tuple(dict.fromkeys(name for name in map(option, names) if name))
        if len(options) >= LEAST:
            found.append(Place(line, kind, options))
    return sorted(found)


def option(name: str | None) -> str | None:
    """The option of this name, if there is one."""
    plain = (name or "").removeprefix(PREFIX)
    return plain if plain in OPTIONS else None


def lists(module: ast.Module) -> Iterator[tuple[int, str, Iterable[str | None]]]:
    """Every list of the module: its line, what it is, and what it names."""
    prose = set(docstrings_and_parts(module))
    for node in ast.walk(module):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, f"parameters of {name}", parameters(node.args)
                yield node.lineno, f"assignments of {name}", assigned(node.body)
            case ast.Lambda():
                yield node.lineno, "parameters of a lambda", parameters(node.args)
            case ast.ClassDef():
                yield node.lineno, f"fields of {node.name}", assigned(node.body)
            case ast.Call():
                names = [*map(named, node.args), *(keyword.arg for keyword in node.keywords)]
                yield node.lineno, f"arguments of {ast.unparse(node.func)}", names
            case ast.Dict():
                yield node.lineno, "keys of a dict", map(named, node.keys)
            case ast.Tuple(ctx=ast.Store()) | ast.List(ctx=ast.Store()):
                yield node.lineno, "unpacking", map(named, node.elts)
            case ast.Tuple() | ast.List() | ast.Set():
                yield node.lineno, type(node).__name__.lower(), map(named, node.elts)
            case ast.Constant(value=str()) | ast.JoinedStr() if id(node) not in prose:
                yield node.lineno, "string", re.findall(r"\w+", text(node))


def docstrings_and_parts(module: ast.Module) -> Iterator[int]:
    """Ids of the strings that do not count as lists: docstrings, and the parts of an f-string."""
    for node in ast.walk(module):
        if isinstance(node, ast.Expr):
            yield id(node.value)
        elif isinstance(node, ast.JoinedStr):
            yield from map(id, node.values)


def text(string: ast.Constant | ast.JoinedStr) -> str:
    """The text of a string; an f-string without the values that it formats."""
    if isinstance(string, ast.Constant):
        return str(string.value)
    return " ".join(str(part.value) for part in string.values if isinstance(part, ast.Constant))


def parameters(arguments: ast.arguments) -> list[str]:
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def assigned(body: list[ast.stmt]) -> Iterator[str | None]:
    """The names and attributes that the statements of a body assign, one each."""
    for statement in body:
        match statement:
            case ast.AnnAssign(target=target) | ast.Assign(targets=[target]):
                yield named(target)


def named(node: ast.expr | None) -> str | None:
    """The name in an expression: a name, the last part of an attribute, or a string."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Constant(value=str(name)):
            return name
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--most", type=int, default=20)
    most = parser.parse_args().most
    count = 0
    for path in sorted(SOURCE.rglob("*.py")):
        for place in places(path.read_text(encoding="utf-8")):
            count += 1
            name = path.relative_to(SOURCE.parent)
            print(f"{name}:{place.line}: {place.kind}: {', '.join(place.options)}")
    print(f"{count} places list {LEAST} or more options")
    return int(count > most)


if __name__ == "__main__":
    sys.exit(main())
