"""Collective operations of a run's workers: sum, gather, broadcast.

    workers = Workers(strategy)
    workers.count, workers.index            # 2, 0
    workers.broadcast(b"from worker 0")     # the same bytes on every worker

All of them are built on the all-reduce of the workers' strategy.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from trainer.runtime import tf


def all_reduce(operation: tf.distribute.ReduceOp, values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Returns the sums or means of tensors over all replicas; called in the replica context.

    Those of one dtype are reduced together, since TensorFlow packs what it is given at once.
    """
    replica = tf.distribute.get_replica_context()
    reduced: dict[int, tf.Tensor] = {}
    for dtype in dict.fromkeys(value.dtype for value in values):
        numbers = [number for number, value in enumerate(values) if value.dtype == dtype]
        parts = replica.all_reduce(operation, [values[number] for number in numbers])
        reduced |= zip(numbers, parts, strict=True)
    return [reduced[number] for number in range(len(values))]


class Workers:
    """The collective operations of the workers of a strategy.

    Every worker must call the same methods in the same order; a lone process exchanges nothing.

    Args:
        strategy: A ``MultiWorkerMirroredStrategy``, or any strategy of one process.

    Attributes:
        count: Number of workers.
        index: Number of this worker, counted from 0.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self.strategy = strategy
        self.count, self.index = 1, 0
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            resolver = strategy.cluster_resolver
            self.count = len(resolver.cluster_spec().as_dict()["worker"])
            self.index = resolver.task_id

    @property
    def local_replicas(self) -> int:
        """Number of replicas in this process."""
        return self.strategy.num_replicas_in_sync // self.count

    def sum(self, values: tf.Tensor) -> tf.Tensor:
        """Returns the sum of every worker's ``values``, a tensor of one shape and dtype on all of
        them. Call it inside a ``tf.function``.
        """
        if self.count == 1:
            return values

        def of_replica(values: tf.Tensor) -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            # One replica of each worker contributes.
            first = context.replica_id_in_sync_group % self.local_replicas == 0
            values = tf.where(first, values, tf.zeros_like(values))
            return context.all_reduce(tf.distribute.ReduceOp.SUM, values)

        return self.strategy.experimental_local_results(self.strategy.run(of_replica, (values,)))[0]

    def gather(self, value: int) -> list[int]:
        """Returns every worker's ``value``, a 32-bit integer, in the order of the workers."""
        values = np.zeros(self.count, np.int32)
        values[self.index] = value
        return self._sum(values).tolist()

    def first(self, value: int) -> int:
        """Returns worker 0's ``value``, a 32-bit integer."""
        return self.gather(value)[0]

    def differing(self, content: bytes) -> list[int]:
        """Returns the numbers of the workers that have another content than worker 0.

        Args:
            content: Of the same length on every worker, a multiple of 4 bytes.
        """
        words = np.frombuffer(content, np.int32)
        rows = np.zeros((self.count, len(words)), np.int32)
        rows[self.index] = words
        rows = self._sum(rows)
        return np.flatnonzero((rows != rows[0]).any(axis=1)).tolist()

    def broadcast(self, content: bytes) -> bytes:
        """Returns worker 0's content, bit for bit; what the others pass is ignored."""
        if self.count == 1:
            return content
        size = self.first(len(content))
        if not size:  # TensorFlow's all-reduce of an empty tensor crashes (2.21).
            return b""
        words = np.zeros(-(-size // 4), np.int32)
        if self.index == 0:  # As integers: adding zeros changes no bit.
            words = np.frombuffer(content.ljust(4 * len(words), b"\0"), np.int32)
        return self._sum(words).tobytes()[:size]

    def _sum(self, values: np.ndarray) -> np.ndarray:
        if self.count == 1:
            return values
        return _adder(self.strategy)(values.ravel()).numpy().reshape(values.shape)


@functools.cache  # One trace per strategy, whatever is exchanged.
def _adder(strategy: tf.distribute.Strategy) -> Callable[[np.ndarray], tf.Tensor]:
    return tf.function(Workers(strategy).sum, autograph=False, reduce_retracing=True)
