"""A model that a run has written, and the images that it is measured on.

model, config, spec = load_model(Path("out/model.keras"))
data = open_for(config, spec, limit=None)
predict, spec = load_predictor(Path("out/model.keras"))
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from trainer import files, inputs, runtime
from trainer.config import TrainConfig
from trainer.data import sources
from trainer.data.dataset import Dataset, Renumbered
from trainer.data.digits import Digits
from trainer.errors import DataError, InputError, UsageError
from trainer.models import registry
from trainer.runtime import keras
from trainer.training.model_workload import limited, predictor, splits_of


def load_model(
    path: Path, network: str | None = None
) -> tuple[keras.Model, TrainConfig, registry.DataSpec]:
    """Loads a model that a run has written: builds the network as the run has, and reads the
    weights from the file.

    Args:
        path: A ``model.keras``, with its ``model.json`` beside it.
        network: The run's function, which the manifest alone is not trusted to name; None: the
            network is built in.

    Returns:
        The model, the configuration of its run, and what the model is given.

    Raises:
        InputError: The file is missing or cannot be read.
        DataError: It is not the one that the manifest beside it describes, or cannot be loaded.
        UsageError: Its network is another function's.
        ConfigurationError: The run's function makes no such network any more.
    """
    try:
        with inputs.open_file(path):
            pass
    except OSError as error:
        raise InputError(
            f"Expected a model.keras at {path}. Received: {error.strerror or error}. Name one that "
            "a run has written."
        ) from error
    names = files.OTHERS._replace(model=path.name)
    manifest = files.read_manifest(path.parent, names)
    if not files.is_complete(path.parent, names):
        raise DataError(
            f"Expected the model that {names.manifest} describes at {path}. Received: "
            f"{'another one' if manifest else f'no {names.manifest} beside it'}. Keep a run's "
            "files together."
        )
    try:
        config = TrainConfig(**manifest["config"])
        data = manifest["data"]
        spec = registry.DataSpec(
            tuple(data["shape"]), data["dtype"], tuple(map(str, data["classes"]))
        )
    except (KeyError, TypeError, UsageError) as error:
        raise DataError(
            f"Expected the manifest of a run at {path.parent / names.manifest}. Received: "
            f"{error}. Use the version of this program that has written it."
        ) from error
    if config.model != (network or config.model) or (not network and ":" in config.model):
        raise UsageError(
            f"network must be the function that has made the model of {path}: {config.model}, as "
            f"{names.manifest} has it, is code that would run here. Received: network={network!r}. "
            f"Use network={config.model!r} if you trust it."
        )
    model = registry.build(config, spec, examples=data["train_examples"])
    model.optimizer.build(model.trainable_variables)  # The file has its variables, too.
    try:
        model.load_weights(path)
    except Exception as error:  # Keras and h5py raise whatever does not fit.
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"Expected the weights of {config.model} in {path}. Received: {reason}. Use the code "
            "that it was trained with."
        ) from error
    return model, config, spec


def load_predictor(
    path: Path, network: str | None = None, *, threads: int | None = None
) -> tuple[Callable[[np.ndarray], np.ndarray], registry.DataSpec]:
    """Loads a model that a run has written, to classify pictures.

    Args:
        path: A ``model.keras``, with its ``model.json`` beside it.
        network: As ``load_model`` takes it.
        threads: Threads inside one TensorFlow operation (``runtime.set_threads``); None: unchanged.

    Returns:
        A function from uint8 (n, height, width, channels), n at least 1, to float32 (n, classes),
        which raises NotFiniteError; and what the model is given.

    Raises:
        TrainerError: As ``load_model``; the channels are neither 1 nor 3.
    """
    if threads is not None:
        runtime.set_threads(threads)
    with runtime.keras_defaults():
        model, _, spec = load_model(path, network)
        predict = predictor(model)
        if spec.shape[2] not in (1, 3):
            raise DataError(
                f"Expected a model of grey or coloured pictures at {path}. Received: one of images "
                f"with {spec.shape[2]} channels. Measure it with trainer.evaluate."
            )
        predict(np.zeros((1, *spec.shape), spec.dtype))  # Traced as it was trained.

    return lambda pictures: predict(pictures.astype(spec.dtype)), spec


def open_for(config: TrainConfig, spec: registry.DataSpec, *, limit: int | None) -> Dataset:
    """Opens the images that a model is measured on: the test images of a source, else those for
    validation, else all.

    Args:
        config: With the source.
        spec: What the model is given; the source may have some of its classes alone.
        limit: Number of images; None: all.

    Raises:
        DataError: The images have another shape, or other classes.
        TrainerError: As ``sources.load`` raises it.
    """
    source = sources.load(config.data, image_size=config.height_and_width, skip_bad=config.skip_bad)
    splits = splits_of(source) if isinstance(source, Digits) else source
    data = next(part for part in (splits.test, splits.validation, splits.train) if part is not None)
    expected, received = tuple(spec.shape), tuple(data.spec[0].shape)
    if expected != received:
        raise DataError(
            f"Expected images of shape {expected}, which the model takes, in {config.data}. "
            f"Received: {received}. Use the image_size of the run."
        )
    classes, found = list(spec.classes), list(data.classes or ())
    if others := [name for name in found if name not in classes]:
        raise DataError(
            f"Expected images of the classes {', '.join(classes)[:200]} in {config.data}. "
            f"Received: {', '.join(others)[:200]}, too. Name the folders as those of the run."
        )
    data = limited(data, "test_limit", limit, config.seed)
    return data if found == classes else Renumbered(data, classes)
