"""The files of a trained model: mnist.h5, history.json, and mnist.json, which describes both; or
model.keras, history.json and model.json.

    with files.lock_output_dir(folder):
        save(folder, model, history, description)

The manifest is written last, and names the SHA-256 of the model.
"""

import hashlib
import io
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import ConfigurationError, OutputError
from trainer.files import (
    DIGITS,
    HISTORY_FILE,
    MODEL_FILE,
    Names,
    is_complete,
    read_manifest,
    write_files,
)

if TYPE_CHECKING:
    import keras


def save(
    folder: Path,
    model: "keras.Model",
    history: dict[str, list[float]],
    description: dict,
    *,
    names: Names = DIGITS,
) -> dict:
    """Writes the model in Keras' HDF5 or its own format, the history, and the manifest that
    describes both.

    Args:
        folder: A folder under ``files.lock_output_dir``.
        model: A compiled model of stock layers.
        history: What ``loop.fit`` returned.
        description: The other fields of the manifest: metrics, configuration, versions, data.
        names: Names of the files; the model's suffix decides its format.

    Returns:
        The manifest: ``description``, and under ``model`` the file's name, size in bytes, SHA-256,
        number of parameters, and ``weights_sha256`` (see that function).

    Raises:
        OutputError: A file cannot be written: the previous files are still there. Or another run
            has written its own files there meanwhile.
    """
    content = _hdf5(model) if names.model.endswith(".h5") else archive(model)
    manifest = {
        "model": {
            "file": names.model,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "parameters": model.count_params(),
            "weights_sha256": weights_sha256(model),
        },
        **description,
    }
    write_files(
        folder,
        {names.model: content, HISTORY_FILE: _json(history), names.manifest: _json(manifest)},
    )
    complete = is_complete(folder, names)
    if not complete or read_manifest(folder, names).get("run") != manifest.get("run"):
        raise OutputError(
            f"Expected the files of this run in {folder}. Received: those of another one, which "
            "wrote there at the same time. Use an output_dir of its own for each run."
        )
    return manifest


def weights_sha256(model: "keras.Model") -> str:
    """Returns the SHA-256 over the bytes of the trainable weights, in their order: equal for two
    runs exactly if they ended with the same bits.
    """
    digest = hashlib.sha256()
    for weight in model.trainable_weights:
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def archive(model: "keras.Model") -> bytes:
    """Returns the content of a model's file in Keras' own format, with the optimizer's variables.

    Raises:
        ConfigurationError: A layer of the user's own cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="trainer-") as folder:
        path = Path(folder, "model.keras")
        try:
            model.save(path)
        except OSError:
            raise
        except Exception as error:  # Of a layer's get_config, for example.
            reason = " ".join(str(error).split())[:300]
            raise ConfigurationError(
                f"Expected a model that Keras can save. Received: {reason}. Give its layers a "
                "get_config."
            ) from error
        return path.read_bytes()


class _HDF5(io.BytesIO):
    """A file in memory that ``model.save`` and h5py take for one on disk.

    HDF5 cannot write to a full disk without crashing the process (a segmentation fault, where the
    file cannot be closed): so it never writes to one here.
    """

    def __fspath__(self) -> str:
        return MODEL_FILE  # Keras chooses the format by the suffix ...

    __str__ = __fspath__  # ... of this


def _hdf5(model: "keras.Model") -> bytes:
    """Returns the content of a model's HDF5 file: what ``model.save`` writes, without the
    optimizer's variables.

    With them, Keras 3.15 loads a model that ``fit`` refuses: it builds the optimizer for no
    variables (``model._trainable_variables`` in ``load_model_from_hdf5``, which has none of the
    layers'). Without, ``fit`` goes on with the same optimizer and learning rate, its accumulators
    at their start.
    """
    import h5py
    from absl import logging  # Keras logs through it.

    verbosity = logging.get_verbosity()
    # Keras warns in four lines that the format which was asked for is an old one.
    logging.set_verbosity(logging.ERROR)
    try:
        model.save(saved := _HDF5())
    finally:
        logging.set_verbosity(verbosity)
    with h5py.File(saved, "r") as source, h5py.File(kept := _HDF5(), "w") as target:
        target.attrs.update(source.attrs)
        source.copy("model_weights", target)
    return kept.getvalue()


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
