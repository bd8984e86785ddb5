"""How a loop's steps are executed: several of them in one call of a compiled function.

    execution = Execution(step, values=2, dtype="float32", strategy=strategy, jit_compile=False)
    for rows in execution.calls(batches, steps_per_execution=None):     # (steps, 2) a call
        ...

The values of each step are returned one by one, so the number of steps in a call changes no result.
With ``jit_compile``, on one device, a call is a single program of XLA: the batches of many steps go
in together, the values of the steps come out, and nothing is launched by the host in between.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from trainer.distributed.collectives import Workers
from trainer.runtime import tf

SECONDS_PER_CALL = 1.0  # Long enough to hide the overhead of a call, short enough for progress.
CHUNK_BYTES = 64 * 2**20  # Of the batches that a program is given at once.

# (a slice of each component of a batch, the number of examples in the global batch) -> values (n,)
Step = Callable[..., tf.Tensor]


class Execution:
    """Executes a step on each batch of a data set.

    Args:
        step: Called in the replica context, with a slice of each component of a batch, and what
            ``examples`` returns of the whole batch.
        values: How many values it returns.
        dtype: Their dtype.
        examples: Returns the number of examples in a batch from its components.
        strategy: Splits each batch, which is a global one, among its replicas.
        sharded: Whether each worker is given the rows of its own replicas alone, and the number of
            examples in the global batch as a last component (``pipeline.shard_batches``); else the
            whole batch.
        jit_compile: Whether to compile all steps of a call into one program of XLA. Only under
            TensorFlow's default strategy: those of others all-reduce between the steps, or place
            variables elsewhere.

    Raises:
        ValueError: It is to be compiled, and the strategy is another one.
    """

    def __init__(
        self,
        step: Step,
        *,
        values: int,
        dtype: str,
        examples: Callable[..., tf.Tensor],
        strategy: tf.distribute.Strategy,
        sharded: bool = False,
        jit_compile: bool = False,
    ) -> None:
        self._workers = Workers(strategy)
        self._source: Callable[[tf.data.Dataset, int], _Batches | _Chunks]
        if not jit_compile:
            split = _split_shard if sharded else _split_batch
            steps = _compile_steps(step, values, dtype, examples, split, strategy)
            self._source = functools.partial(_Batches, steps)
            return
        if strategy is not tf.distribute.get_strategy():
            raise ValueError(
                "Expected the default strategy for a program of several steps. Received: "
                f"{type(strategy).__name__}. Use jit_compile=False."
            )
        self._source = functools.partial(_Chunks, _compile_program(step, values, dtype, examples))

    def calls(
        self,
        data: tf.data.Dataset,
        *,
        steps_per_execution: int | None,
        clock: Callable[[], float] = time.perf_counter,
        first: int = 0,
        begin: Callable[[int], object] = lambda number: None,
    ) -> Iterator[np.ndarray]:
        """Iterates over a data set once; yields the values of each call's steps, (steps, values).

        Args:
            data: Batches, tuples of components. For a program all are of the same shapes; else
                the last may be shorter than the others, and at least as long as there are replicas.
            steps_per_execution: Number of steps in a call; None: as many as take about a second.
            clock: Monotonic time in seconds.
            first: Number of the first step in the epoch, counted from 0.
            begin: Called before each call with the number of its first step.

        Raises:
            ValueError: The cardinality of the data set is not known.
        """
        remaining = int(data.cardinality())
        end = first + remaining
        if remaining < 0:
            raise ValueError(f"Expected a data set of known cardinality. Received: {remaining}.")
        source = self._source(data, end)
        steps = steps_per_execution or 1
        while remaining:
            # The clocks of workers differ, and all must run the same number of steps.
            steps = min(self._workers.first(steps), remaining)
            begin(end - remaining)
            start = clock()
            rows = source.run(steps)
            seconds = clock() - start
            yield rows
            remaining -= len(rows)
            if steps_per_execution is None:
                # At most twice as many: the first call also compiles, and tells nothing of the
                # next.
                fitting = SECONDS_PER_CALL * len(rows) / max(seconds, 1e-6)
                steps = max(1, min(2 * steps, round(fitting)))


class _Batches:
    """Gives the calls an iterator, from which each step takes its batch."""

    def __init__(
        self, call: Callable[[Iterator, tf.Tensor], tf.Tensor], data: tf.data.Dataset, epoch: int
    ) -> None:
        self.call = call
        with tf.device("CPU:0"):
            self.iterator = iter(data)

    def run(self, steps: int) -> np.ndarray:
        """Runs the steps; returns their values."""
        return self.call(self.iterator, tf.constant(steps)).numpy()


# The batches of several steps, each component (capacity, ...); the last ones may be unused.
_Chunk: TypeAlias = tuple[Any, ...]
Program = Callable[[_Chunk, tf.Tensor, tf.Tensor], tf.Tensor]  # From a step on, so many.


class _Chunks:
    """Gives the calls the batches of as many steps as fit in ``CHUNK_BYTES``, always of the same
    shape, so that the program is compiled once: those of a whole epoch where they are row numbers.

    Args:
        call: The program.
        data: The batches that remain of an epoch.
        epoch: Number of all its batches.
    """

    def __init__(self, call: Program, data: tf.data.Dataset, epoch: int) -> None:
        self.call = call
        size = sum(
            spec.dtype.size * spec.shape.num_elements()
            for spec in tf.nest.flatten(data.element_spec)
        )
        self.capacity = max(1, min(epoch, CHUNK_BYTES // max(size, 1)))
        with tf.device("CPU:0"):
            self.iterator = iter(data.batch(self.capacity))
        self.chunk: _Chunk
        self.first = self.filled = 0

    def run(self, steps: int) -> np.ndarray:
        """Runs the steps, or as many as are left in the chunk; returns their values."""
        if self.first == self.filled:
            with tf.device("CPU:0"):
                self._next()
        steps = min(steps, self.filled - self.first)
        rows = self.call(self.chunk, tf.constant(self.first), tf.constant(steps)).numpy()
        self.first += steps
        return rows[:steps]

    def _next(self) -> None:
        chunk = next(self.iterator)
        self.first, self.filled = 0, int(tf.nest.flatten(chunk)[0].shape[0])
        missing = self.capacity - self.filled

        def fill(batches: tf.Tensor) -> tf.Tensor:
            return tf.pad(batches, [[0, missing], *[[0, 0]] * (len(batches.shape) - 1)])

        self.chunk = tf.nest.map_structure(fill, chunk)


def _compile_steps(
    step: Step,
    values: int,
    dtype: str,
    examples: Callable[..., tf.Tensor],
    split: Callable[[Any, int | tf.Tensor, tf.distribute.Strategy], Any],
    strategy: tf.distribute.Strategy,
) -> Callable[[Iterator, tf.Tensor], tf.Tensor]:
    """Compiles several steps into one ``tf.function``, which returns their values, one row a step.

    Every replica is given what its worker reads, and takes its slice of that.
    ``strategy.distribute_datasets_from_function``, which Keras uses, ends each epoch with iterators
    whose autotuning, which no option switches off, can take seconds (TensorFlow 2.21).
    """
    workers = Workers(strategy)

    def of_replica(*batch: Any) -> tf.Tensor:
        number = tf.distribute.get_replica_context().replica_id_in_sync_group
        return step(*split(batch, number, strategy), examples(*batch))

    # Written out as a tf.while_loop, because AutoGraph does not convert a "for" on Python 3.13
    # (TensorFlow 2.21).
    @tf.function(autograph=False)
    def call(iterator: tf.distribute.DistributedIterator, steps: tf.Tensor) -> tf.Tensor:
        def one(number: tf.Tensor, rows: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
            sums = strategy.run(of_replica, args=iterator.get_next())
            here = strategy.experimental_local_results(sums)
            return number + 1, rows.write(number, tf.add_n(here))

        rows = tf.TensorArray(dtype, steps, element_shape=(values,))
        _, rows = tf.while_loop(lambda number, rows: number < steps, one, (0, rows))
        return workers.sum(rows.stack())

    return call


def _split_batch(batch: Any, number: tf.Tensor, strategy: tf.distribute.Strategy) -> Any:
    """Returns a replica's slice of a batch whose length is a multiple of the replicas."""
    replicas = strategy.num_replicas_in_sync

    def own(rows: tf.Tensor) -> tf.Tensor:
        size = rows.shape[0] // replicas
        return tf.reshape(rows, (replicas, size, *rows.shape[1:]))[number]

    return tf.nest.map_structure(own, batch)


