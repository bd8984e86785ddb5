"""Batches of examples, as tf.data, in an order that (seed, epoch) alone decides.

    for images, labels, sample_weight in train_batches(x, y, batch_size=128, seed=0, epoch=3): ...

Every batch has the same static shape. The last one of an epoch is filled up with rows whose
``sample_weight`` is 0, so that a step is compiled once, and also where only static shapes run.

The whole set is shuffled, not a window of it, by shuffling the numbers of the examples; a batch is
then one gather from the arrays in memory, which are the cache. ``bench/pipeline.py`` measures this
beside ``from_tensor_slices().cache().shuffle(60000).batch(128)``.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from trainer.data.sources import ALIGNMENT, Digits
from trainer.runtime import tf

Preprocess = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]
Augment = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


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
        x: Inputs, (n, ...).
        y: Labels, (n,).
        batch_size: Rows of a batch.
        seed: Seed of the order.
        epoch: Number of the epoch, counted from 0.
        augment: Applied to the inputs of each batch and a seed, int32 (2,), of its own.

    Returns:
        ceil(n / batch_size) batches ``(x, y, sample_weight)`` of shapes (batch_size, ...),
        (batch_size,) and float32 (batch_size,).
    """
    batches = _batches(x, y, batch_size, epoch_order(len(x), seed, epoch))
    if augment is None:
        return batches
    words = np.random.SeedSequence((seed, epoch, 1)).generate_state(2 * int(batches.cardinality()))
    seeds = tf.data.Dataset.from_tensor_slices(words.astype(np.int32).reshape(-1, 2))

    def augmented(batch: tuple[tf.Tensor, ...], seed: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return augment(batch[0], seed), *batch[1:]

    return (
        tf.data.Dataset.zip(batches, seeds)
        .map(augmented, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        .prefetch(tf.data.AUTOTUNE)
    )


def test_batches(x: np.ndarray, y: np.ndarray, *, batch_size: int) -> tf.data.Dataset:
    """Returns every example once, in the order of the arrays; else as ``train_batches``."""
    return _batches(x, y, batch_size, np.arange(len(x)))


@dataclasses.dataclass(frozen=True)
class Placed:
    """Data where the step reads it.

    Attributes:
        train: Inputs and labels for ``train_batches``.
        test: The same for ``test_batches``.
        preprocess: For ``loop.fit``.
        augment: For ``train_batches``.
    """

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    preprocess: Preprocess
    augment: Augment | None


def place(
    digits: Digits,
    *,
    strategy: tf.distribute.Strategy | None,
    preprocess: Preprocess,
    augment: Augment | None,
) -> Placed:
    """Copies images and labels to every device of a strategy, once; the step then gathers its
    batches there, and what comes from the host are their numbers, a few hundred bytes.

    Args:
        digits: The data.
        strategy: Whose devices; None: the images stay in the host's memory.
        preprocess: Applied to the images and labels of a batch.
        augment: Applied to training images by the host, which they then come from.
    """
    train, test = (digits.x_train, digits.y_train), (digits.x_test, digits.y_test)
    if strategy is None or augment:
        return Placed(train, test, preprocess, augment)
    with strategy.scope():
        images, labels = (
            tf.Variable(np.concatenate(parts), trainable=False)
            for parts in zip(train, test, strict=True)
        )

    def gather(numbers: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return preprocess(tf.gather(images, numbers), tf.gather(labels, numbers))

    numbers = np.arange(len(digits.x_train) + len(digits.x_test), dtype=np.int32)
    first, last = np.split(numbers, [len(digits.x_train)])
    return Placed((first, first), (last, last), gather, None)


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of an epoch: a permutation of 0 to n - 1, as a function of its arguments.

    The numbers are sorted by random 64-bit keys: Philox (Salmon et al., 2011,
    https://doi.org/10.1145/2063384.2063405) seeded by a SeedSequence. NumPy keeps both streams
    unchanged from version to version, which it does not promise for ``Generator.permutation``.

    >>> epoch_order(5, seed=0, epoch=0).tolist()
    [0, 3, 1, 2, 4]
    """
    keys = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(n)
    return np.argsort(keys, kind="stable")


def _batches(x: np.ndarray, y: np.ndarray, batch_size: int, order: np.ndarray) -> tf.data.Dataset:
    steps = -(-len(order) // batch_size)
    rows = np.zeros(steps * batch_size, np.int32)
    rows[: len(order)] = order
    sample_weight = np.zeros(steps * batch_size, np.float32)
    sample_weight[: len(order)] = 1.0
    # Tensors outside the mapped function: inside, they would be copied into its graph. Where
    # tf.data works, which is not on a GPU.
    with tf.device("CPU:0"):
        x, y = _tensor(x), _tensor(y)

    def gather(rows: tf.Tensor, sample_weight: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return tf.gather(x, rows), tf.gather(y, rows), sample_weight

    # Both of TensorFlow 2.21: the first rewrites what is already as it should be, and copies the
    # arrays for it; the thread of the second can oversleep the end of an epoch by 5 to 60 seconds.
    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    options.autotune.enabled = False
    return (
        tf.data.Dataset.from_tensor_slices(
            (rows.reshape(steps, -1), sample_weight.reshape(steps, -1))
        )
        .map(gather, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        .prefetch(tf.data.AUTOTUNE)
        .with_options(options)
    )


def _tensor(array: np.ndarray) -> tf.Tensor:
    """Returns an array as a tensor: the same memory where TensorFlow can use it, else a copy."""
    usable = array.flags.c_contiguous and array.flags.writeable
    if usable and array.ctypes.data % ALIGNMENT == 0:
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.convert_to_tensor(array)
