"""Reads the weights out of a file in Keras' HDF5 format, in a process of its own.

    python trainer/inference/read_hdf5.py mnist.h5 >weights.npz

The file may be anyone's, and HDF5's C library has crashed on damaged ones: so this process has
little memory and little time, opens nothing but that file (no external link, no external storage)
and runs nothing that stands in it. ``model_file`` starts it; it imports nothing of the package.
Exit codes: 0, the arrays are on stdout; 65 or 66, stderr says what was received instead.
"""

import contextlib
import io
import math
import os
import stat
import sys
from collections.abc import Iterator

MEMORY = 700_000_000  # Bytes of address space; a sound file takes a quarter of that.
SECONDS = 10  # Of processor time; a sound file takes less than one.
NUMBERS = 2**23  # In all arrays together; the network has 2.4 million.
CONFIG = 2**20  # Bytes of the description of the layers; that of the network has 4,000.


def main() -> int:
    """Writes the arrays of the file that the first argument names to stdout."""
    _limit()
    import h5py
    import numpy as np

    try:
        if stat.S_ISFIFO(os.stat(sys.argv[1]).st_mode):  # noqa: PTH116
            return _fail(66, "a pipe, no file")  # Opening it could take forever.
        with open(sys.argv[1], "rb") as file:  # noqa: PTH123  (unbuffered reads are h5py's)
            if file.read(8) != b"\x89HDF\r\n\x1a\n":
                return _fail(65, "a file that is not HDF5")
            with h5py.File(file, "r") as opened:
                arrays = {f"weights_{n}": array for n, array in enumerate(_weights(opened))}
                config = opened.attrs.get("model_config", "")
                text = config if isinstance(config, bytes) else str(config).encode()
    except OSError as error:
        if error.errno:  # Of the file itself; h5py's own have none.
            return _fail(66, error.strerror)
        return _fail(65, "an HDF5 file that is truncated or damaged")
    except _NotKerasError as error:
        return _fail(65, str(error))
    except Exception:  # h5py raises whatever the damage leads to.
        return _fail(65, "an HDF5 file that is truncated or damaged")
    if len(text) > CONFIG:
        return _fail(65, f"a description of the layers of {len(text):,} bytes")
    np.savez(content := io.BytesIO(), config=np.frombuffer(text, np.uint8), **arrays)
    sys.stdout.buffer.write(content.getvalue())
    return 0


class _NotKerasError(Exception):
    """What the file holds instead of a Keras model's weights."""


def _weights(file) -> Iterator:
    """Yields the arrays in the order of the layers."""
    import h5py

    # A whole model has its weights in a group; a file of weights alone is that group.
    group = _member(file, "model_weights") if "model_weights" in file else file
    if "layer_names" not in group.attrs:
        raise _NotKerasError("an HDF5 file without the weights of a Keras model")
    left = NUMBERS
    for layer in map(_text, group.attrs["layer_names"]):
        of_layer = _member(group, layer)
        for name in map(_text, of_layer.attrs.get("weight_names", ())):
            array = _member(of_layer, name)
            if not isinstance(array, h5py.Dataset) or array.is_virtual or array.external:
                raise _NotKerasError(f"an HDF5 file that keeps {name} elsewhere")
            left -= math.prod(array.shape or ())
            if array.dtype.kind != "f" or left < 0:
                raise _NotKerasError(f"{name} of {array.dtype} and shape {array.shape}")
            yield array[()].astype("float32")


def _member(group, path: str):
    """Returns what lies at a path in this file; links into other files are not followed."""
    import h5py

    for part in path.split("/"):
        if not isinstance(group, h5py.Group) or part not in group:
            raise _NotKerasError(f"an HDF5 file without {path}")
        if not isinstance(group.get(part, getlink=True), h5py.HardLink):
            raise _NotKerasError(f"an HDF5 file in which {path} is a link")
        group = group[part]
    return group


def _text(name: object) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _limit() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no limits.
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _fail(code: int, received: str) -> int:
    # A name in the file may be long, or a sequence that does something to a terminal.
    sys.stderr.write(received[:300] if received.isprintable() else ascii(received[:300]))
    return code


if __name__ == "__main__":
    sys.exit(main())
