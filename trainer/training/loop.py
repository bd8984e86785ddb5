"""Trains and evaluates any Keras model on any batches under any tf.distribute strategy.

    history = fit(model, lambda epoch: train_batches(epoch), test_batches, strategy=strategy,
                  loss=keras.losses.categorical_crossentropy, metrics={}, epochs=10)

It stands where ``model.fit`` would, because Keras 3's own does not run on several workers
(https://github.com/keras-team/keras/issues/20585). Several steps run inside one call of a
``tf.function``; the sums of every step come back one by one and are added up here in float64, so
how many steps a call holds changes no result.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from trainer.distributed.collectives import Workers
from trainer.distributed.replica_seeds import separate_seeds
from trainer.errors import NotFiniteError
from trainer.runtime import keras, tf
from trainer.training.checkpoint import Position

SECONDS_PER_CALL = 1.0  # A call this long hides what a call costs, and lets progress be seen.

_REMEDY = "Use a smaller --learning-rate; files of an earlier run are as they were."

PerExample = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
Preprocess = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


def fit(
    model: keras.Model,
    train_data: Callable[[int], tf.data.Dataset],
    validation_data: tf.data.Dataset,
    *,
    strategy: tf.distribute.Strategy,
    loss: PerExample,
    metrics: Mapping[str, PerExample],
    epochs: int,
    preprocess: Preprocess | None = None,
    forward: Callable[..., tf.Tensor] | None = None,
    jit_compile: bool = False,
    steps_per_execution: int | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    position: Position | None = None,
    after_call: Callable[[Position], None] = lambda position: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Trains a model, and evaluates it after every epoch.

    Args:
        model: Built, and compiled with its optimizer, inside the strategy's scope.
        train_data: Gives the batches of an epoch, which is counted from 0: a data set of known
            cardinality of ``(x, y, sample_weight)``, all of one shape, sample_weight (n,).
        validation_data: The same for evaluation.
        strategy: The batches are global ones: it splits each among its replicas.
        loss: Gives one value an example, (n,), from ``y`` and the model's output.
        metrics: By name, functions like ``loss``.
        epochs: How many.
        preprocess: Applied to ``(x, y)`` on the device, inside the step.
        forward: What is called for ``model``, as ``forward(x, training=True)``, to the same effect;
            None: ``model`` itself.
        jit_compile: Compile forward and backward pass of a step with XLA.
        steps_per_execution: Steps in one call; None: as many as take about a second.
        callbacks: Keras callbacks. ``on_train_batch_end`` and ``on_test_batch_end`` come once a
            call, with the number of the last step, counted from 0, and the means so far.
        position: Where to go on; None: from the beginning. The model must be as it was there.
        after_call: Called after each call and each epoch with where the run is; what it raises
            ends the run.
        clock: Seconds, monotonic.

    Returns:
        As ``History.history`` of Keras: a value an epoch for ``loss``, each metric, the same with
        the prefix ``val_``, and ``seconds``, which the epoch took.

    Raises:
        NotFiniteError: The loss became NaN or infinite; the message names epoch and step. Or the
            weights did, which ``after_call`` never sees.
    """
    separate_seeds(model)
    functions = {"loss": loss, **metrics}
    prepare = preprocess or (lambda x, y: (x, y))
    forward = forward or model
    train_step = _train_step(model, forward, functions, prepare, jit_compile)
    train = _compile(train_step, len(functions), strategy)
    test = _compile(_test_step(forward, functions, prepare), len(functions), strategy)
    position = position or Position()
    listeners = keras.callbacks.CallbackList(list(callbacks), model=model)
    model.stop_training = False
    listeners.on_train_begin()
    while position.epoch < epochs and not model.stop_training:
        start = clock() - position.seconds
        batches = train_data(position.epoch)
        listeners.set_params({"epochs": epochs, "steps": int(batches.cardinality())})
        listeners.on_epoch_begin(position.epoch)
        where = f"in epoch {position.epoch + 1}"
        totals = _Totals(functions, position.totals)
        for rows in _calls(
            train, batches.skip(position.step), strategy, steps_per_execution, clock
        ):
            totals.add(rows, where, position.step)
            position.step += len(rows)
            _check(model, f"{where}, step {position.step}")
            position.steps += len(rows)
            position.totals = totals.sums.tolist()
            position.seconds = clock() - start
            listeners.on_train_batch_end(position.step - 1, totals.means())
            after_call(position)
        test_totals = _Totals(functions)
        listeners.on_test_begin()
        for rows in _calls(test, validation_data, strategy, steps_per_execution, clock):
            test_totals.add(rows, f"{where}'s evaluation")
            listeners.on_test_batch_end(test_totals.steps - 1, test_totals.means())
            after_call(position)
        listeners.on_test_end(test_totals.means())
        logs = {
            **totals.means(),
            **{f"val_{name}": value for name, value in test_totals.means().items()},
        }
        for name, value in {**logs, "seconds": clock() - start}.items():
            position.history.setdefault(name, []).append(value)
        listeners.on_epoch_end(position.epoch, logs)
        position = Position(
            epoch=position.epoch + 1, steps=position.steps, history=position.history
        )
        after_call(position)
    listeners.on_train_end()
    return position.history


