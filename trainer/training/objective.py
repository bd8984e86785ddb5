"""What a loop minimizes and measures: how a step computes, and what its values mean.

    objective = PerExample(model, loss=keras.losses.categorical_crossentropy, metrics={})
    step = objective.train_step(update, jit_compile=False)

``PerExample`` adds up functions of one value per example. ``compiled.CompiledModel`` computes what
a model's own ``compile`` says.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

from trainer.distributed.replica_updates import Update
from trainer.runtime import keras, tf
from trainer.training.execution import Step

Function: TypeAlias = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
Preprocess: TypeAlias = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]

_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")  # of keras.losses.Loss


class Objective(Protocol):
    """What a loop minimizes and measures.

    Attributes:
        names: Of the values of a step, ``loss`` the first. A step returns their weighted sums,
            after the sum of the weights.
        dtype: Of the values of a step.
        sharded: Whether a worker is given the rows of its own replicas alone (``Execution``).
    """

    names: Sequence[str]
    dtype: str
    sharded: bool

    def examples(self, *batch: tf.Tensor) -> tf.Tensor:
        """Returns the number of examples in a whole batch."""

    def train_step(self, update: Update, *, jit_compile: bool) -> Step:
        """Returns a training step; with ``jit_compile``, what lies before the update is compiled by
        XLA.
        """

    def test_step(self) -> Step:
        """Returns a step of the evaluation."""

    def reset(self) -> None:
        """Called before each epoch and each evaluation."""

    def state(self) -> list:
        """Returns what the steps have changed since ``reset``, beside variables of the model and
        its optimizer, as JSON can hold it; empty where that is nothing.
        """

    def set_state(self, state: list) -> None:
        """Sets what ``state`` returned, after ``reset``."""

    def logs(self, means: Mapping[str, float]) -> dict[str, float]:
        """Returns what callbacks are told, from the means of the values since ``reset``."""


class PerExample:
    """Loss and metrics as functions of one value per example.

    Args:
        model: Built and compiled.
        loss: Returns the values of a batch, (n,), from ``y`` and the model's output.
        metrics: The same by name.
        preprocess: Applied to ``(x, y)`` on the device, inside the step.
        forward: Called in place of ``model``, and equivalent to it.

    Raises:
        TypeError: A loss or metric is no function, or an object with another mean.
    """

    sharded = False

    def __init__(
        self,
        model: keras.Model,
        *,
        loss: Function,
        metrics: Mapping[str, Function],
        preprocess: Preprocess | None = None,
        forward: Callable[..., tf.Tensor] | None = None,
    ) -> None:
        self.model = model
        self.functions = _functions(loss, metrics)
        self.names: Sequence[str] = list(self.functions)
        self.dtype = sums_dtype(model)
        self.preprocess = preprocess or (lambda x, y: (x, y))
        self.forward = forward or model

    def examples(self, x: tf.Tensor, y: tf.Tensor, sample_weight: tf.Tensor) -> tf.Tensor:
        """Returns the number of real examples: the others are padding, of weight 0."""
        return tf.reduce_sum(sample_weight)

    def train_step(self, update: Update, *, jit_compile: bool) -> Step:
        """Returns the training step."""
        model = self.model

        def gradients(
            x: tf.Tensor, y: tf.Tensor, sample_weight: tf.Tensor, examples: tf.Tensor
        ) -> tuple[tf.Tensor, list[tf.Tensor]]:
            replica = tf.distribute.get_replica_context()
            x, y = self.preprocess(x, y)
            with tf.GradientTape() as tape:
                sums = self._sums(y, self.forward(x, training=True), sample_weight)
                objective = sums[1] / tf.cast(examples, sums.dtype)
                if model.losses:  # Regularization: once a batch, so each replica adds its share.
                    objective += tf.add_n(model.losses) / replica.num_replicas_in_sync
                objective = model.optimizer.scale_loss(objective)  # As it is, for most optimizers.
            return sums, tape.gradient(objective, model.trainable_variables)

        if jit_compile:  # What lies before the all-reduce; the update is another program.
            gradients = tf.function(gradients, jit_compile=True, autograph=False)

        def step(*batch: tf.Tensor) -> tf.Tensor:
            sums, values = gradients(*batch)
            update(values)
            return sums

        return step

    def test_step(self) -> Step:
        """Returns the step of the evaluation."""

        def step(
            x: tf.Tensor, y: tf.Tensor, sample_weight: tf.Tensor, examples: tf.Tensor
        ) -> tf.Tensor:
            x, y = self.preprocess(x, y)
            return self._sums(y, self.forward(x, training=False), sample_weight)

        return step

    def reset(self) -> None:
        """Does nothing: all state is in the sums."""

    def state(self) -> list:
        """Returns nothing."""
        return []

    def set_state(self, state: list) -> None:
        """Does nothing."""

    def logs(self, means: Mapping[str, float]) -> dict[str, float]:
        """Returns the means."""
        return dict(means)

    def _sums(self, y: tf.Tensor, output: tf.Tensor, sample_weight: tf.Tensor) -> tf.Tensor:
        """Returns the sum of the weights, then the weighted sum of each function."""
        weight = tf.cast(sample_weight, self.dtype)
        values = []
        for name, function in self.functions.items():
            value = function(y, output)
            if not value.shape.is_compatible_with(weight.shape):  # A product of them may exist.
                raise ValueError(
                    f"Expected one value per example for {name}, of shape {weight.shape}. "
                    f"Received: shape {value.shape}. Return the values of a batch, not their mean."
                )
            values.append(weight * tf.cast(value, self.dtype))
        return tf.stack([tf.reduce_sum(value) for value in (weight, *values)])


def sums_dtype(model: keras.Model) -> str:
    """Returns the dtype in which values are added up: float32 where they have a lower precision,
    whatever ``keras.config.floatx()`` is.
    """
    double = any(variable.dtype == "float64" for variable in model.trainable_variables)
    return "float64" if double else "float32"


def _functions(loss: Function, metrics: Mapping[str, Function]) -> dict[str, Function]:
    """Returns loss and metrics by name, as functions of one value per example."""
    if "loss" in metrics:
        raise TypeError("Expected metrics of other names than loss. Received: one named loss.")
    given = {"loss": loss, **metrics}
    return {name: _per_example(name, function) for name, function in given.items()}


def _per_example(name: str, function: Function) -> Function:
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
