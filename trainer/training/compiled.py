"""What a compiled Keras model minimizes and measures: its own losses, weights and metrics.

    objective = CompiledModel(model, strategy)

A replica computes with its own copies of the variables: Keras is given their values in a
``keras.StatelessScope`` and returns the new ones, as its JAX trainer does it. So layers with a
moving state and metrics need not know of replicas. The mean of the replicas' new values is what all
of them go on with, for the state of layers; a metric's copies are shares, which are added up when
they are read.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from trainer.distributed.collectives import Workers, all_reduce
from trainer.distributed.replica_updates import Update
from trainer.runtime import keras, tf
from trainer.training.execution import Step
from trainer.training.objective import sums_dtype


class CompiledModel:
    """The objective of a compiled model.

    Args:
        model: Built, with its optimizer and metrics; its variables are those of the strategy
            (``replica_variables.mirrored``).
        strategy: What it is trained under.
        train_inputs: Returns the inputs of a training batch, in the step, from what comes in their
            place: numbers of examples whose inputs are on the device, or inputs that are to be
            augmented and what was drawn for that. None: it is the inputs.
        test_inputs: The same for the evaluation.
    """

    names: Sequence[str] = ("loss",)
    sharded = True

    def __init__(
        self,
        model: keras.Model,
        strategy: tf.distribute.Strategy,
        *,
        train_inputs: Callable[[Any], Any] | None = None,
        test_inputs: Callable[[Any], Any] | None = None,
    ) -> None:
        self.model = model
        self.strategy = strategy
        self.train_inputs = train_inputs
        self.test_inputs = test_inputs
        self.dtype = sums_dtype(model)
        self.replicas = strategy.num_replicas_in_sync
        self.workers = Workers(strategy)
        self.trainable = list(model.trainable_variables)
        self.carried = list(model.non_trainable_variables)
        self.metrics = list(model.metrics_variables)
        self.has_training = "training" in inspect.signature(model.call).parameters
        self.loss_has_training = "training" in inspect.signature(model.compute_loss).parameters
        self.sum_metrics = tf.function(self._sum_metrics, autograph=False)

    def examples(self, *batch: Any) -> tf.Tensor:
        """Returns the length of the global batch, which comes last."""
        return batch[-1]

    def train_step(self, update: Update, *, jit_compile: bool) -> Step:
        """Returns the training step."""

        def gradients(*batch: Any) -> tuple[tf.Tensor, list[tf.Tensor], _Values]:
            *components, length, examples = batch
            if self.train_inputs:
                components[0] = self.train_inputs(components[0])
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                values = self._values(tape)
                loss, changed = self._compute(components, values, training=True)
                # Every replica's mean counts by the length of its slice.
                share = tf.cast(length, loss.dtype) / tf.cast(examples, loss.dtype)
                objective = self.model.optimizer.scale_loss(loss * share)
            found = tape.gradient(objective, values[: len(self.trainable)])
            return self._row(length, loss), found, changed

        if jit_compile:
            gradients = tf.function(gradients, jit_compile=True, autograph=False)

        def step(*batch: Any) -> tf.Tensor:
            row, found, changed = gradients(*batch)
            self._assign(changed, batch[-2])
            update(found)
            return row

        return step

    def test_step(self) -> Step:
        """Returns the step of the evaluation."""

        def step(*batch: Any) -> tf.Tensor:
            *components, length, _ = batch
            if self.test_inputs:
                components[0] = self.test_inputs(components[0])
            loss, changed = self._compute(components, self._values(), training=False)
            self._assign(changed, length)
            return self._row(length, loss)

        return step

    def reset(self) -> None:
        """Resets the metrics."""
        self.model.reset_metrics()

    def logs(self, means: Mapping[str, float]) -> dict[str, float]:
        """Returns the mean loss, and the results of all metrics, over all replicas."""
        with self._total_metrics():
            results = self.model.get_metrics_result()
        return {**{name: _number(value) for name, value in results.items()}, **means}

    def state(self) -> list:
        """Returns the values of the metrics' variables, over all replicas."""
        several = self.replicas > 1 and self.metrics
        values = self.sum_metrics() if several else [metric.value for metric in self.metrics]
        return [value.numpy().tolist() for value in values]

    def set_state(self, state: list) -> None:
        """Sets the values of the metrics' variables: of one replica all, of the others nothing."""
        if not state:
            return
        for variable, value in zip(self.metrics, state, strict=True):
            for number, copy in enumerate(self.strategy.experimental_local_results(variable.value)):
                first = number == 0 and self.workers.index == 0
                copy.assign(tf.constant(value, copy.dtype) if first else tf.zeros_like(copy))

    def _values(self, tape: tf.GradientTape | None = None) -> list[tf.Tensor]:
        """Returns the values of this replica's copies, in the order of ``_Values``."""
        variables = (*self.trainable, *self.carried, *self.metrics)
        values = [tf.convert_to_tensor(self._own(variable)) for variable in variables]
        if tape:
            tape.watch(values[: len(self.trainable)])
        return values

    def _compute(
        self, batch: Sequence, values: Sequence[tf.Tensor], *, training: bool
    ) -> tuple[tf.Tensor, "_Values"]:
        """Returns the loss, a mean over the slice ``(x, y)`` or ``(x, y, sample_weight)`` of a
        batch, and the new values of variables, None where it is the old one.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(tuple(batch))
        variables = (*self.trainable, *self.carried, *self.metrics)
        mapping = list(zip(variables, values, strict=True))
        flag = {"training": training}
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            old = [scope.get_current_value(variable) for variable in variables]
            output = self.model(x, **(flag if self.has_training else {}))
            loss = self.model.compute_loss(
                x=x,
                y=y,
                y_pred=output,
                sample_weight=sample_weight,
                **(flag if self.loss_has_training else {}),
            )
            # Keras has multiplied it by this number, which is a third in float32, for example.
            loss /= keras.ops.cast(1.0 / self.replicas, loss.dtype)
            self.model.compute_metrics(x, y, output, sample_weight)
            new = [scope.get_current_value(variable) for variable in variables]
        return loss, [b if b is not a else None for a, b in zip(old, new, strict=True)]

    def _assign(self, changed: "_Values", length: tf.Tensor) -> None:
        """Gives this replica's copies their new values; those of layers the mean of all replicas
        that had examples, so that all go on with the same.
        """
        variables = (*self.trainable, *self.carried, *self.metrics)
        values = {number: value for number, value in enumerate(changed) if value is not None}
        if self.replicas > 1:
            layers = len(self.trainable) + len(self.carried)
            shared = [
                number
                for number in values
                if number < layers and variables[number].value.dtype.is_floating
            ]
            if shared:
                counts = [tf.cast(length > 0, values[number].dtype) for number in shared]
                parts = [
                    *(values[number] * count for number, count in zip(shared, counts, strict=True)),
                    *counts,
                ]
                sums = all_reduce(tf.distribute.ReduceOp.SUM, parts)
                means = zip(sums[: len(shared)], sums[len(shared) :], strict=True)
                values |= zip(shared, (total / count for total, count in means), strict=True)
            for number in values:
                if number >= layers:  # Of a metric: this replica's share.
                    old = tf.convert_to_tensor(self._own(variables[number]))
                    values[number] = tf.where(length > 0, values[number], old)
        for number, value in values.items():
            self._own(variables[number]).assign(value)

    def _own(self, variable: keras.Variable) -> tf.Variable:
        """Returns this replica's copy of a variable."""
        number = tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group)
        copies = self.strategy.experimental_local_results(variable.value)
        return copies[number - self.workers.index * self.workers.local_replicas]

    def _row(self, length: tf.Tensor, loss: tf.Tensor) -> tf.Tensor:
        weight = tf.cast(length, self.dtype)
        return tf.stack([weight, weight * tf.cast(loss, self.dtype)])

    def _sum_metrics(self) -> list[tf.Tensor]:
        """Returns the sums of all replicas' shares of the metrics."""

        def of_replica() -> list[tf.Tensor]:
            return all_reduce(
                tf.distribute.ReduceOp.SUM,
                # A value as it is read has no device of its own in the graph, which this asks for.
                [tf.identity(self._own(variable)) for variable in self.metrics],
            )

        summed = self.strategy.run(of_replica)
        return [self.strategy.experimental_local_results(value)[0] for value in summed]

    @contextlib.contextmanager
    def _total_metrics(self) -> Iterator[None]:
        """Has metrics read what all replicas have added up."""
        if self.replicas == 1 or not self.metrics:
            yield
            return
        totals = zip(self.metrics, self.sum_metrics(), strict=True)
        with keras.StatelessScope(list(totals)):
            yield


_Values: TypeAlias = list  # Of tensors, of the trainable variables, the layers' state, the metrics.


def _number(value: Any) -> Any:
    """Returns a metric's result as JSON can hold it."""
    array = np.asarray(value)
    return array.tolist() if array.ndim else float(array)
