"""Trains and evaluates any Keras model on any batches under any tf.distribute strategy.

    history = fit(model, lambda epoch: train_batches(epoch), test_batches, strategy=strategy,
                  loss=keras.losses.categorical_crossentropy, metrics={}, epochs=10)

It replaces ``model.fit``, because Keras 3's own does not run on several workers
(https://github.com/keras-team/keras/issues/20585). Several steps run inside one call
(``execution``); the sums of each step are returned one by one and added up here in float64, so the
number of steps in a call changes no result.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from trainer.distributed import replica_updates
from trainer.distributed.replica_seeds import all_layers, separate_seeds
from trainer.errors import NotFiniteError
from trainer.runtime import keras, tf
from trainer.training.execution import Execution, Step
from trainer.training.objective import Function, Objective, PerExample, Preprocess
from trainer.training.position import Position

_REMEDY = "Use a smaller learning_rate; the files of an earlier run are unchanged."


def fit(
    model: keras.Model,
    train_data: Callable[[int], tf.data.Dataset],
    validation_data: tf.data.Dataset,
    *,
    strategy: tf.distribute.Strategy,
    loss: Function,
    metrics: Mapping[str, Function],
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
    """Trains a model, and evaluates it after each epoch.

    Args:
        model: Built, and compiled with its optimizer, in the strategy's scope. With layers that
            compute in float16 the optimizer must scale the loss, as ``compile`` sees to under the
            policy mixed_float16. Of ``compile`` nothing else is used: loss and metrics are the
            arguments here.
        train_data: Returns the batches of an epoch, which is counted from 0: a data set of known
            cardinality with elements ``(x, y, sample_weight)``, all of the same shapes,
            sample_weight float32 (n,). Loss and metrics are means weighted by it, so class weights
            are given there.
        validation_data: The same for evaluation.
        strategy: Splits each batch, which is a global one, among its replicas.
        loss: Returns one value per example, (n,), from ``y`` and the model's output; or a
            ``keras.losses.Loss`` that takes the mean over a batch.
        metrics: The same by name. A ``keras.metrics.Metric`` keeps a state of its own, and is
            refused.
        epochs: Number of epochs.
        preprocess: Applied to ``(x, y)`` on the device, inside the step.
        forward: Called in place of ``model``, as ``forward(x, training=True)``, and equivalent to
            it; None: ``model`` itself.
        jit_compile: Whether to compile with XLA: all steps of a call as one program, under
            TensorFlow's default strategy; under others, what lies before the sum of the gradients,
            and what lies after it.
        steps_per_execution: Number of steps in a call; None: as many as take about a second.
        callbacks: Keras callbacks. ``on_train_batch_begin`` and ``on_test_batch_begin`` are called
            once per call, with the number of its first step, counted from 0;
            ``on_train_batch_end`` and ``on_test_batch_end`` with that of its last step and the
            means so far. Their ``params`` are ``epochs``, ``steps`` and ``verbose``, 0.
        position: Where to resume; None: at the beginning. The variables must be as they were there.
        after_call: Called with the position after each call, each call of an evaluation, and each
            epoch; what it raises ends the run.
        clock: Monotonic time in seconds.

    Returns:
        As ``History.history`` of Keras: one value per epoch for ``loss`` and each metric, the same
        with the prefix ``val_``, and ``seconds``, the duration of the epoch.

    Raises:
        NotFiniteError: The loss or a weight became NaN or infinite; the message names epoch and
            step. ``after_call`` is not called with such a position.
        ValueError: The cardinality of a data set is not known; the model has a training step of its
            own, or computes in float16 without what that needs; a loss or metric returns another
            shape than (n,).
        TypeError: A loss or metric is no function, or an object with another mean.
    """
    _check_model(model)
    objective = PerExample(
        model, loss=loss, metrics=metrics, preprocess=preprocess, forward=forward
    )
    return train(
        model,
        objective,
        lambda epoch, first: train_data(epoch).skip(first),
        lambda: validation_data,
        strategy=strategy,
        epochs=epochs,
        jit_compile=jit_compile,
        program=jit_compile and strategy is tf.distribute.get_strategy(),
        steps_per_execution=steps_per_execution,
        listeners=keras.callbacks.CallbackList(list(callbacks), model=model),
        position=position,
        after_call=after_call,
        clock=clock,
    )


def train(
    model: keras.Model,
    objective: Objective,
    train_data: Callable[[int, int], tf.data.Dataset],
    validation_data: Callable[[], tf.data.Dataset] | None,
    *,
    strategy: tf.distribute.Strategy,
    epochs: int,
    jit_compile: bool,
    program: bool,
    steps_per_execution: int | None,
    listeners: keras.callbacks.CallbackList,
    verbose: int | str = 0,
    position: Position | None = None,
    after_call: Callable[[Position], None] = lambda position: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Trains a model on an objective; other arguments as in ``fit``.

    Args:
        model: Built and compiled.
        objective: What to minimize and measure.
        train_data: Returns the batches of an epoch, counted from 0, that the objective takes, from
            a step on, also counted from 0.
        validation_data: Returns those of an evaluation; None: the model is not evaluated.
        strategy: Splits each batch, which is a global one, among its replicas.
        epochs: Number of epochs.
        jit_compile: Whether to compile with XLA.
        program: Whether all steps of a call become one program of XLA (``execution``).
        steps_per_execution: Number of steps in a call; None: as many as take about a second.
        listeners: Keras callbacks.
        verbose: What they are told of it.
        position: Where to resume; None: at the beginning.
        after_call: As in ``fit``.
        clock: Monotonic time in seconds.

    Returns:
        As ``fit``.

    Raises:
        NotFiniteError: As ``fit`` raises it.
        ValueError: The cardinality of a data set is not known.
    """
    separate_seeds(model)
    update = replica_updates.create(
        model.optimizer,
        model.trainable_variables,
        strategy,
        jit_compile=jit_compile and not program,
    )
    train_step = objective.train_step(update, jit_compile=jit_compile and not program)
    train_execution = _execution(objective, train_step, strategy, program)
    test_execution = _execution(objective, objective.test_step(), strategy, program)
    position = position or Position()

    def set_params(batches: tf.data.Dataset, first: int) -> None:
        steps = first + int(batches.cardinality())
        listeners.set_params({"verbose": verbose, "epochs": epochs, "steps": steps})

    # on_train_begin may read them.
    set_params(train_data(min(position.epoch, epochs - 1), position.step), position.step)
    model.stop_training = False
    logs: dict[str, float] = {}
    listeners.on_train_begin()
    while position.epoch < epochs and not model.stop_training:
        start = clock() - position.seconds
        batches = train_data(position.epoch, position.step)
        set_params(batches, position.step)
        listeners.on_epoch_begin(position.epoch)
        where = f"in epoch {position.epoch + 1}"
        totals = _Totals(objective.names, position.totals)
        objective.reset()
        objective.set_state(position.state)
        for rows in train_execution.calls(
            batches,
            steps_per_execution=steps_per_execution,
            clock=clock,
            first=position.step,
            begin=listeners.on_train_batch_begin,
        ):
            totals.add(rows, where, position.step)
            position.step += len(rows)
            _check_weights(model, f"{where}, step {position.step}")
            position.steps += len(rows)
            position.totals = totals.sums.tolist()
            position.seconds = clock() - start
            position.logs = objective.logs(totals.means())
            position.state = objective.state()
            listeners.on_train_batch_end(position.step - 1, dict(position.logs))
            after_call(position)
        # None of the epoch's calls may be left, after a stop in the evaluation.
        logs = dict(position.logs or objective.logs(totals.means()))
        if validation_data is not None:
            test_logs = _evaluate(
                objective,
                test_execution,
                validation_data(),
                listeners,
                where=f"{where}'s evaluation",
                steps_per_execution=steps_per_execution,
                after_call=functools.partial(after_call, position),
                clock=clock,
            )
            logs |= {f"val_{name}": value for name, value in test_logs.items()}
        for name, value in {**logs, "seconds": clock() - start}.items():
            position.history.setdefault(name, []).append(value)
        listeners.on_epoch_end(position.epoch, logs)
        position = Position(
            epoch=position.epoch + 1, steps=position.steps, history=position.history
        )
        after_call(position)
    model.optimizer.finalize_variable_values(model.trainable_variables)  # Their moving average.
    listeners.on_train_end(logs)
    return position.history