def evaluate(
    model: keras.Model,
    data: tf.data.Dataset,
    *,
    strategy: tf.distribute.Strategy,
    loss: PerExample,
    metrics: Mapping[str, PerExample],
    preprocess: Preprocess | None = None,
) -> dict[str, float]:
    """Returns the mean of ``loss`` and of each metric over the data set; arguments as ``fit``'s.

    Raises:
        NotFiniteError: The loss is NaN or infinite.
    """
    functions = {"loss": loss, **metrics}
    step = _test_step(model, functions, preprocess or (lambda x, y: (x, y)))
    totals = _Totals(functions)
    for rows in _calls(_compile(step, len(functions), strategy), data, strategy, None):
        totals.add(rows, "in the evaluation")
    return totals.means()


def _check(model: keras.Model, where: str) -> None:
    """Raises ``NotFiniteError`` for a weight that is NaN or infinite.

    The loss does not tell: on a processor with AVX-512, oneDNN's pooling takes the largest of what
    is not NaN, and what is behind it looks sound (TensorFlow 2.21).
    """
    for weights in model.trainable_variables:
        if not tf.reduce_all(tf.math.is_finite(weights)):
            raise NotFiniteError(
                f"Expected a finite loss and finite weights. Received: {weights.path} with NaN or "
                f"infinity {where}. {_REMEDY}"
            )


