"""The digits: validated arrays of images and labels, with their SHA-256.

    digits = Digits(x_train, y_train, x_test, y_test)
    digits.sha256
    digits.first(1000, None)            # the first 1,000 training images, all test images

``trainer.data.sources`` loads one.
"""

import dataclasses
import functools
import hashlib

import numpy as np

from trainer.errors import DataError, UsageError
from trainer.machine import ALIGNMENT, aligned_empty

IMAGE_SHAPE = (28, 28)
NUM_CLASSES = 10

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
PAIRS = (("x_train", "y_train"), ("x_test", "y_test"))


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images and labels for training and for testing.

    Attributes:
        x_train: Training images, uint8 (n, 28, 28), 0 for background and 255 for ink; n is 0 where
            a source has none.
        y_train: Their labels, integers (n,) from 0 to 9; kept as uint8.
        x_test: Test images, as ``x_train``.
        y_test: Their labels, as ``y_train``.

    Raises:
        DataError: An array has another shape or dtype, a label is out of range, or there are not
            as many labels as images.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    def __post_init__(self) -> None:
        for images, labels in PAIRS:
            _check_images(images, getattr(self, images))
            _check_labels(labels, getattr(self, labels))
            counts = len(getattr(self, images)), len(getattr(self, labels))
            if counts[0] != counts[1]:
                raise DataError(
                    f"Expected one label for each image. Received: {counts[0]} images in {images} "
                    f"and {counts[1]} labels in {labels}."
                )
            _check_range(labels, getattr(self, labels))
            object.__setattr__(self, images, _aligned(getattr(self, images)))
            object.__setattr__(self, labels, _aligned(getattr(self, labels).astype(np.uint8)))

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 over the names, dtypes, shapes and bytes of the four arrays: equal for equal
        data, whatever file it came from.
        """
        digest = hashlib.sha256()
        for name in ARRAYS:
            array = getattr(self, name)
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def first(self, train: int | None, test: int | None) -> "Digits":
        """Returns the first ``train`` training and ``test`` test examples; None means all.

        Raises:
            UsageError: There are fewer examples than that.
        """
        for name, limit, have in (
            ("train_limit", train, len(self.x_train)),
            ("test_limit", test, len(self.x_test)),
        ):
            if limit is not None and limit > have:
                raise UsageError(
                    f"{name} must be at most the {have} examples there are. "
                    f"Received: {name}={limit}. Leave it out to use them all."
                )
        return Digits(
            self.x_train[:train], self.y_train[:train], self.x_test[:test], self.y_test[:test]
        )


def _check_images(name: str, images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.shape[1:] != IMAGE_SHAPE:
        raise DataError(
            f"Expected {name} as uint8 of shape (n, 28, 28). "
            f"Received: {images.dtype} of shape {images.shape}."
        )


def _check_labels(name: str, labels: np.ndarray) -> None:
    # By kind: to NumPy a timedelta64 is an integer, too.
    if labels.dtype.kind not in "iu" or len(labels.shape) != 1:
        raise DataError(
            f"Expected {name} as integers of shape (n,). "
            f"Received: {labels.dtype} of shape {labels.shape}."
        )


def _check_range(name: str, labels: np.ndarray) -> None:
    if len(labels) and not 0 <= labels.min() <= labels.max() < NUM_CLASSES:
        raise DataError(
            f"Expected labels from 0 to {NUM_CLASSES - 1} in {name}. "
            f"Received: labels from {labels.min()} to {labels.max()}."
        )


def _aligned(array: np.ndarray) -> np.ndarray:
    """Returns the array, or an aligned copy, whose memory TensorFlow can use without copying."""
    if array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0:
        return array
    aligned = aligned_empty(array.shape, array.dtype)
    aligned[...] = array
    return aligned
