"""Lists the public API, one line each: `python -m tools.api > tests/api.txt`.

The public API is the names in `__all__` of nvamp, nvamp.functional, nvamp.objectives and the modules of
nvamp.integrations, their signatures, fields and public methods, and the commands of `nvamp` with their
options.
"""

import dataclasses
import importlib
import inspect
import json
import pkgutil
import sys
import typing
from collections.abc import Iterator
from typing import Any

import typer

import nvamp.integrations
from nvamp.cli import app

# Not among the packages of the tests; tests/integrations/test_axolotl.py has the names of its plugin.
NOT_INSTALLED = "nvamp.integrations.axolotl"


def modules() -> list[str]:
    """The modules with an `__all__`; an integration without one is not for users."""
    below = pkgutil.walk_packages(nvamp.integrations.__path__, "nvamp.integrations.")
    names = [
        "nvamp",
        "nvamp.functional",
        "nvamp.objectives",
        *(m.name for m in below if m.name != NOT_INSTALLED),
    ]
    return [name for name in names if hasattr(importlib.import_module(name), "__all__")]


def signature(function: Any) -> str:
    """One line, or one for each parameter if the line would be long."""
    whole = inspect.signature(function)
    line = str(whole).replace("typing.", "")
    if len(line) < 100:
        return line
    parameters, before = [], None
    for parameter in whole.parameters.values():
        if parameter.kind == parameter.KEYWORD_ONLY != before:
            parameters.append("*")
        before = parameter.kind
        parameters.append(str(parameter).replace("typing.", ""))
    result = "" if whole.return_annotation is whole.empty else f" -> {annotation(whole.return_annotation)}"
    return "".join(["(\n", *(f"    {text},\n" for text in parameters), ")", result])


def annotation(hint: Any) -> str:
    hint = getattr(hint, "__origin__", hint) if typing.get_origin(hint) is typing.Annotated else hint
    hint = getattr(hint, "__forward_arg__", hint)
    return inspect.formatannotation(hint).replace("typing.", "")


def members(name: str, cls: type) -> Iterator[str]:
    """The fields, and the methods and properties that do not come from another package's base class."""
    for field, hint in inspect.get_annotations(cls).items():
        yield f"{name}.{field}: {annotation(hint)}"
    own = [base for base in cls.__mro__ if base.__module__.startswith("nvamp")]
    methods = {key: value for base in reversed(own) for key, value in vars(base).items()}
    for key, value in sorted(methods.items()):
        if key.startswith("_") and key != "__call__":
            continue
        if inspect.isfunction(value):
            yield f"{name}.{key}{signature(value)}"
        elif isinstance(value, property):
            yield f"{name}.{key}: property"


def describe(name: str, value: Any) -> Iterator[str]:
    if inspect.ismodule(value):
        yield f"{name}: module"
    elif inspect.isclass(value):
        plain = typing.is_typeddict(value) or getattr(value, "_is_protocol", False)
        fields = hasattr(value, "_fields")
        bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
        yield f"class {name}({bases})" if plain or fields else f"class {name}{signature(value)}"
        if not dataclasses.is_dataclass(value) or value is nvamp.objectives.Objective:
            yield from members(
                name, value
            )  # an objective's fields are its parameters, and its methods come from the base
    elif inspect.isfunction(value):
        yield f"{name}{signature(value)}"
    else:
        yield f"{name} = {annotation(value)}"


def command_line() -> Iterator[str]:
    assert app.registered_callback is not None
    callbacks = {
        command.callback.__name__: command.callback for command in app.registered_commands if command.callback
    }
    for name, callback in [("nvamp", app.registered_callback.callback), *sorted(callbacks.items())]:
        assert callback is not None
        hints = typing.get_type_hints(callback)
        for parameter in inspect.signature(callback).parameters.values():
            if hints[parameter.name] is typer.Context:
                continue
            words = name if name == "nvamp" else f"nvamp {name}"
            given = parameter.default is not inspect.Parameter.empty
            default = f" = {json.dumps(parameter.default, default=str)}" if given else ", required"
            option = f"--{parameter.name.replace('_', '-')}: {annotation(hints[parameter.name])}"
            yield f"{words} {option}{default}"


def api() -> str:
    lines = []
    for module in modules():
        lines += ["", f"# {module}", ""]
        for name in sorted(importlib.import_module(module).__all__):
            lines += describe(name, getattr(importlib.import_module(module), name))
    lines += ["", "# command line", "", *command_line()]
    return "\n".join(lines).lstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(api())
