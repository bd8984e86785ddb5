"""Sphinx directives that write the reference of commands, recipes and exit codes from the code.

    ```{command} trainer.task TrainConfig
    ```

describes ``python -m trainer.task`` by the fields of ``trainer.task.TrainConfig``: name, type,
default and docstring of each, but for those of TrainConfig that it inherits. Other pages refer to a
flag with ``` {option}`--epochs <python -m trainer.task --epochs>` ```. ``{recipes}`` and
``{exit-codes}`` are the tables of ``TrainConfig``'s recipes and of ``trainer.errors``.
"""

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective
from tyro.conf import Positional

from trainer import cli, config, errors
from trainer.recipes import RECIPES


class CommandDirective(SphinxDirective):
    """Describes a command by the dataclass that its flags are made from."""

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        """Returns the summary of the dataclass, then one ``option`` for each of its fields."""
        module = importlib.import_module(self.arguments[0])
        kind = getattr(module, self.arguments[1])
        lines = [
            _text(_summary(kind)),
            "",
            f"```{{program}} python -m {module.__name__}",
            "```",
            "",
        ]
        for name, default, text in fields(kind):
            lines += [f"```{{option}} {name}", _text(text), "", default, "```", ""]
        return _parse(self, lines)


class RecipesDirective(SphinxDirective):
    """Shows what each recipe sets, a column a recipe."""

    def run(self) -> list[nodes.Node]:
        """Returns a table with a row for each flag that a recipe sets."""
        configs = {name: config.TrainConfig(recipe=name) for name in RECIPES}
        lines = [f"| flag | {' | '.join(f'`{name}`' for name in configs)} |"]
        lines += ["|---" * (1 + len(configs)) + "|"]
        for name in dict.fromkeys(name for recipe in RECIPES.values() for name in recipe):
            values = [f"`{getattr(made, name)}`" for made in configs.values()]
            lines.append(f"| {{option}}`{_flag(name)} <python -m trainer.task {_flag(name)}>` | ")
            lines[-1] += f"{' | '.join(values)} |"
        return _parse(self, lines)


class ExitCodesDirective(SphinxDirective):
    """Lists the exit codes of all commands."""

    def run(self) -> list[nodes.Node]:
        """Returns a table of code, error class and meaning, in order of the codes."""
        codes = {
            0: ("", "Done: everything that was asked for is written."),
            1: ("", "An error that is not the user's: a defect, or TensorFlow's own error."),
            cli.INTERRUPTED: ("", "Interrupted with Ctrl-C, with nothing to resume."),
            cli.CLOSED: ("", "The reader of the output has closed it (`\\| head`)."),
        }
        for error in errors.TrainerError.__subclasses__():
            codes[error.exit_code] = (f"`{error.__name__}`", _text(_summary(error)))
        lines = ["| code | error | meaning |", "|---|---|---|"]
        lines += [f"| {code} | {error} | {text} |" for code, (error, text) in sorted(codes.items())]
        return _parse(self, lines)


def fields(kind: type) -> Iterator[tuple[str, str, str]]:
    """Yields the usage (``--epochs INT``), the default and the docstring of each field, but for
    those of TrainConfig that another command has, too.

    Raises:
        ValueError: A field has no docstring.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    # A dataclass may be imported from the module that it is defined in.
    owners = {
        name: owner
        for owner in reversed(kind.__mro__)
        for name in getattr(owner, "__annotations__", ())
    }
    for field in dataclasses.fields(kind):
        owner = owners[field.name]
        if owner is config.TrainConfig and kind is not owner:
            continue
        docs = ModuleAnalyzer.for_module(owner.__module__).find_attr_docs()
        text = " ".join(docs.get((owner.__name__, field.name), ())).strip()
        if not text:
            raise ValueError(f"Expected a docstring for {kind.__name__}.{field.name}.")
        hint = hints[field.name]
        if typing.get_origin(hint) is typing.Annotated and Positional[int].__metadata__[0] in (
            hint.__metadata__
        ):
            usage = _type(hint.__origin__, field.name.upper())
        elif hint is bool:
            usage = _flag(f"no_{field.name}" if field.default else field.name)
        else:
            name = field.name.rstrip("_")  # "as" is a word of Python's.
            usage = f"{_flag(name)} {_type(hint)}"
        default = _default(field)
        if field.metadata.get("may_differ"):
            default += " May differ when a run is resumed."
        yield usage, default, text


def _summary(kind: type) -> str:
    return inspect.getdoc(kind).partition("\n\n")[0]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _type(hint: object, name: str = "") -> str:
    """Writes a type as ``--help`` does.

    >>> _type(int | None), _type(typing.Literal["auto", "off"])
    ('INT', '{auto,off}')
    """
    if typing.get_origin(hint) is typing.Annotated:
        return _type(hint.__origin__, name)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return "|".join(
            _type(part, name) for part in typing.get_args(hint) if part is not type(None)
        )
    if typing.get_origin(hint) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if typing.get_origin(hint) is tuple:
        return f"{name or _type(typing.get_args(hint)[0])} ..."
    return name or {str: "STR", int: "INT", float: "FLOAT", Path: "PATH"}[hint]


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        factory = field.default_factory
        return f"Default: `{factory.__module__}.{factory.__qualname__}()`."
    if field.default is dataclasses.MISSING:
        return "Required."
    if field.default is None or field.default == () or isinstance(field.default, bool):
        return "Not set by default."
    return f"Default: `{field.default}`."


def _text(text: str) -> str:
    """Escapes what Markdown would read as markup, except `literals`, and joins the lines."""
    return re.sub(r"(?<!`)[*_<\[](?!`)", r"\\\g<0>", " ".join(text.split())).replace("``", "`")


def _parse(directive: SphinxDirective, lines: list[str]) -> list[nodes.Node]:
    container = nodes.Element()
    directive.state.nested_parse("\n".join(lines).split("\n"), directive.content_offset, container)
    return container.children


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the directives."""
    app.add_directive("command", CommandDirective)
    app.add_directive("recipes", RecipesDirective)
    app.add_directive("exit-codes", ExitCodesDirective)
    return {"parallel_read_safe": True}