def _train_step(
    model: keras.Model,
    forward: Callable[..., tf.Tensor],
    functions: Mapping[str, PerExample],
    preprocess: Preprocess,
    jit_compile: bool = False,
) -> Callable[..., tf.Tensor]:
    def gradients(
        x: tf.Tensor, y: tf.Tensor, sample_weight: tf.Tensor, examples: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        replica = tf.distribute.get_replica_context()
        with tf.GradientTape() as tape:
            sums = _sums(functions, y, forward(x, training=True), sample_weight)
            objective = sums[1] / tf.cast(examples, sums.dtype)
            if model.losses:  # Regularisation: once a batch, so a share of it in every replica.
                objective += tf.add_n(model.losses) / replica.num_replicas_in_sync
        return sums, tape.gradient(objective, model.trainable_variables)

    if jit_compile:  # Not the update: replicas meet there.
        gradients = tf.function(gradients, jit_compile=True, autograph=False)

    def step(
        x: tf.Tensor, y: tf.Tensor, sample_weight: tf.Tensor, examples: tf.Tensor
    ) -> tf.Tensor:
        sums, values = gradients(*preprocess(x, y), sample_weight, examples)
        model.optimizer.apply(values, model.trainable_variables)
        return sums

    return step


def _test_step(
    forward: Callable[..., tf.Tensor],
    functions: Mapping[str, PerExample],
    preprocess: Preprocess,
) -> Callable[..., tf.Tensor]:
    def step(
        x: tf.Tensor, y: tf.Tensor, sample_weight: tf.Tensor, examples: tf.Tensor
    ) -> tf.Tensor:
        x, y = preprocess(x, y)
        return _sums(functions, y, forward(x, training=False), sample_weight)

    return step


def _sums(
    functions: Mapping[str, PerExample],
    y: tf.Tensor,
    output: tf.Tensor,
    sample_weight: tf.Tensor,
) -> tf.Tensor:
    """Returns the sum of the weights, then the weighted sum of each function."""
    dtype = keras.config.floatx()  # Also where the output is of a lower precision.
    weight = tf.cast(sample_weight, dtype)
    values = [weight * tf.cast(function(y, output), dtype) for function in functions.values()]
    return tf.stack([tf.reduce_sum(value) for value in (weight, *values)])


def _compile(
    step: Callable[..., tf.Tensor], functions: int, strategy: tf.distribute.Strategy
) -> Callable[[Iterator, tf.Tensor], tf.Tensor]:
    """Puts several steps into one ``tf.function``, which returns their sums, a row a step.

    Every replica is given whole batches and takes the slice of its number. What Keras and
    ``strategy.distribute_datasets_from_function`` do instead ends each epoch with iterators whose
    autotuning, which no option reaches, can hold it up for seconds (TensorFlow 2.21).
    """
    replicas, workers = strategy.num_replicas_in_sync, Workers(strategy)

    def of_replica(x: tf.Tensor, y: tf.Tensor, sample_weight: tf.Tensor) -> tf.Tensor:
        number = tf.distribute.get_replica_context().replica_id_in_sync_group

        def own(rows: tf.Tensor) -> tf.Tensor:
            size = rows.shape[0] // replicas
            return tf.reshape(rows, (replicas, size, *rows.shape[1:]))[number]

        # Beside the slice, in which there may be none: the examples really in the whole batch.
        return step(own(x), own(y), own(sample_weight), tf.reduce_sum(sample_weight))

    # Written out as a tf.while_loop, because AutoGraph does not convert a "for" on Python 3.13
    # (TensorFlow 2.21).
    @tf.function(autograph=False)
    def call(iterator: Iterator, steps: tf.Tensor) -> tf.Tensor:
        def one(number: tf.Tensor, rows: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
            sums = strategy.run(of_replica, args=iterator.get_next())
            here = strategy.experimental_local_results(sums)
            return number + 1, rows.write(number, tf.add_n(here))

        rows = tf.TensorArray(keras.config.floatx(), steps, element_shape=(1 + functions,))
        _, rows = tf.while_loop(lambda number, rows: number < steps, one, (0, rows))
        return workers.sum(rows.stack())

    return call


def _calls(
    call: Callable[[Iterator, tf.Tensor], tf.Tensor],
    data: tf.data.Dataset,
    strategy: tf.distribute.Strategy,
    steps_per_execution: int | None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[np.ndarray]:
    """Goes through a data set once; yields the sums of each call's steps, (steps, 1 + functions).

    Raises:
        ValueError: The cardinality of the data set is not known.
    """
    remaining = int(data.cardinality())
    if remaining < 0:
        raise ValueError(f"Expected a data set of known cardinality. Received: {remaining}.")
    with tf.device("CPU:0"):
        iterator = iter(data)
    workers = Workers(strategy)
    steps = steps_per_execution or 1
    while remaining:
        # Each has a clock of its own, and all must do the same.
        steps = min(workers.first(steps), remaining)
        start = clock()
        rows = call(iterator, tf.constant(steps)).numpy()
        seconds = clock() - start
        yield rows
        remaining -= steps
        if steps_per_execution is None:
            # Twice as many at most: the first call also compiles, and says nothing of the next.
            fitting = SECONDS_PER_CALL * steps / max(seconds, 1e-6)
            steps = max(1, min(2 * steps, round(fitting)))


class _Totals:
    """Adds up the sums of steps, in float64 and one by one, so that it does not matter which of
    them came in one call; ``sums`` are those of earlier steps.
    """

    def __init__(self, functions: Mapping[str, PerExample], sums: Sequence[float] = ()) -> None:
        self.names = list(functions)
        self.sums = np.array(sums or [0.0] * (1 + len(self.names)), np.float64)
        self.steps = 0

    def add(self, rows: np.ndarray, where: str, before: int = 0) -> None:
        """Adds the steps of one call; ``where`` and the number of steps before it are for the
        error, a ``NotFiniteError`` for a loss that is not finite.
        """
        for number, row in enumerate(rows, start=before + 1):
            if not math.isfinite(row[1]):
                raise NotFiniteError(
                    f"Expected a finite loss. Received: {row[1]} {where}, step {number}. {_REMEDY}"
                )
            self.sums += row
        self.steps += len(rows)

    def means(self) -> dict[str, float]:
        """Returns the weighted mean of each function so far."""
        return dict(zip(self.names, (self.sums[1:] / self.sums[0]).tolist(), strict=True))
