"""The network of a run by its name: built in, or a function of the user's own.

    model = build(config, DataSpec((180, 180, 3), "uint8", ("cat", "dog")), examples=5000)

A function is named as in entry points, ``package.module:function``. It is called with the
``DataSpec`` and the ``TrainConfig``, and returns a Keras model of probabilities, one for each
class: compiled, or else compiled here as the configuration says.
"""

import contextlib
import dataclasses
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trainer.config import TrainConfig
from trainer.errors import ConfigurationError, UsageError
from trainer.models import image_models, optimizers
from trainer.recipes import RECIPES
from trainer.runtime import keras

_BUILT_IN = {"cnn": image_models.cnn, "resnet": image_models.resnet}
_OF_THE_CNN = ("pooling_dropout", "dense_dropout")


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What a model is given.

    Attributes:
        shape: Height, width and channels of an image, whose values are from 0 to 255.
        dtype: Its type, as NumPy names it: ``uint8``, or ``float32`` where pictures are resized.
        classes: Names of the classes; an image's label is the number of its class, int32.
    """

    shape: tuple[int, int, int]
    dtype: str
    classes: Sequence[str]


def build(config: TrainConfig, spec: DataSpec, *, examples: int) -> keras.Model:
    """Builds and compiles the network of a run.

    Args:
        config: The run's.
        spec: What the network is given.
        examples: Number of training examples, which the learning rate schedule depends on.

    Raises:
        UsageError: There is no such function; or a setting is not for this network.
        ConfigurationError: The function raises, or returns something else than a model that gives
            one probability for each class.
    """
    built_in = _BUILT_IN.get(config.model)
    if config.model == "resnet":
        for name in _OF_THE_CNN:
            if getattr(config, name) != RECIPES[config.recipe][name]:
                raise UsageError(
                    f"{name} is for model='cnn'. Received: {name}={getattr(config, name)} and "
                    "model='resnet'. Leave it out."
                )
    keras.utils.set_random_seed(config.seed)
    with _dtype_policy(config):
        if built_in:
            model = built_in(spec.shape, len(spec.classes), config)
        else:
            model = _call(_find(config.model), config, spec)
    _check_output(model, spec, config.model)
    if not getattr(model, "compiled", False):
        _compile(model, config, examples)
    elif config.label_smoothing:
        raise UsageError(
            f"label_smoothing is for models that are compiled here. Received: label_smoothing="
            f"{config.label_smoothing} and {config.model}, which compiles its own. Use "
            "label_smoothing=0, and give its loss the label smoothing."
        )
    return model


def _compile(model: keras.Model, config: TrainConfig, examples: int) -> None:
    loss = (
        keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing)
        if config.label_smoothing
        else keras.losses.SparseCategoricalCrossentropy()
    )
    model.compile(
        optimizer=optimizers.create(config.optimizer, optimizers.learning_rate(config, examples)),
        loss=loss,
        metrics=["accuracy"],
    )


@contextlib.contextmanager
def _dtype_policy(config: TrainConfig) -> Iterator[None]:
    """Has layers compute in the precision of a configuration."""
    before = keras.config.dtype_policy()
    if config.precision == "mixed_bfloat16":
        keras.config.set_dtype_policy(config.precision)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _find(name: str) -> Callable[[DataSpec, TrainConfig], Any]:
    """Returns the function of a name; the current folder is searched last."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:  # noqa: PTH109  (its entries are strings)
        sys.path.append(os.getcwd())  # noqa: PTH109
    try:
        return getattr(importlib.import_module(module), function)
    except AttributeError:
        raise UsageError(
            f"Expected a function {function} in {module}. Received: a module without. Name one "
            "that takes the data's spec and the configuration."
        ) from None
    except Exception as error:  # Whatever the module raises as it is imported.
        if isinstance(error, ModuleNotFoundError) and module.startswith(error.name or "?"):
            raise UsageError(
                f"Expected a module {module} for model={name!r}. Received: none in the current "
                "folder or in Python's path. Name it as an import would."
            ) from None
        raise ConfigurationError(_raised(name, error)) from error


def _call(function: Callable, config: TrainConfig, spec: DataSpec) -> keras.Model:
    try:
        return function(spec, config)
    except Exception as error:  # Whatever a user's function raises.
        raise ConfigurationError(_raised(config.model, error)) from error


def _raised(name: str, error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return (
        f"Expected a model from {name}. Received: {reason[:300]} ({where.filename}, line "
        f"{where.lineno}). Correct it there."
    )


def _check_output(model: Any, spec: DataSpec, name: str) -> None:
    if not isinstance(model, keras.Model):
        raise ConfigurationError(
            f"Expected a Keras model from {name}. Received: {type(model).__name__}. Return it."
        )
    try:
        # A call builds it, too, if it has no input yet.
        images = keras.KerasTensor((None, *spec.shape), spec.dtype)
        output = keras.tree.map_structure(lambda tensor: tuple(tensor.shape), model(images))
    except Exception as error:  # Of whichever layer does not take them.
        raise ConfigurationError(
            f"Expected a model from {name} that takes images of shape {tuple(spec.shape)}. "
            f"Received: {' '.join(str(error).split())[:300]}. Use spec.shape for its input."
        ) from error
    if output != (None, len(spec.classes)):
        raise ConfigurationError(
            f"Expected a model from {name} whose output is a probability for each of the "
            f"{len(spec.classes)} classes, of shape (None, {len(spec.classes)}). Received: {output}"
            ". Use len(spec.classes) units and a softmax in its last layer."
        )
