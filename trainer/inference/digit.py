"""A digit found in a picture, in the form that the network is trained on."""

import dataclasses
from typing import Literal

import numpy as np

SIZE = 28  # Pixels of its side.
MAX_DIGITS = 500  # In one picture: a page of digits has fewer.

DigitCount = Literal["one", "many"]  # How many digits a picture is to show.


@dataclasses.dataclass(frozen=True)
class Digit:
    """A digit as the network sees it.

    Attributes:
        pixels: uint8 (28, 28), 0 is paper and 255 ink; or a whole picture, uint8 (height, width,
            channels).
        box: Where it was found: left, top, right, bottom, in pixels of the picture that was
            searched.
        several: Whether it looks like several digits side by side, though one was asked for.
    """

    pixels: np.ndarray
    box: tuple[int, int, int, int]
    several: bool = False
