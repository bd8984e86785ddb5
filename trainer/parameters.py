"""Settings of several words: a name and its parameters, or a list of changes with their amounts.

parse("adamw weight_decay=0.05").parameters     # {"weight_decay": 0.05}
parse_augmentation("rotate=20 flip")            # {"rotate": 20.0, "flip": 0.5}
"""

import ast
import re
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from trainer.errors import UsageError

Value: TypeAlias = bool | int | float | None

# Changes of training images: the amount where none is given, and the largest one. Angles are in
# degrees; zoom, translate and elastic are shares of the size; flips are probabilities; brightness
# and contrast are shares of the range and of the contrast; hue is one of the colour circle.
AUGMENTATIONS: Mapping[str, tuple[float, float]] = {
    "rotate": (10.0, 180.0),
    "shear": (10.0, 60.0),
    "zoom": (0.1, 0.9),
    "translate": (0.1, 1.0),
    "elastic": (0.1, 0.5),
    "flip": (0.5, 1.0),
    "vertical_flip": (0.5, 1.0),
    "brightness": (0.2, 1.0),
    "contrast": (0.2, 1.0),
    "saturation": (0.2, 1.0),
    "hue": (0.05, 0.5),
}
AFFINE: Mapping[str, float] = {"rotate": 10.0, "shear": 10.0, "zoom": 0.1, "translate": 2 / 28}


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


def parse_augmentation(text: str) -> dict[str, float]:
    """Returns the largest amounts of the changes that a setting lists, in the order of
    ``AUGMENTATIONS``; none for ``none``.

    Args:
        text: ``none``, or names of ``AUGMENTATIONS``, each with ``=`` and an amount or without;
            ``affine`` is those of ``AFFINE``, before others.

    Raises:
        UsageError: A name is unknown or there twice, or an amount is out of its range.

    >>> parse_augmentation("flip rotate=20")
    {'rotate': 20.0, 'flip': 0.5}
    >>> format_augmentation(parse_augmentation("hue affine"))
    'affine hue=0.05'
    """
    words = text.split() if isinstance(text, str) else []
    if words == ["none"]:
        return {}
    amounts: dict[str, float] = {}
    for word in words or [repr(text)]:
        name, equals, value = word.partition("=")
        if name in amounts:
            raise UsageError(f"{name} must be there once. Received: {text!r}. Leave one out.")
        if name == "affine" and not equals:
            continue
        if name not in AUGMENTATIONS:
            raise UsageError(
                f"augment must be none, or a list of affine, {', '.join(AUGMENTATIONS)}. Received: "
                f"augment={text!r}. Use none, or for example rotate=10 translate=0.1."
            )
        default, most = AUGMENTATIONS[name]
        try:
            amounts[name] = float(value) if equals else default
        except ValueError:
            amounts[name] = -1.0
        if not 0 < amounts[name] <= most:
            raise UsageError(
                f"{name} of augment must be above 0, and at most {most:g}. Received: {word}. "
                f"Use {name}={default:g}."
            )
    if "affine" in words:
        amounts = {**AFFINE, **amounts}
    return {name: amounts[name] for name in AUGMENTATIONS if name in amounts}


def check_augmentation(text: str, channels: int) -> None:
    """Checks that what a setting lists fits images.

    Args:
        text: As ``parse_augmentation`` takes it.
        channels: Of the images.

    Raises:
        UsageError: It changes colours that they do not have.
    """
    for name in ("saturation", "hue"):
        if name in parse_augmentation(text) and channels != 3:
            raise UsageError(
                f"{name} of augment is for images of three channels. Received: {channels}. "
                "Leave it out."
            )


def format_augmentation(amounts: Mapping[str, float]) -> str:
    """Returns the one spelling of what ``parse_augmentation`` has returned."""
    words = [f"{name}={amount!r}".removesuffix(".0") for name, amount in amounts.items()]
    if amounts.items() >= AFFINE.items():
        rest = [word for word in words if word.partition("=")[0] not in AFFINE]
        words = ["affine", *rest]
    return " ".join(words) or "none"
