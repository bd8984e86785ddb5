"""Images and labels as files hold them, and in the one form that is trained on.

    arrays = standardize({"x": images, "y": one_hot})       # uint8 (n, h, w, c), class numbers

Names are those of ``keras.datasets`` (x_train, y_train, x_test, y_test), or others that are in use
for the same. Images may be of any integer type from 0 to 255, or fractions from 0 to 1; labels
integers, or one-hot.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from trainer.errors import DataError
from trainer.machine import aligned_empty

PAIRS = (("x_train", "y_train"), ("x_val", "y_val"), ("x_test", "y_test"))

# Other names that are in use: of one pair of arrays alone, and of MedMNIST.
_OTHER_NAMES = {
    "x": "x_train",
    "y": "y_train",
    "train_images": "x_train",
    "train_labels": "y_train",
    "val_images": "x_val",
    "val_labels": "y_val",
    "test_images": "x_test",
    "test_labels": "y_test",
}
_BLOCK = 2**24  # Bytes of an array that are converted at once.
_NAMED = 5  # Classes that a message lists.


class Spec(Protocol):
    """Shape and dtype of an array, or of one that is still in its file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's."""

    @property
    def dtype(self) -> np.dtype:
        """The array's."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Images with the numbers of their classes.

    Attributes:
        arrays: ``{"x_train": ..., "y_train": ...}``, and of ``PAIRS`` what else there is: images
            uint8 (n, height, width, channels), labels int32 (n,).
        classes: The classes as they were numbered, in the order of their numbers here.
    """

    arrays: Mapping[str, np.ndarray]
    classes: range

    @property
    def are_digits(self) -> bool:
        """Whether the network for digits takes them: grey, 28×28, ten classes at most from 0."""
        shapes = {self.arrays[x].shape[1:] for x, _ in PAIRS if x in self.arrays}
        digits = shapes == {(28, 28, 1)} and "x_val" not in self.arrays
        return digits and self.classes.start == 0 and self.classes.stop <= 10


def canonical(names: Iterable[str]) -> dict[str, str]:
    """Returns which of the names are images or labels, by the names in ``PAIRS``."""
    names = list(names)
    found = {name: name for pair in PAIRS for name in pair if name in names}
    for other, name in _OTHER_NAMES.items():
        if other in names:
            found.setdefault(name, other)
    return found


def check_specs(specs: Mapping[str, Spec]) -> None:
    """Checks what can be checked before arrays are read.

    Args:
        specs: Arrays, or their shapes and dtypes, by the names in ``PAIRS``.

    Raises:
        DataError: One has another shape or dtype, or none belongs to it, or the images of two
            differ in shape.
    """
    shapes = {}
    for images, labels in PAIRS:
        if missing := {images, labels} - specs.keys():
            if len(missing) == 1:
                [there] = {images, labels} - missing
                raise DataError(
                    f"Expected {images} and {labels}. Received: {there} without {missing.pop()}."
                )
            continue
        shapes[images] = _check_images(images, specs[images])
        _check_labels(labels, specs[labels])
        if specs[images].shape[0] != specs[labels].shape[0]:
            raise DataError(
                f"Expected one label for each image. Received: {specs[images].shape[0]} images in "
                f"{images} and {specs[labels].shape[0]} labels in {labels}."
            )
    if not shapes:
        raise DataError("Expected images and labels. Received: neither.")
    if len(set(shapes.values())) > 1:
        raise DataError(
            "Expected images of one shape. Received: "
            + ", ".join(f"{shape} in {name}" for name, shape in shapes.items())
            + "."
        )


def _check_images(name: str, images: Spec) -> tuple[int, ...]:
    """Returns height, width and channels of images."""
    shape = tuple(images.shape)
    height_width_channels = (*shape[1:], 1) if len(shape) == 3 else shape[1:]
    fit = (
        images.dtype.kind in "uif"
        and len(height_width_channels) == 3
        and min(shape) >= 1
        and height_width_channels[2] in (1, 3)
    )
    if not fit:
        first = len(shape) == 4 and shape[1] in (1, 3)
        raise DataError(
            f"Expected {name} as numbers of shape (n, height, width) or (n, height, width, "
            f"channels), with n of at least 1, and 1 or 3 channels. Received: {images.dtype} of "
            f"shape {shape}."
            + (" Put the channels last with numpy.moveaxis(images, 1, -1)." if first else "")
        )
    return height_width_channels


