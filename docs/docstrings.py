"""What griffe, which reads the docstrings for the site, does not know of their manner."""

import re
from textwrap import dedent
from typing import Any

import griffe


class Manner(griffe.Extension):
    """An example is code. A comment behind a field documents it."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring is not None:
            func.docstring.value = re.sub(
                r"^Example:\n((?:    .*\n?|\n)+)",
                lambda match: f"**Example**\n\n```python\n{dedent(match[1]).rstrip()}\n```\n",
                func.docstring.value,
                flags=re.MULTILINE,
            )

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.docstring is None:
            return
        fields = [f"    {name}: {comment}" for name, comment in comments(cls).items()]
        if fields:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(fields)


def comments(cls: griffe.Class) -> dict[str, str]:
    """The comment behind each field of a class that has one."""
    found = {}
    for name, field in cls.attributes.items():
        if field.docstring is None and field.lineno is not None:
            line = field.lines_collection[field.filepath][field.lineno - 1]
            _, _, comment = line.partition("  # ")
            if comment:
                found[name] = comment
    return found
