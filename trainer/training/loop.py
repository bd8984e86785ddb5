"""Trains and evaluates any Keras model on any batches under any tf.distribute strategy.

    history = fit(model, lambda epoch: train_batches(epoch), test_batches, strategy=strategy,
                  loss=keras.losses.categorical_crossentropy, metrics={}, epochs=10)

It replaces ``model.fit``, because Keras 3's own does not run on several workers
(https://github.com/keras-team/keras/issues/20585). Several steps run inside one call
(``execution``); the sums of each step are returned one by one and added up here in float64, so the
number of steps in a call changes no result.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from trainer.distributed import replica_updates
from trainer.distributed.replica_seeds import all_layers, separate_seeds
from trainer.distributed.replica_updates import Update
from trainer.errors import NotFiniteError
from trainer.runtime import keras, tf
from trainer.training.execution import Execution
from trainer.training.position import Position

_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")  # of keras.losses.Loss

_REMEDY = "Use a smaller learning_rate; the files of an earlier run are unchanged."

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
    separate_seeds(model)
    functions = _functions(loss, metrics)
    prepare = preprocess or (lambda x, y: (x, y))
    forward = forward or model
    dtype = _sums_dtype(model)
    whole = jit_compile and strategy is tf.distribute.get_strategy()
    compiled = jit_compile and not whole
    update = replica_updates.create(
        model.optimizer, model.trainable_variables, strategy, jit_compile=compiled
    )
    train_step = _train_step(model, forward, functions, prepare, dtype, update, compiled)
    execute = {"values": 1 + len(functions), "dtype": dtype, "strategy": strategy}
    train = Execution(train_step, **execute, jit_compile=whole)
    test = Execution(_test_step(forward, functions, prepare, dtype), **execute, jit_compile=whole)
    position = position or Position()
    listeners = keras.callbacks.CallbackList(list(callbacks), model=model)

    def set_params(batches: tf.data.Dataset) -> None:
        steps = int(batches.cardinality())
        listeners.set_params({"verbose": 0, "epochs": epochs, "steps": steps})

    set_params(train_data(min(position.epoch, epochs - 1)))  # on_train_begin may read them.
    model.stop_training = False
    logs: dict[str, float] = {}
    listeners.on_train_begin()
    while position.epoch < epochs and not model.stop_training:
        start = clock() - position.seconds
        batches = train_data(position.epoch)
        set_params(batches)
        listeners.on_epoch_begin(position.epoch)
        where = f"in epoch {position.epoch + 1}"
        totals = _Totals(functions, position.totals)
        for rows in train.calls(
            batches.skip(position.step),
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
            listeners.on_train_batch_end(position.step - 1, totals.means())
            after_call(position)
        test_totals = _Totals(functions)
        listeners.on_test_begin()
        for rows in test.calls(
            validation_data,
            steps_per_execution=steps_per_execution,
            clock=clock,
            begin=listeners.on_test_batch_begin,
        ):
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
    model.optimizer.finalize_variable_values(model.trainable_variables)  # Their moving average.
    listeners.on_train_end(logs)
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
    """Returns the means of ``loss`` and of each metric over a data set; arguments as in ``fit``.

    Raises:
        NotFiniteError: The loss is NaN or infinite.
        ValueError: The cardinality of the data set is not known, or a loss or metric returns
            another shape than (n,).
        TypeError: A loss or metric is no function, or an object with another mean.
    """
    functions = _functions(loss, metrics)
    dtype = _sums_dtype(model)
    step = _test_step(model, functions, preprocess or (lambda x, y: (x, y)), dtype)
    totals = _Totals(functions)
    execution = Execution(step, values=1 + len(functions), dtype=dtype, strategy=strategy)
    for rows in execution.calls(data, steps_per_execution=None):
        totals.add(rows, "in the evaluation")
    return totals.means()


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


def _functions(loss: PerExample, metrics: Mapping[str, PerExample]) -> dict[str, PerExample]:
    """Returns loss and metrics by name, as functions of one value per example."""
    if "loss" in metrics:
        raise TypeError("Expected metrics of other names than loss. Received: one named loss.")
    given = {"loss": loss, **metrics}
    return {name: _per_example(name, function) for name, function in given.items()}


def _per_example(name: str, function: PerExample) -> PerExample:
    if isinstance(function, keras.losses.Loss) and function.reduction in _MEANS:

        def values(y: tf.Tensor, output: tf.Tensor) -> tf.Tensor:
            # As Loss.__call__ does, but for the mean.
            return function.call(tf.cast(y, function.dtype), tf.cast(output, function.dtype))

        return values
    if isinstance(function, keras.losses.Loss):
        received = f"{type(function).__name__} with the reduction {function.reduction!r}"
    elif isinstance(function, keras.metrics.Metric):
        received = f"{type(function).__name__}, a metric with a state of its own"
    elif not callable(function):
        received = repr(function)
    else:
        return function
    raise TypeError(
        "Expected a function that returns one value per example, like "
        f"keras.metrics.categorical_accuracy, for {name}. Received: {received}. Use the function "
        "in keras.losses or keras.metrics."
    )


def _sums_dtype(model: keras.Model) -> str:
    """Returns the dtype in which values are added up: float32 where they have a lower precision,
    whatever ``keras.config.floatx()`` is.
    """
    double = any(variable.dtype == "float64" for variable in model.trainable_variables)
    return "float64" if double else "float32"


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


def _train_step(
    model: keras.Model,
    forward: Callable[..., tf.Tensor],
    functions: Mapping[str, PerExample],
    preprocess: Preprocess,
    dtype: str,
    update: Update,
    jit_compile: bool,
) -> Callable[..., tf.Tensor]:
    def gradients(
        x: tf.Tensor, y: tf.Tensor, sample_weight: tf.Tensor, examples: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor]]:
        replica = tf.distribute.get_replica_context()
        x, y = preprocess(x, y)
        with tf.GradientTape() as tape:
            sums = _sums(functions, y, forward(x, training=True), sample_weight, dtype)
            objective = sums[1] / tf.cast(examples, sums.dtype)
            if model.losses:  # Regularization: once a batch, so each replica adds its share.
                objective += tf.add_n(model.losses) / replica.num_replicas_in_sync
            objective = model.optimizer.scale_loss(objective)  # As it is, for most optimizers.
        return sums, tape.gradient(objective, model.trainable_variables)

    if jit_compile:  # What lies before the all-reduce; the update, after it, is another program.
        gradients = tf.function(gradients, jit_compile=True, autograph=False)

    def step(
        x: tf.Tensor, y: tf.Tensor, sample_weight: tf.Tensor, examples: tf.Tensor
    ) -> tf.Tensor:
        sums, values = gradients(x, y, sample_weight, examples)
        update(values)
        return sums

    return step


def _test_step(
    forward: Callable[..., tf.Tensor],
    functions: Mapping[str, PerExample],
    preprocess: Preprocess,
    dtype: str,
) -> Callable[..., tf.Tensor]:
    def step(
        x: tf.Tensor, y: tf.Tensor, sample_weight: tf.Tensor, examples: tf.Tensor
    ) -> tf.Tensor:
        x, y = preprocess(x, y)
        return _sums(functions, y, forward(x, training=False), sample_weight, dtype)

    return step


def _sums(
    functions: Mapping[str, PerExample],
    y: tf.Tensor,
    output: tf.Tensor,
    sample_weight: tf.Tensor,
    dtype: str,
) -> tf.Tensor:
    """Returns the sum of the weights, then the weighted sum of each function."""
    weight = tf.cast(sample_weight, dtype)
    values = []
    for name, function in functions.items():
        value = function(y, output)
        if not value.shape.is_compatible_with(weight.shape):  # A product of them may exist.
            raise ValueError(
                f"Expected one value per example for {name}, of shape {weight.shape}. Received: "
                f"shape {value.shape}. Return the values of a batch, not their mean."
            )
        values.append(weight * tf.cast(value, dtype))
    return tf.stack([tf.reduce_sum(value) for value in (weight, *values)])


class _Totals:
    """Adds up the sums of steps, in float64 and one by one, so that the result does not depend on
    the number of steps in a call; ``sums`` are those of earlier steps.
    """

    def __init__(self, functions: Mapping[str, PerExample], sums: Sequence[float] = ()) -> None:
        self.names = list(functions)
        self.sums = np.array(sums or [0.0] * (1 + len(self.names)), np.float64)
        self.steps = 0

    def add(self, rows: np.ndarray, where: str, before: int = 0) -> None:
        """Adds the steps of one call.

        Args:
            rows: Their sums, (steps, 1 + functions).
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
