"""Settings that are a name and its parameters: ``--optimizer adamw weight_decay=0.05``.

parse("adamw weight_decay=0.05").parameters     # {"weight_decay": 0.05}
"""

import ast
import re
from typing import NamedTuple, TypeAlias

from trainer.errors import UsageError

Value: TypeAlias = bool | int | float | None


class Named(NamedTuple):
    """A name and its parameters.

    Attributes:
        name: The name.
        parameters: Values by their names.
    """

    name: str
    parameters: dict[str, Value]

    def __str__(self) -> str:
        return " ".join(
            (self.name, *(f"{name}={value!r}" for name, value in sorted(self.parameters.items())))
        )


def parse(text: str) -> Named:
    """Returns the name and the parameters that a setting consists of.

    Raises:
        UsageError: A parameter is no ``name=value``, is there twice, or its value is no number,
            True, False or None.

    >>> parse("sgd nesterov=True momentum=0.9")
    Named(name='sgd', parameters={'nesterov': True, 'momentum': 0.9})
    >>> str(parse("sgd nesterov=True  momentum=.9"))
    'sgd momentum=0.9 nesterov=True'
    """
    name, *parts = text.split() or [""]
    parameters: dict[str, Value] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not re.fullmatch(r"[a-z]\w*", key):
            raise UsageError(
                f"A parameter of {name} must be name=value. Received: {part!r}. Write for example "
                "adamw weight_decay=0.05."
            )
        if key in parameters:
            raise UsageError(f"{key} must be there once. Received: {text!r}. Leave one out.")
        try:
            parameters[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parameters[key] = ""  # type: ignore[assignment]
        if not isinstance(parameters[key], (bool, int, float, type(None))):
            raise UsageError(
                f"{key} of {name} must be a number, True, False or None. Received: {value!r}. "
                f"Write {key}=0.5, for example."
            )
    return Named(name, parameters)
