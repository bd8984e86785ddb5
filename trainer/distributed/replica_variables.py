"""A finished model under a strategy: its variables, mirrored while it is trained.

    with mirrored(model, strategy):
        ...             # as if the model had been made and compiled in strategy.scope()

Keras and TensorFlow want a model made in the strategy's scope, so the script that makes it has to
know the strategy. Here it is made before anybody knows of several devices.
"""

import contextlib
from collections.abc import Iterator

from trainer.runtime import keras, tf


@contextlib.contextmanager
def mirrored(model: keras.Model, strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Has a strategy mirror the variables of a model, its optimizer and its metrics. At the end
    they are what they were, with the values of the first copy.

    Args:
        model: Built, with optimizer and metrics, and made outside of any strategy.
        strategy: TensorFlow's default strategy mirrors nothing.
    """
    if strategy is tf.distribute.get_strategy():
        yield
        return
    optimizers = optimizers_of(model.optimizer) if model.optimizer else []
    with contextlib.ExitStack() as restored:
        for optimizer in optimizers:
            restored.callback(
                setattr, optimizer, "_distribution_strategy", optimizer._distribution_strategy
            )
            optimizer._distribution_strategy = strategy
        restored.callback(_number_variables, optimizers)
        variables = [*model.variables, *model.metrics_variables]
        variables += model.optimizer.variables if model.optimizer else []
        for variable in {id(variable): variable for variable in variables}.values():
            restored.callback(_restore, variable, variable._value, strategy)
            variable._value = _mirror(variable._value, strategy)
        _number_variables(optimizers)
        yield


def optimizers_of(optimizer: keras.optimizers.Optimizer) -> list[keras.optimizers.Optimizer]:
    """Returns an optimizer, and the one inside it, if there is one (``LossScaleOptimizer``)."""
    inner = getattr(optimizer, "inner_optimizer", None)
    return [optimizer, inner] if inner else [optimizer]


def _mirror(original: tf.Variable, strategy: tf.distribute.Strategy) -> tf.Variable:
    with strategy.scope():
        return tf.Variable(
            tf.convert_to_tensor(original),
            trainable=original.trainable,
            dtype=original.dtype,
            name=original.name.partition(":")[0],
        )


def _restore(
    variable: keras.Variable, original: tf.Variable, strategy: tf.distribute.Strategy
) -> None:
    copy = strategy.experimental_local_results(variable._value)[0]
    original.assign(tf.convert_to_tensor(copy))
    variable._value = original


def _number_variables(optimizers: list[keras.optimizers.Optimizer]) -> None:
    """Tells optimizers the numbers of their variables anew, which they find by TensorFlow's."""
    for optimizer in optimizers:
        if hasattr(optimizer, "_trainable_variables_indices"):
            optimizer._trainable_variables_indices = {
                optimizer._var_key(variable): number
                for number, variable in enumerate(optimizer._trainable_variables)
            }
