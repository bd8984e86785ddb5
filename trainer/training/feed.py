"""What the steps of a training or an evaluation are fed: the batches of each epoch, from a step on.

training, validation = load(data, validation_data, validation_split, class_weight)
feed = Feed(training, batch_size, shard, seed=0)
feed.steps, feed(epoch=3, first_step=100)
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from trainer.data import dataset, pipeline
from trainer.data.dataset import ClassWeighted, Dataset
from trainer.data.examples import examples
from trainer.data.order import epoch_order
from trainer.data.pipeline import Shard
from trainer.data.streams import Stream
from trainer.distributed.collectives import Workers
from trainer.distributed.strategy import check_batch_size
from trainer.errors import DataError, UsageError
from trainer.runtime import keras, tf

Data: TypeAlias = Any  # What data.examples takes.


def load(
    data: Data,
    validation_data: Data | None,
    validation_split: float,
    class_weight: Mapping[int, float] | None,
    *,
    seed: int = 0,
) -> tuple[Dataset | Stream, Dataset | Stream | None]:
    """Returns what is trained and what is evaluated on; arguments as ``trainer.fit`` has them.

    Args:
        data: What is trained on.
        validation_data: What is evaluated on after each epoch.
        validation_split: Share of ``data`` that is kept for that.
        class_weight: Weights by class number.
        seed: Of the choice of that share.

    Raises:
        UsageError: An argument has a value that it cannot have.
        DataError: The data do not belong together.
    """
    if not 0 <= validation_split < 1:
        raise UsageError(
            f"validation_split must be from 0 to less than 1. Received: {validation_split!r}."
        )
    training = examples(data)
    validation = None
    if validation_data is not None:
        validation = examples(validation_data, "validation_data")
        _check_same_spec(training, validation)
    if not validation_split and not class_weight:
        return training, validation
    if isinstance(training, Stream):
        raise UsageError(
            f"{'validation_split' if validation_split else 'class_weight'} is for data with "
            "examples by number. Received: a tf.data.Dataset. Use take() and skip(), or give "
            "sample weights."
        )
    if validation_split:
        chosen = seed if training.sorted_by_class else None
        training, validation = dataset.split(training, validation_split, seed=chosen)
    return ClassWeighted(training, class_weight) if class_weight else training, validation


def _check_same_spec(training: Dataset | Stream, validation: Dataset | Stream) -> None:
    """Checks that a model that takes the examples of one takes those of the other.

    Raises:
        DataError: Their shapes differ.
    """
    ours, theirs = (
        [tuple(spec.shape) for spec in keras.tree.flatten(part.spec[:2])]
        for part in (training, validation)
    )
    if ours != theirs:
        raise DataError(
            f"Expected validation_data of the shapes of data, {ours}. Received: {theirs}. "
            "Prepare both alike."
        )


class Feed:
    """The batches of each epoch, from a step on: those of this worker's replicas.

    Args:
        data: The examples.
        batch_size: Examples in a global batch.
        shard: The worker's replicas.
        seed: Of the order of each epoch; None: that of the data.
        augment: Changes the images of each batch; None: they stay as they are.

    Raises:
        UsageError: The batches do not divide among the replicas.
    """

    def __init__(
        self,
        data: Dataset | Stream,
        batch_size: int,
        shard: Shard,
        *,
        seed: int | None,
        augment: pipeline.Augment | None = None,
    ) -> None:
        self.data = data
        self.batch_size = batch_size
        self.shard = shard
        self.seed = seed
        self.augment = augment
        if isinstance(data, Stream):
            self.steps = data.steps
            return
        self.steps = math.ceil(len(data) / batch_size)
        check_batch_size(batch_size, shard.replicas)

    def __call__(self, epoch: int, first_step: int) -> tf.data.Dataset:
        """Returns the batches of an epoch from a step on."""
        if isinstance(self.data, Stream):
            return self.data.shard_batches(self.shard, first_step)
        order = np.arange(len(self.data))
        if self.seed is not None:
            order = epoch_order(len(self.data), self.seed, epoch)
        draw = None
        if self.augment:
            draw = functools.partial(self.augment.draw, seed=self.seed or 0, epoch=epoch)
        return pipeline.shard_batches(
            self.data,
            order,
            batch_size=self.batch_size,
            shard=self.shard,
            first_step=first_step,
            augment=self.augment,
            draw=draw,
        )


def shard_of(workers: Workers) -> Shard:
    """Returns what this worker reads of each batch."""
    local = workers.local_replicas
    return Shard(workers.index * local, local, workers.strategy.num_replicas_in_sync)


@contextlib.contextmanager
def reading_errors(*parts: Dataset | Stream | None) -> Iterator[None]:
    """Raises the error of an example that cannot be read in place of TensorFlow's."""
    try:
        yield
    except Exception as error:
        for part in parts:
            if isinstance(part, Dataset) and (reason := part.explain(error)) is not error:
                raise reason from None
        raise
