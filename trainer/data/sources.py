"""Loads a data set by the name of its source.

    digits = load("bundled")
    digits.x_train.shape, digits.y_train[:3]        # (60000, 28, 28), [5, 0, 4]

Sources: ``bundled``, a path (an ``.npz`` of Keras' layout or a folder of IDX files), ``keras`` and
``tfds:NAME``. Only the last two load TensorFlow.
"""

import contextlib
import importlib.resources
import io
import logging
import math
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np

from trainer import inputs
from trainer.data import archives
from trainer.data.digits import IMAGE_SHAPE, Digits
from trainer.errors import ConfigurationError, DataError, InputError

# Digits.sha256 of MNIST as its makers published it: 60,000 and 10,000 examples.
MNIST_SHA256 = "796354bf1a5bdb3f752e23f487245288f2c35b1e0bc343e07448cffbb5f56624"

_BUNDLED_INSTEAD = "Use data='bundled', which needs no network."


def load(source: str) -> Digits:
    """Loads a data set.

    Args:
        source: ``bundled``, a path, ``keras`` or ``tfds:NAME``. Without a network, TensorFlow
            Datasets retries for three to four minutes before it gives up.

    Raises:
        InputError: The source is missing, unreadable or cannot be reached.
        DataError: Its content is not a valid data set.
        ConfigurationError: ``tfds:`` without TensorFlow Datasets, or ``keras`` without TensorFlow.
    """
    if source == "bundled":
        return _load_bundled()
    if source == "keras":
        return _load_keras()
    if source.startswith("tfds:"):
        return _load_tfds(source.removeprefix("tfds:"))
    path = Path(source)
    folder = False
    with contextlib.suppress(OSError, ValueError):  # Opening it will raise the same.
        folder = stat.S_ISDIR(path.stat().st_mode)
    try:
        arrays = archives.read_idx_folder(path) if folder else archives.read_npz(path)
    except MemoryError as error:
        raise DataError(
            f"Expected data at {path} that this process has memory for. Received: more. "
            "Use fewer examples, or allow it more memory."
        ) from error
    with archives.naming(path):
        return Digits(**arrays)


def downloads(source: str) -> bool:
    """Tells whether ``load`` needs a network for a source."""
    return source == "keras" or source.startswith("tfds:") or "://" in source


def check_installed(source: str) -> None:
    """Imports the packages that ``load`` needs for a source.

    Raises:
        ConfigurationError: As that raises it.
    """
    if source == "keras":
        import trainer.runtime  # noqa: F401
    elif source.startswith("tfds:"):
        _import_tfds(source.removeprefix("tfds:"))


def _load_bundled() -> Digits:
    with importlib.resources.as_file(
        importlib.resources.files("trainer.data") / "assets" / "mnist.npz"
    ) as path:
        try:
            received = (digits := Digits(**archives.read_npz(path))).sha256
        except (DataError, InputError) as error:
            remedy = "It is the package's own: install digits-trainer again."
            raise type(error)(f"{error} {remedy}") from error
    if received != MNIST_SHA256:
        raise DataError(
            f"Expected the bundled MNIST with SHA-256 {MNIST_SHA256}. Received: {received}. "
            "Install digits-trainer again."
        )
    return digits


def _load_keras() -> Digits:
    # Keras checks what is in its cache by a digest, for which it reads it, whatever it is.
    cached = Path(os.environ.get("KERAS_HOME", "~/.keras"), "datasets", "mnist.npz")
    try:
        with inputs.open_file(cached.expanduser()):
            pass
    except FileNotFoundError:
        pass  # It is downloaded.
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home.
        raise InputError(
            f"Expected Keras' copy of MNIST, or nothing yet, at {cached}. Received: "
            f"{getattr(error, 'strerror', None) or error}. Remove it, or use data='bundled'."
        ) from error

    from trainer.runtime import keras

    try:
        # Keras prints about its download on stdout, which is for this program's output.
        with contextlib.redirect_stdout(sys.stderr):
            (x_train, y_train), (x_test, y_test) = keras.datasets.mnist.load_data()
    except Exception as error:  # Keras raises a bare Exception when a download fails.
        raise InputError(
            "Expected MNIST from keras.datasets.mnist, in Keras' cache or over the network. "
            f"Received: {error}. {_BUNDLED_INSTEAD}"
        ) from error
    return Digits(x_train, y_train, x_test, y_test)


def _import_tfds(name: str) -> ModuleType:
    import trainer.runtime  # noqa: F401  (imports TensorFlow quietly, or raises what is missing)

    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ConfigurationError(
            f"Expected TensorFlow Datasets for data='tfds:{name}'. Received: {error}. "
            "Install it: pip install 'digits-trainer[tfds]'"
        ) from error
    return tensorflow_datasets


def _load_tfds(name: str) -> Digits:
    tfds = _import_tfds(name)
    # Its progress bars and retry messages are noise in a log.
    tfds.disable_progress_bar()
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder = tfds.builder(name)
            _check_features(name, builder.info.features)
            builder.download_and_prepare()
            count = sum(builder.info.splits[part].num_examples for part in ("train", "test"))
            archives.check_memory(
                f"tfds:{name}", count * (math.prod(IMAGE_SHAPE) + 8)
            )  # Labels are int64.
            train, test = builder.as_dataset(split=["train", "test"], batch_size=-1)
    except DataError:
        raise
    except Exception as error:  # tfds, requests and TensorFlow's file system each raise their own.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"Expected the TensorFlow data set {name!r} with the splits train and test, prepared "
            f"in its data_dir or over the network. Received: {reason[:300]}. {_BUNDLED_INSTEAD}"
        ) from error
    arrays = {}
    for part, examples in (("train", tfds.as_numpy(train)), ("test", tfds.as_numpy(test))):
        # TensorFlow Datasets keeps the one channel of a grey image as a last axis.
        arrays[f"x_{part}"] = examples["image"].reshape(-1, *IMAGE_SHAPE)
        arrays[f"y_{part}"] = examples["label"]
    with archives.naming(f"tfds:{name}"):
        return Digits(**arrays)


def _check_features(name: str, features: Mapping) -> None:
    """Refuses other kinds of data before they are downloaded."""
    if not {"image", "label"} <= set(features):
        raise DataError(
            f"Expected the features image and label in tfds:{name}. "
            f"Received: {', '.join(features)}. {_BUNDLED_INSTEAD}"
        )
    image = features["image"]
    if image.shape not in (IMAGE_SHAPE, (*IMAGE_SHAPE, 1)) or image.np_dtype != np.uint8:
        raise DataError(
            f"Expected grey images of 28×28 pixels, uint8, in tfds:{name}. "
            f"Received: {np.dtype(image.np_dtype)} of shape {image.shape}. {_BUNDLED_INSTEAD}"
        )
