"""A data set whose examples stay in memory once they have been read.

    dataset = Cached(ImageFolder("pictures"))

The first epoch reads and decodes each picture, and later ones none. Of several workers each keeps
what it has read itself, so that it still reads its own share of an epoch alone.
"""

import functools
import math
from typing import Any

import numpy as np

from trainer.data.arrays import tensor
from trainer.data.dataset import Dataset, Derived
from trainer.machine import aligned_empty
from trainer.runtime import tf

_TOGETHER = 32  # Examples that are read at once where others are in memory already.


class Cached(Derived):
    """The examples of a data set, in memory from their first use on.

    Args:
        dataset: The whole. Memory for all of its examples is reserved, and taken as they are read.
    """

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset)
        self.flat = tf.nest.flatten(dataset.spec)
        self.arrays = [
            aligned_empty((len(dataset), *spec.shape), spec.dtype.as_numpy_dtype)
            for spec in self.flat
        ]
        self.present = np.zeros(len(dataset), bool)

    @functools.cached_property
    def tensors(self) -> list[tf.Tensor]:
        """The memory of ``arrays``, as tensors."""
        with tf.device("CPU:0"):
            return [tensor(array) for array in self.arrays]

    def batches(self, numbers: np.ndarray, batch_size: int) -> tf.data.Dataset:
        """Returns batches; reads those of their examples that are not in memory yet."""
        present = self.present[numbers]
        if present.all():
            rows = tf.data.Dataset.from_tensor_slices(numbers).batch(batch_size)
            return self._gather(rows)
        if not present.any():
            return self._read(numbers, batch_size)
        # One by one: a batch has examples of both kinds.
        kept = self._gather(tf.data.Dataset.from_tensor_slices(numbers[present]))
        read = self._read(numbers[~present], _TOGETHER).unbatch()
        which = tf.data.Dataset.from_tensor_slices((~present).astype(np.int64))
        both = tf.data.Dataset.choose_from_datasets(
            [kept, read], which, stop_on_empty_dataset=False
        )
        # Of those two it is not known, nor of batches that are made in parallel.
        both = both.apply(tf.data.experimental.assert_cardinality(len(numbers)))
        return both.batch(batch_size)

    def _gather(self, rows: tf.data.Dataset) -> tf.data.Dataset:
        tensors = self.tensors

        def gather(rows: tf.Tensor) -> Any:
            return tf.nest.pack_sequence_as(self.spec, [tf.gather(part, rows) for part in tensors])

        return rows.map(gather, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def _read(self, numbers: np.ndarray, batch_size: int) -> tf.data.Dataset:
        """Returns batches of the whole, which are kept as they are read."""

        def store(numbers: np.ndarray, *parts: np.ndarray) -> np.ndarray:
            for array, part in zip(self.arrays, parts, strict=True):
                array[numbers] = part
            self.present[numbers] = True
            return numbers

        def keep(numbers: tf.Tensor, batch: Any) -> Any:
            flat = tf.nest.flatten(batch)
            stored = tf.numpy_function(store, [numbers, *flat], tf.int64)
            with tf.control_dependencies([stored]):
                return tf.nest.map_structure(tf.identity, batch)

        rows = tf.data.Dataset.from_tensor_slices(numbers).batch(batch_size)
        read = self.dataset.batches(numbers, batch_size)
        return tf.data.Dataset.zip(rows, read).map(keep)


def bytes_of(dataset: Dataset) -> int:
    """Returns what a data set takes in memory, as ``Cached`` keeps it."""
    each = sum(spec.dtype.size * math.prod(spec.shape) for spec in tf.nest.flatten(dataset.spec))
    return len(dataset) * each
