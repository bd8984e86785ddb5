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
from typing import Any, Protocol

import numpy as np

from trainer.data.arrays import tensor
from trainer.data.dataset import Dataset
from trainer.data.digits import Digits
from trainer.data.order import epoch_order
from trainer.runtime import tf

DRAWN_AT_ONCE = 64 * 2**20  # bytes, of what is drawn for the augmentation of an epoch

Preprocess = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


class Augment(Protocol):
    """What changes training images: an ``augment.Augmentation``."""

    def draw(self, numbers: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Returns a row for each of the images of these numbers."""

    def __call__(self, images: tf.Tensor, drawn: tf.Tensor) -> Any:
        """Returns what takes the place of images, given their rows of what was drawn."""


class Deferred:
    """An augmentation that takes place later, on the device: returns images, or their numbers, and
    what was drawn for them.

    Args:
        augment: The augmentation.
    """

    def __init__(self, augment: Augment) -> None:
        self.draw = augment.draw

    def __call__(self, images: tf.Tensor, drawn: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns its arguments."""
        return images, drawn


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
        augment: Changes the inputs of each batch.

    Returns:
        ceil(n / batch_size) batches ``(x, y, sample_weight)`` of shapes (batch_size, ...),
        (batch_size,) and float32 (batch_size,).
    """
    order = epoch_order(len(x), seed, epoch)
    if augment is None:
        return _batches(x, y, batch_size, order)
    drawn = augment.draw(np.arange(len(x)), seed, epoch)
    return _batches(x, y, batch_size, order, augment, drawn)


def test_batches(x: np.ndarray, y: np.ndarray, *, batch_size: int) -> tf.data.Dataset:
    """Returns every example once, in the order of the arrays, in batches like those of
    ``train_batches``.
    """
    return _batches(x, y, batch_size, np.arange(len(x)))


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which part of each batch a worker reads: that of its replicas.

    Attributes:
        first_replica: Number of its first replica.
        local_replicas: Number of its replicas.
        replicas: Number of all replicas.
    """

    first_replica: int = 0
    local_replicas: int = 1
    replicas: int = 1

    def bounds(self, size: Any) -> tuple[Any, Any]:
        """Returns its first row in a batch of a size, and the one after its last: at least one row,
        of another worker where it has none.
        """
        last = self.first_replica + self.local_replicas
        start, end = (n * size // self.replicas for n in (self.first_replica, last))
        return start, (max if isinstance(size, int) else tf.maximum)(end, start + 1)


def shard_batches(
    dataset: Dataset,
    order: np.ndarray,
    *,
    batch_size: int,
    shard: Shard,
    first_step: int = 0,
    augment: Augment | None = None,
    draw: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tf.data.Dataset:
    """Returns a worker's rows of each batch from a step on; no other row is read.

    Args:
        dataset: The examples.
        order: Their numbers, int64 (n,), in the order of the epoch.
        batch_size: Examples in a global batch, a multiple of the replicas; the last one may have
            fewer.
        shard: The worker's share.
        first_step: Number of the first batch, counted from 0.
        augment: Changes the first component of each batch.
        draw: Returns the rows for it, float32, given the examples' numbers.

    Returns:
        Batches ``(*components, examples)``: the components of ``dataset.spec``, each of the length
        of the worker's share, and the number of examples in the global batch, int32.
    """
    order = order[first_step * batch_size :]
    whole = len(order) // batch_size
    parts = [
        order[: whole * batch_size].reshape(whole, batch_size),
        order[None, whole * batch_size :],
    ]
    sizes = np.full(-(-len(order) // batch_size), batch_size, np.int32)
    if whole < len(sizes):
        sizes[-1] = parts[1].size
    own = [order[:0]]
    for part in parts:
        if part.size:
            start, end = shard.bounds(part.shape[1])
            own.append(part[:, start:end].ravel())
    # Of all whole batches the share has the same length, and of the last one at most that.
    numbers, size = np.concatenate(own), batch_size * shard.local_replicas // shard.replicas
    batches = dataset.batches(numbers, size)
    if augment and draw:
        batches = tf.data.Dataset.zip(batches, _rows(draw, numbers, size)).map(
            lambda batch, rows: (augment(batch[0], rows), *batch[1:]),
            num_parallel_calls=tf.data.AUTOTUNE,
            deterministic=True,
        )
    pairs = tf.data.Dataset.zip(batches, tf.data.Dataset.from_tensor_slices(sizes))
    return configured(pairs.map(lambda batch, size: (*batch, size)))


def _rows(
    draw: Callable[[np.ndarray], np.ndarray], numbers: np.ndarray, batch_size: int
) -> tf.data.Dataset:
    """Returns in batches what is drawn for examples: of many of them not before it is needed."""
    width = draw(numbers[:1]).shape[1]
    if len(numbers) * width * 4 <= DRAWN_AT_ONCE:
        return tf.data.Dataset.from_tensor_slices(draw(numbers)).batch(batch_size)

    def drawn(numbers: tf.Tensor) -> tf.Tensor:
        rows = tf.numpy_function(draw, [numbers], tf.float32, stateful=False)
        return tf.ensure_shape(rows, (None, width))

    batches = tf.data.Dataset.from_tensor_slices(numbers).batch(batch_size)
    return batches.map(drawn, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


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
        notice = does_not_fit(sum(array.nbytes for array in (*train, *test)))
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
    later = Deferred(augment) if augment else None
    return DeviceDataset((first, first), (last, last), gather, later)


def does_not_fit(size: int) -> str:
    """Returns the sentence about images of that many bytes that the devices do not hold."""
    return (
        f"The images ({size / 2**20:,.0f} MiB) do not fit into the devices' memory beside the "
        "training: the host sends them batch by batch, with the same results in more time."
    )


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
        x, y = tensor(x), tensor(y)
        drawn = drawn if drawn is None else tensor(drawn)

    def gather(rows: tf.Tensor, sample_weight: tf.Tensor) -> tuple[Any, ...]:
        inputs = tf.gather(x, rows)
        if augment:
            inputs = augment(inputs, tf.gather(drawn, rows))
        return inputs, tf.gather(y, rows), sample_weight

    slices = (rows.reshape(steps, -1), sample_weight.reshape(steps, -1))
    return _mapped(tf.data.Dataset.from_tensor_slices(slices), gather)


def _mapped(rows: tf.data.Dataset, gather: Callable[..., Any]) -> tf.data.Dataset:
    """Returns the batches that are gathered for row numbers, ahead of the step."""
    return configured(rows.map(gather, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True))


def configured(batches: tf.data.Dataset) -> tf.data.Dataset:
    """Returns batches that are read ahead of the step."""
    # Both with TensorFlow 2.21: the default graph rewrites gain nothing here and copy the arrays;
    # the autotuning thread can delay the end of an epoch by 5 to 60 seconds.
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    options.autotune.enabled = False
    return batches.prefetch(tf.data.AUTOTUNE).with_options(options)
