"""What griffe, which reads the docstrings for the site, leaves out: comments behind fields document these."""

from typing import Any

import griffe


class Comments(griffe.Extension):
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
