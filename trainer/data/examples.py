"""What a user gives as data, as a data set.

examples((x, y))            # arrays
examples(object)            # anything with __len__ and __getitem__
examples(dataset)           # a Dataset of this package, as it is
examples(tf_dataset)        # a tf.data.Dataset: a Stream
"""

from typing import Any

import numpy as np

from trainer.data.arrays import ArrayDataset
from trainer.data.dataset import Dataset
from trainer.data.objects import ObjectDataset, is_random_access
from trainer.data.streams import Stream
from trainer.errors import UsageError
from trainer.runtime import keras, tf


def examples(data: Any, name: str = "data") -> Dataset | Stream:
    """Returns a data set.

    Args:
        data: Arrays ``(x, y)`` or ``(x, y, sample_weight)``; an object whose items are examples; a
            ``Dataset``; a ``tf.data.Dataset`` of batches.
        name: What messages call it.

    Raises:
        UsageError: It is none of them.
        DataError: It has no examples, or they do not belong together.
    """
    if isinstance(data, Dataset):
        return data
    if isinstance(data, tf.data.Dataset):
        return Stream(data, name)
    if isinstance(data, keras.utils.PyDataset):
        raise UsageError(
            f"{name} must have examples by number. Received: {type(data).__name__}, a PyDataset, "
            "whose items are batches. Give an object whose __getitem__ returns one example."
        )
    arrays = isinstance(data, (tuple, list, dict, np.ndarray, tf.Tensor, str))
    if not arrays and is_random_access(data):
        return ObjectDataset(data, name)
    return ArrayDataset(data, name)
