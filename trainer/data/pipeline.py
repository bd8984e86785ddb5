"""Batches of examples as ``tf.data.Dataset``, in an order that seed and epoch alone determine.

    for images, labels, sample_weight in train_batches(x, y, batch_size=128, seed=0, epoch=3): ...

Every batch has the same static shape. The last one of an epoch is padded with rows whose
``sample_weight`` is 0, so that a step is compiled once, also by compilers that need static shapes.

The row numbers of the whole set are shuffled, and a batch is one gather from the arrays in memory,
so there is no shuffle buffer and no cache. ``bench/pipeline.py`` compares this with
``from_tensor_slices().cache().shuffle(60000).batch(128)``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from trainer.data.augment import draw
from trainer.data.dataset import Digits
from trainer.data.order import epoch_order
from trainer.machine import ALIGNMENT
from trainer.runtime import tf

Preprocess = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
Augment = Callable[[tf.Tensor, tf.Tensor], Any]


def train_batches(
    x: np.ndarray,
    y: np.ndarray,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    augment: Augment | None = None,
) -> tf.data.Dataset:
    """Returns one epoch of training batches, every example once, in ``epoch_order``.

    Args:
        x: Inputs, (n, ...), of any dtype.
        y: Labels, (n,).
        batch_size: Rows in a batch.
        seed: Seed of the order.
        epoch: Number of the epoch, counted from 0.
        augment: Called with the inputs of each batch and their rows of ``augment.draw``; what it
            returns takes the place of the inputs.

    Returns:
        ceil(n / batch_size) batches ``(x, y, sample_weight)`` of shapes (batch_size, ...),
        (batch_size,) and float32 (batch_size,).
    """
    order = epoch_order(len(x), seed, epoch)
    if augment is None:
        return _batches(x, y, batch_size, order)
    return _batches(x, y, batch_size, order, augment, draw(len(x), seed, epoch))


def test_batches(x: np.ndarray, y: np.ndarray, *, batch_size: int) -> tf.data.Dataset:
    """Returns every example once, in the order of the arrays, in batches like those of
    ``train_batches``.
    """
    return _batches(x, y, batch_size, np.arange(len(x)))


def tensors(arrays: Any) -> Any:
    """Returns arrays in any structure as tensors in the host's memory, for ``batches``: without a
    copy where TensorFlow can use the array's memory. Lists become tuples, since tf.data takes a
    list for the rows of one tensor.
    """
    if isinstance(arrays, dict):
        return {name: tensors(value) for name, value in arrays.items()}
    if isinstance(arrays, (list, tuple)):
        return tuple(map(tensors, arrays))
    with tf.device("CPU:0"):
        return _tensor(np.asarray(arrays))


def batches(arrays: Any, order: np.ndarray, *, batch_size: int) -> tf.data.Dataset:
    """Returns rows of arrays in batches; the last one may be shorter.

    Args:
        arrays: From ``tensors``, each (n, ...).
        order: Numbers of the rows.
        batch_size: Rows in a batch.

    Returns:
        Batches of the structure of ``arrays``, of shapes (batch_size, ...).
    """

    def gather(rows: tf.Tensor) -> Any:
        return tf.nest.map_structure(lambda array: tf.gather(array, rows), arrays)

    return _mapped(tf.data.Dataset.from_tensor_slices(order).batch(batch_size), gather)


@dataclasses.dataclass(frozen=True)
class DeviceDataset:
    """A data set in the memory that the training step reads from.

    Attributes:
        train: Inputs and labels for ``train_batches``.
        test: Inputs and labels for ``test_batches``.
        preprocess: Applied to the ``(x, y)`` of a batch, on the device.
        augment: The argument of ``train_batches``.
        notice: A sentence for the user, where the devices were to hold the data and cannot.
    """

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    preprocess: Preprocess
    augment: Augment | None
    notice: str = ""


def put_on_devices(
    digits: Digits,
    *,
    strategy: tf.distribute.Strategy | None,
    preprocess: Preprocess,
    augment: Augment | None,
) -> DeviceDataset:
    """Copies images and labels once to every device of a strategy, if at least as much of its
    memory stays free. The step then gathers its batches there, and the host sends only their row
    numbers, a few hundred bytes. Where there is less memory, the images stay on the host.

    Args:
        digits: The data.
        strategy: The strategy whose devices receive it; None: the images stay in host memory.
        preprocess: Applied to the images and labels of a batch.
        augment: Applied to training images, as in ``train_batches``.
    """
    train, test = (digits.x_train, digits.y_train), (digits.x_test, digits.y_test)
    if strategy is None:
        return DeviceDataset(train, test, preprocess, augment)
    placed = _place(train, test, strategy)
    if placed is None:
        size = sum(array.nbytes for array in (*train, *test)) / 2**20
        notice = (
            f"The images ({size:,.0f} MiB) do not fit into the devices' memory beside the "
            "training: the host sends them batch by batch, with the same results in more time."
        )
        return DeviceDataset(train, test, preprocess, augment, notice)
    images, labels = placed

    def gather(numbers: Any, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        if augment and isinstance(numbers, tuple):
            numbers, drawn = numbers
            x = augment(tf.gather(images, numbers), drawn)
        else:
            x = tf.gather(images, numbers)
        return preprocess(x, tf.gather(labels, numbers))

    numbers = np.arange(len(digits.x_train) + len(digits.x_test), dtype=np.int32)
    first, last = np.split(numbers, [len(digits.x_train)])
    # What is drawn goes to the device beside the row numbers.
    pair = (lambda numbers, drawn: (numbers, drawn)) if augment else None
    return DeviceDataset((first, first), (last, last), gather, pair)


def _place(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    strategy: tf.distribute.Strategy,
) -> tuple[tf.Variable, tf.Variable] | None:
    """Returns all inputs and all labels on every device of a strategy; None where that does not
    leave as much memory as it takes, for the training itself.
    """
    x, y = (np.concatenate(parts) for parts in zip(train, test, strict=True))
    try:
        with strategy.scope():
            placed = tf.Variable(x, trainable=False), tf.Variable(y, trainable=False)
        tf.zeros((x.nbytes,), tf.uint8)
    except tf.errors.ResourceExhaustedError:
        return None
    return placed


def _batches(
    x: np.ndarray,
    y: np.ndarray,
    batch_size: int,
    order: np.ndarray,
    augment: Augment | None = None,
    drawn: np.ndarray | None = None,
) -> tf.data.Dataset:
    steps = -(-len(order) // batch_size)
    rows = np.zeros(steps * batch_size, np.int32)
    rows[: len(order)] = order
    sample_weight = np.zeros(steps * batch_size, np.float32)
    sample_weight[: len(order)] = 1.0
    # Made outside the mapped function, which would copy arrays into its graph as constants; and on
    # the host, where tf.data runs.
    with tf.device("CPU:0"):
        x, y = _tensor(x), _tensor(y)
        drawn = drawn if drawn is None else _tensor(drawn)

    def gather(rows: tf.Tensor, sample_weight: tf.Tensor) -> tuple[Any, ...]:
        inputs = tf.gather(x, rows)
        if augment:
            inputs = augment(inputs, tf.gather(drawn, rows))
        return inputs, tf.gather(y, rows), sample_weight

    slices = (rows.reshape(steps, -1), sample_weight.reshape(steps, -1))
    return _mapped(tf.data.Dataset.from_tensor_slices(slices), gather)


def _mapped(rows: tf.data.Dataset, gather: Callable[..., Any]) -> tf.data.Dataset:
    """Returns the batches that are gathered for row numbers, ahead of the step."""
    # Both with TensorFlow 2.21: the default graph rewrites gain nothing here and copy the arrays;
    # the autotuning thread can delay the end of an epoch by 5 to 60 seconds.
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    options.autotune.enabled = False
    return (
        rows.map(gather, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        .prefetch(tf.data.AUTOTUNE)
        .with_options(options)
    )


def _tensor(array: np.ndarray) -> tf.Tensor:
    """Returns an array as a tensor: the same memory where TensorFlow can use it, else a copy."""
    usable = array.flags.c_contiguous and array.flags.writeable
    if usable and array.ctypes.data % ALIGNMENT == 0:
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.convert_to_tensor(array)