def evaluate(
    model: keras.Model,
    data: tf.data.Dataset,
    *,
    strategy: tf.distribute.Strategy,
    loss: Function,
    metrics: Mapping[str, Function],
    preprocess: Preprocess | None = None,
) -> dict[str, float]:
    """Returns the means of ``loss`` and of each metric over a data set; arguments as in ``fit``.

    Raises:
        NotFiniteError: The loss is NaN or infinite.
        ValueError: The cardinality of the data set is not known, or a loss or metric returns
            another shape than (n,).
        TypeError: A loss or metric is no function, or an object with another mean.
    """
    objective = PerExample(model, loss=loss, metrics=metrics, preprocess=preprocess)
    listeners = keras.callbacks.CallbackList([], model=model)
    return measure(objective, data, strategy=strategy, listeners=listeners)


def measure(
    objective: Objective,
    data: tf.data.Dataset,
    *,
    strategy: tf.distribute.Strategy,
    listeners: keras.callbacks.CallbackList,
    steps_per_execution: int | None = None,
    after_call: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Evaluates an objective on a data set once.

    Args:
        objective: What to measure.
        data: Batches that the objective takes.
        strategy: Splits each batch among its replicas.
        listeners: Keras callbacks.
        steps_per_execution: Number of steps in a call; None: as many as take about a second.
        after_call: Called after each call; what it raises ends the evaluation.

    Returns:
        What the objective logs.

    Raises:
        NotFiniteError: The loss is NaN or infinite.
    """
    return _evaluate(
        objective,
        _execution(objective, objective.test_step(), strategy, program=False),
        data,
        listeners,
        where="in the evaluation",
        steps_per_execution=steps_per_execution,
        after_call=after_call,
    )


def _execution(
    objective: Objective, step: Step, strategy: tf.distribute.Strategy, program: bool
) -> Execution:
    return Execution(
        step,
        values=1 + len(objective.names),
        dtype=objective.dtype,
        examples=objective.examples,
        strategy=strategy,
        sharded=objective.sharded,
        jit_compile=program,
    )


def _evaluate(
    objective: Objective,
    execution: Execution,
    data: tf.data.Dataset,
    listeners: keras.callbacks.CallbackList,
    *,
    where: str,
    steps_per_execution: int | None,
    after_call: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    totals = _Totals(objective.names)
    objective.reset()
    logs: dict[str, float] = {}
    listeners.on_test_begin()
    for rows in execution.calls(
        data,
        steps_per_execution=steps_per_execution,
        clock=clock,
        begin=listeners.on_test_batch_begin,
    ):
        totals.add(rows, where)
        logs = objective.logs(totals.means())
        listeners.on_test_batch_end(totals.steps - 1, dict(logs))
        after_call()
    listeners.on_test_end(dict(logs))
    return logs


def _check_model(model: keras.Model) -> None:
    """Raises ``ValueError`` for a model that would silently be trained otherwise than it says."""
    for name in ("train_step", "compute_loss"):
        if getattr(type(model), name) is not getattr(keras.Model, name):
            raise ValueError(
                f"Expected a model with Keras' own {name}. Received: {type(model).__name__} with "
                "one of its own, which this loop does not call. Use preprocess, loss and add_loss "
                "in its place."
            )
    optimizer = getattr(model, "optimizer", None)  # compile() sets it.
    if optimizer is None:
        raise ValueError("Expected a compiled model. Received: one without an optimizer.")
    scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    halves = [
        layer.name
        for layer in all_layers(model)
        if layer.compute_dtype == "float16"
        and not getattr(layer, "layers", None)
        and not isinstance(layer, keras.layers.InputLayer)
    ]
    if halves and not scales and not optimizer.loss_scale_factor:
        raise ValueError(
            "Expected an optimizer that scales the loss, for layers that compute in float16, in "
            f"which small gradients are 0. Received: {type(optimizer).__name__} and {halves[0]} in "
            "float16. Use keras.optimizers.LossScaleOptimizer, or the policy mixed_bfloat16."
        )


def _check_weights(model: keras.Model, where: str) -> None:
    """Raises ``NotFiniteError`` for a weight that is NaN or infinite.

    A finite loss proves nothing: on a processor with AVX-512, oneDNN's max pooling ignores NaN, and
    the layers after it look sound (TensorFlow 2.21).
    """
    for weights in model.trainable_variables:
        if not tf.reduce_all(tf.math.is_finite(weights)):
            raise NotFiniteError(
                f"Expected a finite loss and finite weights. Received: {weights.path} with NaN or "
                f"infinity {where}. {_REMEDY}"
            )


class _Totals:
    """Adds up the sums of steps, in float64 and one by one, so that the result does not depend on
    the number of steps in a call; ``sums`` are those of earlier steps.
    """

    def __init__(self, names: Sequence[str], sums: Sequence[float] = ()) -> None:
        self.names = list(names)
        self.sums = np.array(sums or [0.0] * (1 + len(self.names)), np.float64)
        self.steps = 0

    def add(self, rows: np.ndarray, where: str, before: int = 0) -> None:
        """Adds the steps of one call.

        Args:
            rows: Their sums, (steps, 1 + names).
            where: The place, for the error.
            before: Number of earlier steps, for the error.

        Raises:
            NotFiniteError: A loss is NaN or infinite.
        """
        for number, row in enumerate(rows, start=before + 1):
            if not math.isfinite(row[1]):
                raise NotFiniteError(
                    f"Expected a finite loss. Received: {row[1]} {where}, step {number}. {_REMEDY}"
                )
            self.sums += row
        self.steps += len(rows)

    def means(self) -> dict[str, float]:
        """Returns the weighted mean of each function so far, by name."""
        return dict(zip(self.names, (self.sums[1:] / self.sums[0]).tolist(), strict=True))
