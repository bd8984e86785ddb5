"""A data set whose inputs are in the memory of the devices that train on them.

    resident = place(dataset, strategy)     # None: they do not fit
    for numbers, y in resident.batches(np.array([7, 3, 5]), batch_size=2):
        x = resident.inputs(numbers)        # in the step

The host sends the numbers of examples, a few hundred bytes a batch.
"""

import numpy as np

from trainer.data.arrays import ArrayDataset
from trainer.data.dataset import Dataset, Derived
from trainer.runtime import tf

_TOGETHER = 1024  # Examples that are read at once.


class Resident(Derived):
    """A data set whose batches have the numbers of its examples in place of their inputs.

    Args:
        dataset: The whole, of one input.
        images: Its inputs, on every device.
        others: The numbers, int32, and its other components.
    """

    def __init__(self, dataset: Dataset, images: tf.Variable, others: ArrayDataset) -> None:
        super().__init__(dataset)
        self.images = images
        self.others = others

    @property
    def spec(self) -> tuple:
        """A number, int32, and the other components."""
        return self.others.spec

    def batches(self, numbers: np.ndarray, batch_size: int) -> tf.data.Dataset:
        """Returns batches of numbers and other components."""
        return self.others.batches(numbers, batch_size)

    def inputs(self, numbers: tf.Tensor) -> tf.Tensor:
        """Returns the inputs of examples, on the device where this is called."""
        return tf.gather(self.images, numbers)


def place(dataset: Dataset, strategy: tf.distribute.Strategy) -> Resident | None:
    """Copies the inputs of a data set to every device of a strategy, if at least as much of its
    memory stays free, for the training.

    Args:
        dataset: Of examples ``(x, y)``, x one tensor, all of which fit into the host's memory.
        strategy: What trains on it.
    """
    spec = dataset.spec[0]
    x = np.empty((len(dataset), *spec.shape), spec.dtype.as_numpy_dtype)
    others, start = [], 0
    for images, *rest in dataset.batches(np.arange(len(dataset)), _TOGETHER):
        x[start : start + len(images)] = images
        start += len(images)
        others.append([part.numpy() for part in rest])
    try:
        with strategy.scope():
            placed = tf.Variable(x, trainable=False)
        tf.zeros((x.nbytes,), tf.uint8)
    except tf.errors.ResourceExhaustedError:
        return None
    columns = [np.concatenate(column) for column in zip(*others, strict=True)]
    return Resident(dataset, placed, ArrayDataset((np.arange(len(x), dtype=np.int32), *columns)))
