"""What is asked of a compiled Keras model before it is trained, whoever made it.

keras_model.check(model, replicas=2)
keras_model.build(model, dataset.spec, batch_size=32)
keras_model.digest(model)
"""

import hashlib
import json
from typing import Any

from trainer.errors import ConfigurationError
from trainer.runtime import keras, tf

_MEANS = ("sum_over_batch_size", "mean")  # reductions of keras.losses.Loss


def check(model: keras.Model, replicas: int) -> None:
    """Raises ``ConfigurationError`` for a model that would be trained otherwise than it says."""
    if not getattr(model, "compiled", False) or model.optimizer is None:
        raise ConfigurationError(
            "Expected a model that is compiled with an optimizer. Received: one that is not. Call "
            "model.compile first."
        )
    own = ["train_step", "test_step"]
    if replicas > 1:
        own += ["compute_loss"]
    for name in own:
        if getattr(type(model), name) is not getattr(keras.Model, name):
            raise ConfigurationError(
                f"Expected a model with Keras' own {name}. Received: {type(model).__name__} with "
                "one of its own, which would not be called. Use a loss, compute_metrics and "
                "add_loss in its place."
            )
    if model.run_eagerly:
        raise ConfigurationError(
            "Expected a model that can be compiled into a graph. Received: run_eagerly=True. "
            "Use model.compile(run_eagerly=False), and model.fit to debug it."
        )
    if any(
        isinstance(variable.value, tf.distribute.DistributedValues) for variable in model.variables
    ):
        raise ConfigurationError(
            "Expected a model that was made outside of any tf.distribute strategy. Received: one "
            "of a strategy's scope. Leave the scope out: config=TrainConfig(strategy=...) says "
            "what to train under."
        )
    for loss in keras.tree.flatten(getattr(model, "loss", None)) if replicas > 1 else []:
        if isinstance(loss, keras.losses.Loss) and loss.reduction not in _MEANS:
            raise ConfigurationError(
                f"Expected losses that are means over a batch, for {replicas} devices. Received: "
                f"{type(loss).__name__} with reduction={loss.reduction!r}. Use "
                "reduction='sum_over_batch_size'."
            )


def build(model: keras.Model, spec: tuple, batch_size: int) -> None:
    """Makes all variables of a model, its metrics and its optimizer, as ``model.fit`` does."""
    model._symbolic_build(
        data_batch=tf.nest.map_structure(
            lambda part: keras.KerasTensor((batch_size, *part.shape), part.dtype.name), spec
        )
    )


def digest(model: keras.Model) -> str:
    """Returns a SHA-256 of what decides whether the variables of one model fit another. The names
    of layers and optimizers do not: Keras numbers them, and goes on counting in a process that
    makes two models.
    """
    variables = [
        (variable.name.rstrip("0123456789_"), list(variable.shape), variable.dtype)
        for variable in model.variables
    ]
    optimizer = _without_names(keras.optimizers.serialize(model.optimizer))
    text = json.dumps([variables, optimizer], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_names(item) for key, item in value.items() if key != "name"}
    return value