def _check_labels(name: str, labels: Spec) -> None:
    # By kind: to NumPy a timedelta64 is an integer, too.
    integers = labels.dtype.kind in "iu" and len(labels.shape) == 1
    columns = labels.dtype.kind in "iuf" and len(labels.shape) == 2 and labels.shape[1] >= 1
    if not integers and not columns:
        raise DataError(
            f"Expected {name} as integers of shape (n,), or one-hot of shape (n, classes). "
            f"Received: {labels.dtype} of shape {labels.shape}."
        )


def standardize(arrays: Mapping[str, np.ndarray]) -> Images:
    """Returns images and labels in the form that is trained on.

    Args:
        arrays: As ``check_specs`` takes them.

    Raises:
        DataError: A value is none of an image or a label; a class has no example, or there is only
            one, and they are no digits.
    """
    check_specs(arrays)
    images = {name: _images(name, arrays[name]) for name, _ in PAIRS if name in arrays}
    labels = {name: _labels(name, arrays[name]) for _, name in PAIRS if name in arrays}
    low = min(int(part.min()) for part in labels.values())
    high = max(int(part.max()) for part in labels.values())
    if low < 0:
        raise DataError(f"Expected labels of at least 0. Received: labels from {low} to {high}.")
    first = 1 if low == 1 else 0  # As those of EMNIST's letters.
    found = Images({**images, **labels}, range(first, high + 1))
    if not found.are_digits:
        _check_classes(next(iter(labels.values())), found.classes)
    numbers = {name: (part - first).astype(np.int32) for name, part in labels.items()}
    return Images({**images, **numbers}, found.classes)


def _check_classes(labels: np.ndarray, classes: range) -> None:
    """Checks that there are examples of each class, and two classes.

    Raises:
        DataError: There are not.
    """
    present = np.unique(labels)
    if len(present) < len(classes):
        some = classes[: len(present) + _NAMED]
        absent = np.setdiff1d(np.array(some), present)[:_NAMED]
        raise DataError(
            f"Expected labels without gaps, from 0 to the number of classes less one. Received: "
            f"none of class {', '.join(map(str, absent))}, and labels up to {classes[-1]}. Number "
            "the classes that there are anew: numpy.unique(labels, return_inverse=True)."
        )
    if len(classes) < 2:
        raise DataError(f"Expected at least two classes. Received: only {classes[0]}.")


def _images(name: str, images: np.ndarray) -> np.ndarray:
    """Returns uint8 (n, height, width, channels)."""
    shape = images.shape if images.ndim == 4 else (*images.shape, 1)
    if images.dtype == np.uint8:
        return images.reshape(shape)
    if images.dtype.kind == "f" and not all(np.isfinite(part).all() for part in _blocks(images)):
        raise DataError(f"Expected finite values in {name}. Received: NaN or infinity.")
    low = min(part.min() for part in _blocks(images))
    high = max(part.max() for part in _blocks(images))
    if low < 0 or high > 255:
        raise DataError(
            f"Expected values from 0 to 255, or from 0 to 1, in {name}. Received: values from "
            f"{low:g} to {high:g}. Scale them to that; a model can normalize them itself, with "
            "keras.layers.Normalization."
        )
    scale = 255 if images.dtype.kind == "f" and high <= 1 else 1
    converted = aligned_empty(images.shape, np.uint8)
    at = 0
    for part in _blocks(images):
        converted[at : at + len(part)] = np.rint(part * scale) if scale != 1 else np.rint(part)
        at += len(part)
    return converted.reshape(shape)


def _labels(name: str, labels: np.ndarray) -> np.ndarray:
    """Returns integers (n,)."""
    if labels.ndim == 1:
        return labels.astype(np.int64)
    if labels.shape[1] == 1 and labels.dtype.kind in "iu":
        return labels[:, 0].astype(np.int64)
    if not np.isin(labels, (0, 1)).all() or not (labels.sum(axis=1) == 1).all():
        raise DataError(
            f"Expected one 1 in each row of {name}, and 0 elsewhere, as one-hot labels have it. "
            "Received: other values. Give class numbers, integers of shape (n,)."
        )
    return labels.argmax(axis=1)


def _blocks(array: np.ndarray) -> Iterable[np.ndarray]:
    rows = max(1, _BLOCK * len(array) // max(array.nbytes, 1))
    return (array[start : start + rows] for start in range(0, len(array), rows))
