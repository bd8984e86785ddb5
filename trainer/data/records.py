"""A split of a TensorFlow data set, prepared as array_record files: its examples have numbers.

builder = tfds.builder("cifar10", file_format="array_record")
dataset = Records(builder, "train", image_size=None)
"""

import hashlib
from typing import Any

import numpy as np

from trainer.data.dataset import Dataset
from trainer.errors import DataError
from trainer.machine import available_cpus
from trainer.runtime import tf

_SCOPE = "Records"  # Of the operations that decode, in TensorFlow's errors.
_READ_AHEAD = 8  # Images a CPU.


class Records(Dataset):
    """One split's examples by number, decoded by TensorFlow.

    Args:
        builder: Of a data set that is prepared as array_record files.
        part: Name of the split.
        image_size: Height and width to which images are resized, bilinearly with antialiasing, as
            ``folders.ImageFolder`` does.
    """

    def __init__(self, builder: Any, part: str, image_size: tuple[int, int] | None) -> None:
        self.name = f"tfds:{builder.info.name}"
        self.image_size = image_size
        features = builder.info.features
        self.features = type(features)({name: features[name] for name in ("image", "label")})
        self.shape = tuple(features["image"].shape)
        self.classes = list(features["label"].names)
        # What is read from it are the bytes of examples.
        self.source = builder.as_data_source(split=part).data_source
        split = builder.info.splits[part]
        described = builder.info.full_name, part, split.shard_lengths, split.num_bytes, image_size
        self.sha256 = hashlib.sha256(repr(described).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.source)

    @property
    def spec(self) -> tuple:
        """Images (height, width, channels), uint8, or float32 from 0 to 255 where they are resized;
        and class numbers, int32.
        """
        height, width, channels = self.shape
        dtype = tf.float32 if self.image_size else tf.uint8
        size = self.image_size or (height, width)
        return tf.TensorSpec((*size, channels), dtype), tf.TensorSpec((), tf.int32)

    @property
    def digest(self) -> str:
        """Of name, version, and the split's files."""
        return self.sha256

    def batches(self, numbers: np.ndarray, batch_size: int) -> tf.data.Dataset:
        """Returns images and labels in batches, read and decoded in parallel."""

        def read(numbers: np.ndarray) -> np.ndarray:
            return np.array(self.source.__getitems__(numbers.tolist()), object)

        def records(numbers: tf.Tensor) -> tf.Tensor:
            return tf.ensure_shape(tf.numpy_function(read, [numbers], tf.string), (None,))

        def decode(record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            with tf.name_scope(_SCOPE):
                example = self.features.deserialize_example(record)
                image = example["image"]
                if self.image_size:
                    image = tf.image.resize(image, self.image_size, antialias=True)
                return tf.ensure_shape(image, self.spec[0].shape), tf.cast(
                    example["label"], tf.int32
                )

        threads = available_cpus()
        rows = tf.data.Dataset.from_tensor_slices(numbers).batch(batch_size)
        read_ahead = rows.map(records, num_parallel_calls=threads, deterministic=True).unbatch()
        # The length of what is unbatched is unknown to tf.data.
        counted = read_ahead.apply(tf.data.experimental.assert_cardinality(len(numbers)))
        decoded = counted.map(decode, num_parallel_calls=_READ_AHEAD * threads, deterministic=True)
        return decoded.batch(batch_size)

    def explain(self, error: Exception) -> Exception:
        """Says that an example cannot be read."""
        if not isinstance(error, tf.errors.OpError) or f"{_SCOPE}/" not in str(error):
            return error
        reason = " ".join(str(error).split())[:200]
        return DataError(f"Expected images in {self.name}. Received: {reason}. Prepare it anew.")
