"""A data set of arrays: in memory, or files that are mapped into it.

dataset = ArrayDataset((x, y))
dataset = ArrayDataset(({"image": images, "text": texts}, labels, sample_weight))
dataset = ArrayDataset((np.load("x.npy", mmap_mode="r"), np.load("y.npy")))
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trainer.data.dataset import Dataset
from trainer.errors import DataError, UsageError
from trainer.machine import ALIGNMENT
from trainer.runtime import keras, tf

_BLOCK = 2**24  # Bytes of an array that are read at once.


class ArrayDataset(Dataset):
    """The rows of arrays. None is copied whole where TensorFlow can use its memory.

    Args:
        arrays: ``(x, y)`` or ``(x, y, sample_weight)``: each an array (n, ...), or a list, tuple or
            dictionary of them.
        name: What messages call them.
        classes: Names of the classes, in the order of their numbers.

    Raises:
        DataError: Arrays differ in length, have none, or are none of numbers.
        UsageError: It is no such tuple.
    """

    def __init__(
        self, arrays: tuple, name: str = "data", classes: Sequence[str] | None = None
    ) -> None:
        self.length = _check(arrays, name)
        self.arrays = arrays
        self.classes = classes

    def __len__(self) -> int:
        return self.length

    @functools.cached_property
    def tensors(self) -> Any:
        """The arrays as tensors, in the structure of ``spec``. Made at first use: several workers
        are connected before TensorFlow makes any.
        """
        with tf.device("CPU:0"):
            return _map_arrays(tensor, self.arrays)

    @functools.cached_property
    def spec(self) -> tuple:
        """Shapes and dtypes of a row. (Even a ``tf.device`` would start TensorFlow's devices.)"""
        return _map_arrays(_row_spec, self.arrays)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the arrays: their places, types, shapes and bytes."""
        digest = hashlib.sha256()
        for path, array in keras.tree.flatten_with_path(self.arrays):
            array = np.asarray(array)
            digest.update(f"{path} {array.dtype.str} {array.shape} ".encode())
            for start in range(0, len(array), rows := _rows_of(_BLOCK, array)):
                part = np.ascontiguousarray(array[start : start + rows])
                digest.update(part.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def batches(self, numbers: np.ndarray, batch_size: int) -> tf.data.Dataset:
        """Returns rows of the arrays, each batch in one gather."""
        tensors = self.tensors  # Outside of the graph.

        def gather(rows: tf.Tensor) -> Any:
            return tf.nest.map_structure(lambda array: tf.gather(array, rows), tensors)

        rows = tf.data.Dataset.from_tensor_slices(numbers).batch(batch_size)
        return rows.map(gather, num_parallel_calls=tf.data.AUTOTUNE)


def tensor(array: np.ndarray) -> tf.Tensor:
    """Returns an array as a tensor in the host's memory: the same memory where TensorFlow can use
    it, else a copy.
    """
    usable = array.flags.c_contiguous and array.flags.writeable
    if usable and array.ctypes.data % ALIGNMENT == 0:
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.convert_to_tensor(array)


def _map_arrays(function: Callable[[np.ndarray], Any], arrays: Any) -> Any:
    """Applies a function to arrays in any structure. Lists become tuples, since tf.data takes a
    list for the rows of one tensor.
    """
    if isinstance(arrays, dict):
        return {name: _map_arrays(function, value) for name, value in arrays.items()}
    if isinstance(arrays, (list, tuple)):
        return tuple(_map_arrays(function, value) for value in arrays)
    return function(_writable(np.asanyarray(arrays)))


def _row_spec(array: np.ndarray) -> tf.TensorSpec:
    return tf.TensorSpec(array.shape[1:], tf.as_dtype(array.dtype))


def _writable(array: np.ndarray) -> np.ndarray:
    """Maps a file once more, privately, that is mapped for reading: TensorFlow takes no memory
    without a copy that cannot be written to.
    """
    whole = array
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    if not isinstance(whole, np.memmap) or whole.mode != "r" or not whole.filename:
        return array
    if not array.flags.c_contiguous:
        return array
    offset = whole.offset + array.ctypes.data - whole.ctypes.data
    return np.memmap(whole.filename, array.dtype, "c", offset, array.shape)


def _rows_of(size: int, array: np.ndarray) -> int:
    """Returns how many rows of an array have a size in bytes."""
    return max(1, size * len(array) // max(array.nbytes, 1))


def _check(data: Any, name: str) -> int:
    """Returns the number of examples."""
    if not isinstance(data, tuple) or len(data) not in (2, 3):
        raise UsageError(
            f"{name} must be (x, y) or (x, y, sample_weight). Received: {type(data).__name__}"
            f"{f' of {len(data)}' if isinstance(data, tuple) else ''}."
        )
    arrays = [np.asarray(array) for array in keras.tree.flatten(data)]
    for array in arrays:
        if array.dtype == object or not array.ndim:
            raise DataError(
                f"Expected arrays of numbers, examples first, in {name}. Received: "
                f"{f'objects of shape {array.shape}' if array.ndim else 'one number'}. Rows of "
                "different lengths need padding."
            )
    counts = {len(array) for array in arrays}
    if len(counts) != 1 or not max(counts):
        raise DataError(
            f"Expected arrays of one length in {name}. Received: {sorted(counts)} examples."
        )
    return counts.pop()
