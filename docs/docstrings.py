"""An extension of griffe, which reads the docstrings for the site, for what is peculiar to ours."""

import re
from collections.abc import Iterator
from textwrap import dedent
from typing import Any

import griffe


class Manner(griffe.Extension):
    """An example is code. A comment behind a field documents it. `**options` are spelled out."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for function in functions_of(pkg):
            for each in (function, *(function.overloads or ())):
                spell_out(each)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """The field of an objective, `option(default, check)`, is shown as its default."""
        if isinstance(attr.value, griffe.ExprCall) and attr.value.canonical_path == "nvamp.options.option":
            attr.value = attr.value.arguments[0]

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


def functions_of(parent: griffe.Module | griffe.Class) -> Iterator[griffe.Function]:
    """All functions and methods that a module or class defines."""
    for member in parent.members.values():
        if isinstance(member, griffe.Function):
            yield member
        elif isinstance(member, griffe.Module | griffe.Class):
            yield from functions_of(member)


def spell_out(function: griffe.Function) -> None:
    """Replaces `**options: Unpack[SomeOptions]` by the options that the class declares."""
    if "options" not in function.parameters:
        return
    annotation = function.parameters["options"].annotation
    if not (isinstance(annotation, griffe.ExprSubscript) and annotation.canonical_name == "Unpack"):
        return
    declared = function.modules_collection[annotation.slice.canonical_path]
    del function.parameters["options"]
    for option in options_of(declared):
        function.parameters.add(parameter(option))


def options_of(cls: griffe.Class) -> Iterator[griffe.Attribute]:
    """The fields of a TypedDict, inherited ones first."""
    for base in cls.resolved_bases:
        if isinstance(base, griffe.Class):
            yield from options_of(base)
    for member in cls.members.values():
        if isinstance(member, griffe.Attribute):
            yield member


def parameter(option: griffe.Attribute) -> griffe.Parameter:
    """An option as a parameter: of `Annotated[type, Option(default, check)]` the type and the default."""
    annotation, default = option.annotation, "..."
    if isinstance(annotation, griffe.ExprSubscript) and annotation.canonical_name == "Annotated":
        annotation, declared = annotation.slice.elements
        default = declared.arguments[0]
    kind = griffe.ParameterKind.keyword_only
    return griffe.Parameter(option.name, annotation=annotation, kind=kind, default=default)
