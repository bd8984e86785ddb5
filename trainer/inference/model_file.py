"""Loads a model from a file of unknown origin.

    model = model_file.load(Path("mnist.h5"))

The network is built by ``trainer.models.cnn``; only the weights are read from the file, in a
process of its own (``read_hdf5``). Anything else in it, such as a Lambda layer or pickled code, is
never run.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import cli
from trainer.errors import DataError, InputError
from trainer.inference import sandbox
from trainer.inference.read_hdf5 import MAX_CONFIG

if TYPE_CHECKING:
    import keras
    import numpy as np

MODULE = "trainer.inference.read_hdf5"  # What the process runs.
DEADLINE = 60.0  # Seconds for reading the file, on the slowest disk.
REMEDY = f"Name an mnist.h5 that {cli.TASK} has written."

# The fields of a layer's configuration that decide what it computes.
_DECISIVE = (
    "filters",
    "units",
    "kernel_size",
    "pool_size",
    "strides",
    "padding",
    "dilation_rate",
    "groups",
    "activation",
    "use_bias",
)


def load(path: Path, *, threads: int | None = None) -> "keras.Sequential":
    """Loads the weights of a file into the network.

    Args:
        path: A model or its weights in Keras' HDF5 format (``mnist.h5``).
        threads: Threads inside one operation (``runtime.set_threads``); None: unchanged.

    Returns:
        A model as ``trainer.models.cnn.build`` makes it, compiled. Input: float32
        (n, 28, 28, 1), 0 to 1. Output: float32 (n, 10), probabilities.

    Raises:
        InputError: The file is missing or cannot be read.
        DataError: It is not HDF5, truncated, damaged, of another network, or its weights are not
            all finite.
        ConfigurationError: There is no TensorFlow, or it runs with other threads.
    """
    with sandbox.Child(MODULE, path) as child:
        # The file is read while TensorFlow starts.
        from trainer import runtime
        from trainer.models import cnn

        if threads is not None:
            runtime.set_threads(threads)
        with runtime.keras_defaults():
            model = cnn.build(optimizer="adadelta", learning_rate=1.0, seed=0)
        try:
            with child.deadline(DEADLINE):
                arrays = _receive(child, model)
        except (DataError, InputError) as error:
            raise type(error)(_expected(path, str(error))) from None
        except sandbox.ProtocolError as error:
            raise DataError(_expected(path, f"an HDF5 file that is damaged: {error}")) from error
    for variable, value in zip(model.trainable_weights, arrays, strict=True):
        variable.assign(value)
    return model


def _receive(child: sandbox.Child, model: "keras.Sequential") -> list["np.ndarray"]:
    """Receives the arrays of a file if their shapes and layers are those of the model."""
    import numpy as np

    header = child.receive()
    shapes = header.get("shapes")
    if not isinstance(shapes, list):
        raise sandbox.ProtocolError
    shapes = [sandbox.integers(shape) for shape in shapes]
    expected = [tuple(variable.shape) for variable in model.trainable_weights]
    if shapes != expected:
        received = ", ".join(map(str, shapes)) or "none"
        raise DataError(f"another network, whose weights have the shapes {received[:160]}")
    [size] = sandbox.integers([header.get("config")], most=MAX_CONFIG)
    config = child.read(size)
    if config and _layers(config) != _layers(model.to_json().encode()):
        raise DataError("another network, with the same weights in other layers")
    arrays = [
        np.frombuffer(child.read(4 * math.prod(shape)), "<f4").reshape(shape) for shape in expected
    ]
    if not all(np.isfinite(array).all() for array in arrays):
        raise DataError("weights that are not all finite")
    return arrays


def _layers(config: bytes) -> list | None:
    """Returns class and decisive fields of each layer; None for a text of another kind."""
    try:
        layers = json.loads(config)["config"]["layers"]
        return [
            (layer["class_name"], [layer["config"].get(name) for name in _DECISIVE])
            for layer in layers
            if layer["class_name"] not in ("InputLayer", "Dropout")
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _expected(path: Path, received: str) -> str:
    return f"Expected a model of the digits CNN at {path}. Received: {received}. {REMEDY}"
