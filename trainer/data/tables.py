"""Reads images from a CSV file: a row for each, its label and its pixels.

    arrays = read_csv(Path("train.csv"))        # {"x": uint8 (n, 28, 28), "y": integers (n,)}

The layout is that of Kaggle's digit recognizer, with a first line of names; without that line the
label comes first.
"""

import io
import math
import warnings
from pathlib import Path

import numpy as np

from trainer import inputs
from trainer.data import archives
from trainer.data.archives import check_memory, unreadable
from trainer.errors import DataError, InputError

_ROWS = 10_000  # Read at a time.


def read_csv(path: Path) -> dict[str, np.ndarray]:
    """Reads the images and labels of a file.

    Returns:
        ``x``, (n, side, side), or (n, side, side, 3) where the pixels are three times a square's:
        uint8 or float32; ``y``, integers (n,).

    Raises:
        InputError: The file is missing or cannot be read.
        DataError: It is no table of numbers, has no labels, or no square images; or it is too large
            for this machine.
    """
    try:
        with inputs.open_file(path) as opened:
            size = path.stat().st_size
            check_memory(path, size)  # A value takes at least two bytes of text.
            head = opened.readline(2**20)
            received, remedy = archives.kind(head)
            if not received.startswith("text"):
                raise DataError(f"Expected a CSV file at {path}. Received: {received}. {remedy}")
            columns = head.decode("utf-8-sig", errors="replace").strip().split(",")
            names = [name.strip(' "').lower() for name in columns]
            label = 0
            if any(not _is_number(name) for name in names):
                if "label" not in names:
                    raise DataError(
                        f"Expected a column label, and one for each pixel, in {path}. Received: "
                        f"{received}. Give the table whose images have labels."
                    )
                label = names.index("label")
            else:
                opened.seek(0)
            shape = _shape(path, len(names) - 1)
            parts = []
            while len(part := _read_rows(path, opened, len(names))):
                parts.append(part)
    except OSError as error:
        raise InputError(unreadable(path, error)) from error
    if not parts:
        raise DataError(f"Expected rows of numbers in {path}. Received: none.")
    table = np.concatenate(parts)
    labels = table[:, label]
    if not (labels == np.rint(labels)).all():
        raise DataError(f"Expected integers as labels in {path}. Received: fractions.")
    pixels = np.delete(table, label, axis=1)
    return {"x": pixels.reshape(-1, *shape), "y": labels.astype(np.int64)}


def _read_rows(path: Path, opened: io.BufferedReader, columns: int) -> np.ndarray:
    """Returns the next rows, (n, columns); of whole numbers from 0 to 255 as uint8."""
    try:
        with warnings.catch_warnings(action="ignore"):  # At the end there are no more rows.
            rows = np.loadtxt(
                opened, np.float32, delimiter=",", max_rows=_ROWS, ndmin=2, quotechar='"'
            )
    except ValueError as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(
            f"Expected {columns} numbers in each row of {path}. Received: {reason}."
        ) from error
    if rows.size and rows.shape[1] != columns:
        raise DataError(
            f"Expected {columns} numbers in each row of {path}. Received: {rows.shape[1]}."
        )
    small = rows.astype(np.uint8) if rows.size and 0 <= rows.min() <= rows.max() <= 255 else rows
    return small if (small == rows).all() else rows


def _shape(path: Path, pixels: int) -> tuple[int, ...]:
    for channels, shape in ((1, ()), (3, (3,))):
        side = math.isqrt(pixels // channels)
        if side and channels * side * side == pixels:
            return side, side, *shape
    raise DataError(
        f"Expected a label and the pixels of a square image in each row of {path}. Received: "
        f"{pixels + 1} columns. Save other shapes with numpy.savez."
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
