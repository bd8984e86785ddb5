"""A data set of any Python object with ``__len__`` and ``__getitem__``.

    class Pairs:
        def __len__(self): return 100_000
        def __getitem__(self, number): return x, y      # of one example

    dataset = ObjectDataset(Pairs())

This is what PyTorch calls a map-style data set and Grain a random access data source.
"""

import functools
import hashlib
import threading
from typing import Any

import numpy as np

from trainer.data.dataset import Dataset
from trainer.errors import DataError, TrainerError, UsageError
from trainer.machine import available_cpus
from trainer.runtime import keras, tf


class ObjectDataset(Dataset):
    """The items of an object.

    Items are read ahead by several threads, each of which reads a batch: by ``__getitems__(list of
    numbers)``, which returns a list of items, where the object has it. Its digest is its attribute
    ``digest``, if it has one; else it is made of the class, the length, and the first, the middle
    and the last item.

    Args:
        items: Returns for a number ``(x, y)`` or ``(x, y, sample_weight)``, always of the same
            shapes: each an array, or a list, tuple or dictionary of them. It may be called by
            several threads at a time.
        name: What messages call it.

    Raises:
        UsageError: An item is no such tuple.
        DataError: There are none; or the first one is not of numbers.
    """

    def __init__(self, items: Any, name: str = "data") -> None:
        self.items = items
        self.name = f"{name}, {type(items).__name__}"
        self.length = len(items)
        if not self.length:
            raise DataError(f"Expected examples in {self.name}. Received: none.")
        self.error: Exception | None = None
        self.lock = threading.Lock()
        first = self._read([0])[0]
        if not isinstance(first, tuple) or len(first) not in (2, 3):
            raise UsageError(
                f"{self.name} must return (x, y) or (x, y, sample_weight) for a number. Received: "
                f"{type(first).__name__}{f' of {len(first)}' if isinstance(first, tuple) else ''}."
            )
        self._spec = tf.nest.map_structure(_spec_of, _tuples(first))
        self.flat = tf.nest.flatten(self._spec)
        for spec in self.flat:
            if spec.dtype == tf.string:
                raise DataError(
                    f"Expected numbers in {self.name}. Received: text. Use a layer's adapt() or "
                    "keras.layers.TextVectorization before."
                )
        self.classes = getattr(items, "classes", None)

    def __len__(self) -> int:
        return self.length

    @property
    def spec(self) -> tuple:
        """Shapes and dtypes of the first item."""
        return self._spec

    @functools.cached_property
    def digest(self) -> str:
        """The object's own, or that of three items."""
        if own := getattr(self.items, "digest", None):
            return str(own() if callable(own) else own)
        digest = hashlib.sha256(f"{type(self.items).__qualname__} {self.length}".encode())
        for number in sorted({0, self.length // 2, self.length - 1}):
            for array in self._arrays(number, self._read([number])[0]):
                digest.update(f"{array.dtype.str} {array.shape} ".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def batches(self, numbers: np.ndarray, batch_size: int) -> tf.data.Dataset:
        """Returns items in batches."""
        self.error = None

        def read(numbers: np.ndarray) -> list[np.ndarray]:
            try:
                items = self._read(numbers.tolist())
                rows = [self._arrays(*pair) for pair in zip(numbers, items, strict=True)]
                return [np.stack(column) for column in zip(*rows, strict=True)]
            except Exception as error:
                with self.lock:
                    self.error = self.error or error  # TensorFlow passes on its text alone.
                raise

        def components(numbers: tf.Tensor) -> Any:
            flat = tf.numpy_function(read, [numbers], [spec.dtype for spec in self.flat])
            shaped = [
                tf.ensure_shape(part, (None, *spec.shape))
                for part, spec in zip(flat, self.flat, strict=True)
            ]
            return tf.nest.pack_sequence_as(self._spec, shaped)

        rows = tf.data.Dataset.from_tensor_slices(numbers).batch(batch_size)
        return rows.map(components, num_parallel_calls=available_cpus(), deterministic=True)

    def explain(self, error: Exception) -> Exception:
        """Returns the error that reading an item has raised."""
        return self.error or error if isinstance(error, tf.errors.OpError) else error

    def _read(self, numbers: list[int]) -> list:
        several = getattr(self.items, "__getitems__", None)
        at = numbers[0]
        try:
            if several:
                return list(several(numbers))
            items = []
            for at in numbers:  # For the message.
                items.append(self.items[at])
        except TrainerError:
            raise
        except Exception as error:
            which = f"{len(numbers)} examples from {at}" if several else f"example {at}"
            raise DataError(
                f"Expected {self.name} to return {which}. Received: {type(error).__name__}: "
                f"{error}."
            ) from error
        return items

    def _arrays(self, number: int, item: Any) -> list[np.ndarray]:
        """Returns the components of an item, of the shapes and dtypes of the first one.

        Raises:
            DataError: They are others.
        """
        try:
            tf.nest.assert_same_structure(self._spec, found := _tuples(item))
        except (TypeError, ValueError) as error:
            raise DataError(
                f"Expected example {number} of {self.name} to have the components of the first "
                f"one. Received: {type(item).__name__} of others. Return the same for every number."
            ) from error
        arrays = []
        for value, spec in zip(tf.nest.flatten(found), self.flat, strict=True):
            array = np.asarray(value)
            if array.shape != tuple(spec.shape):
                raise DataError(
                    f"Expected example {number} of {self.name} to have the shape of the first one, "
                    f"{tuple(spec.shape)}. Received: {array.shape}. Resize or pad it."
                )
            arrays.append(array.astype(spec.dtype.as_numpy_dtype, copy=False))
        return arrays


def is_random_access(value: Any) -> bool:
    """Tells whether examples of an object can be read by their number."""
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


def _spec_of(value: Any) -> tf.TensorSpec:
    array = np.asarray(value)
    if array.dtype == object:
        raise DataError(
            f"Expected arrays of numbers. Received: {type(value).__name__}. Rows of different "
            "lengths need padding."
        )
    if isinstance(value, float):  # Keras' own dtype, as for a list of them.
        return tf.TensorSpec((), keras.config.floatx())
    return tf.TensorSpec(array.shape, array.dtype)


def _tuples(value: Any) -> Any:
    """Returns a structure with tuples for its lists, which are structures here."""
    if isinstance(value, dict):
        return {name: _tuples(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(map(_tuples, value))
    return value
