"""A model out of its file, which may be anyone's.

    cnn = saved.load(Path("mnist.h5"))

The network is built by ``trainer.models.cnn``; of the file only the weights are taken, by a process
of its own (``read_hdf5``). What else stands in it, a Lambda layer or pickled code, is never run.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import DataError, InputError

if TYPE_CHECKING:
    import keras
    import numpy as np

DEADLINE = 60.0  # Seconds for reading the file, on the slowest disk.
REMEDY = "Name an mnist.h5 that python -m trainer.task has written."

# What of a layer's configuration decides what it computes.
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
    """Returns the network with the weights of a file.

    Args:
        path: A model or its weights in Keras' HDF5 format (``mnist.h5``).
        threads: Inside one operation (``runtime.set_threads``); None: as it is.

    Returns:
        A model as ``trainer.models.cnn.build`` makes it, compiled. Input: float32
        (n, 28, 28, 1), 0 to 1. Output: float32 (n, 10), probabilities.

    Raises:
        InputError: The file is missing or cannot be read.
        DataError: It is not HDF5, truncated, damaged, of another network, or has weights that are
            not finite.
        ConfigurationError: There is no TensorFlow, or it runs with other threads.
    """
    with _start(path) as reading:
        # The file is read while TensorFlow starts.
        from trainer import runtime
        from trainer.models import cnn as model

        if threads is not None:
            runtime.set_threads(threads)
        try:
            content, received = reading.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            reading.kill()
            raise DataError(_expected(path, f"one that takes more than {DEADLINE:g} s")) from None
    if reading.returncode == InputError.exit_code:
        raise InputError(_expected(path, received.decode(errors="replace")))
    if reading.returncode == DataError.exit_code:
        raise DataError(_expected(path, received.decode(errors="replace")))
    if reading.returncode:
        raise DataError(_expected(path, "an HDF5 file that is damaged: reading it crashed"))
    import numpy as np

    arrays = dict(np.load(io.BytesIO(content), allow_pickle=False))
    config = arrays.pop("config").tobytes()
    cnn = model.build(optimizer="adadelta", learning_rate=1.0, seed=0)
    _check(path, cnn, list(arrays.values()), config)
    for variable, value in zip(cnn.trainable_weights, arrays.values(), strict=True):
        variable.assign(value)
    return cnn


def _start(path: Path) -> subprocess.Popen:
    # -P: the folder of that file, the package's, is none to import from. NumPy's threads would
    # take the memory that the process is allowed.
    return subprocess.Popen(
        [sys.executable, "-P", Path(__file__).with_name("read_hdf5.py"), path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )


def _check(path: Path, cnn: "keras.Sequential", arrays: list["np.ndarray"], config: bytes) -> None:
    import numpy as np

    expected = [tuple(variable.shape) for variable in cnn.trainable_weights]
    shapes = [array.shape for array in arrays]
    if shapes != expected or (config and _layers(config) != _layers(cnn.to_json().encode())):
        other = "the same weights in other layers"
        if shapes != expected:
            other = f"weights of the shapes {', '.join(map(str, shapes)) or 'of none'}"
        raise DataError(_expected(path, f"another network: {other[:200]}"))
    if not all(np.isfinite(array).all() for array in arrays):
        raise DataError(_expected(path, "weights that are not all finite"))


def _layers(config: bytes) -> list | None:
    """Returns of each layer what decides what it computes; None: the text is no configuration."""
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