def _split_shard(batch: Any, number: tf.Tensor, strategy: tf.distribute.Strategy) -> Any:
    """Returns a replica's slice of its worker's rows, and its length, in place of that of the
    global batch, which comes last. Where the length is 0 there is a row nevertheless, of another
    replica: there are no means of nothing.
    """
    *rows, examples = batch
    replicas, workers = strategy.num_replicas_in_sync, Workers(strategy)
    if replicas == 1:
        return *rows, examples
    first = workers.index * workers.local_replicas * examples // replicas
    start, end = (n * examples // replicas - first for n in (number, number + 1))
    begin = tf.minimum(start, tf.shape(tf.nest.flatten(rows)[0])[0] - 1)
    own = tf.nest.map_structure(lambda part: part[begin : tf.maximum(end, begin + 1)], rows)
    return *own, end - start


def _compile_program(
    step: Step, values: int, dtype: str, examples: Callable[..., tf.Tensor]
) -> Program:
    """Compiles several steps into one program of XLA, whose number is known when it runs."""

    @tf.function(autograph=False, jit_compile=True)
    def call(chunk: _Chunk, first: tf.Tensor, steps: tf.Tensor) -> tf.Tensor:
        def one(number: tf.Tensor, rows: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
            batch = tf.nest.map_structure(lambda part: part[first + number], chunk)
            return number + 1, rows.write(number, step(*batch, examples(*batch)))

        capacity = tf.nest.flatten(chunk)[0].shape[0]
        rows = tf.TensorArray(dtype, capacity, element_shape=(values,))
        _, rows = tf.while_loop(lambda number, rows: number < steps, one, (0, rows))
        return rows.stack()

    return call
