"""A ``tf.data.Dataset`` of the user's own, which has no examples by number.

    stream = Stream(tf_dataset)

It is iterated over as it is: its batches, its order. So the whole-set shuffle and a resume that
reads nothing twice are not for it, and each worker reads all of it.
"""

import functools
import hashlib
from typing import Any

from trainer.data.pipeline import Shard, configured
from trainer.errors import DataError, UsageError
from trainer.runtime import tf


class Stream:
    """Batches of known number.

    Args:
        batches: Elements ``(x, y)`` or ``(x, y, sample_weight)``, batches as ``model.fit`` takes
            them.
        name: What messages call them.

    Attributes:
        steps: Number of batches.
        notice: A sentence for the user about what cannot be promised.

    Raises:
        UsageError: Elements are no such tuples.
        DataError: Their number is not known, or none.
    """

    notice = (
        "A tf.data.Dataset is read in its own order: the seed does not decide it, every worker "
        "reads all of it, and a resumed run reads again what came before, in the same order only "
        "if its shuffle has a seed and reshuffle_each_iteration=False. Data with rows by number "
        "(arrays, files, an object with __getitem__) have none of these limits."
    )

    def __init__(self, batches: tf.data.Dataset, name: str = "data") -> None:
        spec = batches.element_spec
        if not isinstance(spec, tuple) or len(spec) not in (2, 3):
            raise UsageError(
                f"{name} must be batches (x, y) or (x, y, sample_weight). Received: a "
                f"tf.data.Dataset of {type(spec).__name__}."
            )
        for part in tf.nest.flatten(spec):
            if part.shape.rank is None or part.shape.rank < 1 or None in part.shape[1:].as_list():
                raise DataError(
                    f"Expected batches of one shape in {name}. Received: {part.shape}. Use "
                    "batch() and padded_batch()."
                )
        self.batches = batches
        self.steps = int(batches.cardinality())
        if self.steps < 1:
            raise DataError(
                f"Expected a known number of batches in {name}. Received: "
                f"{ {-1: 'endless ones', 0: 'none'}.get(self.steps, 'an unknown number') }. Use "
                "take(), or apply(tf.data.experimental.assert_cardinality(n))."
            )

    @property
    def spec(self) -> tuple:
        """Shapes and dtypes of one example."""
        return tf.nest.map_structure(
            lambda part: tf.TensorSpec(part.shape[1:], part.dtype), self.batches.element_spec
        )

    @functools.cached_property
    def digest(self) -> str:
        """Of the number of batches and their spec: what is in them cannot be known before."""
        return hashlib.sha256(f"{self.steps} {self.spec}".encode()).hexdigest()

    def shard_batches(self, shard: Shard, first_step: int = 0) -> tf.data.Dataset:
        """Returns a worker's rows of each batch, as ``pipeline.shard_batches`` does."""

        def own(*batch: Any) -> tuple:
            size = tf.shape(tf.nest.flatten(batch)[0])[0]
            start, end = shard.bounds(size)
            return (*tf.nest.map_structure(lambda part: part[start:end], batch), size)

        return configured(self.batches.skip(first_step).map(own))
