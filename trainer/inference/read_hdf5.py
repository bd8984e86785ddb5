"""Reads the weights out of a file in Keras' HDF5 format, in a process of its own.

    sandbox.Child("trainer.inference.read_hdf5", "mnist.h5")

The origin of the file is unknown, and HDF5's C library has crashed on damaged ones: so this process
has little memory and little time, can open no other file and start nothing (``restrictions``), and
follows no external link or external storage. It sends ``{"shapes": [...], "config": bytes}``, the
model's configuration, which is JSON, and the arrays, little-endian float32; or an error whose
message is what was received in place of a model. ``model_file`` starts it.
"""

import io
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import inputs
from trainer.errors import DataError, InputError, TrainerError
from trainer.inference import restrictions, sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator

    import h5py
    import numpy as np

MEMORY = 700_000_000  # Bytes of address space; a sound file takes a quarter of that.
SECONDS = 10  # Of processor time; a sound file takes less than one.
MAX_NUMBERS = 2**23  # In all arrays together; the network has 2.4 million.
MAX_ARRAYS = 1000  # The network has eight.
MAX_CONFIG = 2**20  # Bytes of the configuration; that of the network has 4,000.


def main() -> None:
    """Sends the arrays of the file that the first argument names."""
    channel = sandbox.enter(address_space=MEMORY, cpu_seconds=SECONDS)
    try:
        config, arrays = _read(Path(sys.argv[1]))
    except TrainerError as error:
        # A name in the file may be long.
        channel.send_error(type(error)(str(error)[:300]))
        return
    header = {"shapes": [array.shape for array in arrays], "config": len(config)}
    channel.send(header, config, *(array.data for array in arrays))


def _read(path: Path) -> "tuple[bytes, list[np.ndarray]]":
    """Returns a file's configuration and its arrays. This process can open no other file then."""
    import h5py

    try:
        with inputs.open_file(path) as file:
            _read_first()
            restrictions.apply()
            if file.read(8) != b"\x89HDF\r\n\x1a\n":
                raise DataError("a file that is not HDF5")
            with h5py.File(file, "r") as opened:
                arrays = list(_weights(opened))
                config = opened.attrs.get("model_config", "")
                text = config if isinstance(config, bytes) else str(config).encode()
    except TrainerError:
        raise
    except OSError as error:
        if error.errno:  # Of the file itself; h5py's own have none.
            raise InputError(error.strerror) from error
        raise DataError("an HDF5 file that is truncated or damaged") from error
    except Exception as error:  # h5py raises whatever the damage leads to.
        raise DataError("an HDF5 file that is truncated or damaged") from error
    if len(text) > MAX_CONFIG:
        raise DataError(f"a configuration of {len(text):,} bytes")
    return text, arrays


def _read_first() -> None:
    """Reads a file made here: what h5py imports at first use is imported then."""
    import h5py
    import numpy as np

    with h5py.File(io.BytesIO(), "w") as file:
        file.attrs["layer_names"] = np.array([b"a"])
        file.attrs["model_config"] = "{}"
        group = file.create_group("a")
        group.attrs["weight_names"] = ["w"]
        group.create_dataset("w", data=np.zeros((2, 2), ">f8"), chunks=True, compression="gzip")
        list(_weights(file))


def _weights(file: "h5py.File") -> "Iterator[np.ndarray]":
    """Yields the arrays in the order of the layers."""
    import h5py

    # A whole model has its weights in a group; a file of weights alone is that group.
    group = _member(file, "model_weights") if "model_weights" in file else file
    if "layer_names" not in group.attrs:
        raise DataError("an HDF5 file without the weights of a Keras model")
    numbers_left, arrays_left = MAX_NUMBERS, MAX_ARRAYS
    for layer in map(_text, group.attrs["layer_names"]):
        of_layer = _member(group, layer)
        for name in map(_text, of_layer.attrs.get("weight_names", ())):
            array = _member(of_layer, name)
            if not isinstance(array, h5py.Dataset) or array.is_virtual or array.external:
                raise DataError(f"an HDF5 file that keeps {name} elsewhere")
            numbers_left -= math.prod(array.shape or ())
            arrays_left -= 1
            if array.dtype.kind != "f" or numbers_left < 0:
                raise DataError(f"{name} of {array.dtype} and shape {array.shape}")
            if arrays_left < 0:
                raise DataError(f"an HDF5 file of more than {MAX_ARRAYS:,} arrays")
            yield array[()].astype("<f4")


def _member(group: "h5py.Group", path: str) -> "h5py.Group | h5py.Dataset":
    """Returns what lies at a path in this file; links into other files are not followed."""
    import h5py

    for part in path.split("/"):
        if not isinstance(group, h5py.Group) or part not in group:
            raise DataError(f"an HDF5 file without {path}")
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise DataError(f"an HDF5 file in which {path} is a link")
        group = group[part]
    return group


def _text(name: object) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


if __name__ == "__main__":
    main()
