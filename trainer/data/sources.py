"""Loads a data set by the name of its source.

    digits = load("bundled")
    digits.x_train.shape, digits.y_train[:3]        # (60000, 28, 28), [5, 0, 4]

Sources: ``bundled``, a path (an ``.npz`` of Keras' layout or a folder of IDX files), ``keras`` and
``tfds:NAME``. Only the last two load TensorFlow.
"""

import contextlib
import gzip
import importlib.resources
import io
import logging
import math
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trainer.data.dataset import ARRAYS, Digits
from trainer.errors import ConfigurationError, DataError, InputError

# Digits.sha256 of MNIST as its makers published it: 60,000 and 10,000 examples.
MNIST_SHA256 = "796354bf1a5bdb3f752e23f487245288f2c35b1e0bc343e07448cffbb5f56624"

IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}

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
    if path.is_dir():
        return Digits(**_read_idx_folder(path))
    return Digits(**_read_npz(path))


def _load_bundled() -> Digits:
    with importlib.resources.as_file(
        importlib.resources.files("trainer.data") / "assets" / "mnist.npz"
    ) as path:
        digits = Digits(**_read_npz(path))
    if digits.sha256 != MNIST_SHA256:
        raise DataError(
            f"Expected the bundled MNIST with SHA-256 {MNIST_SHA256}. Received: {digits.sha256}. "
            "Install digits-trainer again."
        )
    return digits


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads the layout of ``keras.datasets.mnist``: arrays x_train, y_train, x_test, y_test."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"Expected a data source: bundled, keras, tfds:NAME, an .npz file or a folder of IDX "
            f"files. Received: data={str(path)!r}, which does not exist. Use data='bundled'."
        ) from None
    except OSError as error:
        raise InputError(_unreadable(path, error)) from error
    try:
        # Never unpickled: an untrusted file must not run code.
        archive = np.load(io.BytesIO(raw), allow_pickle=False)
        if not isinstance(archive, Mapping):
            raise DataError(f"Expected an .npz archive at {path}. Received: one bare array.")
        if missing := [name for name in ARRAYS if name not in archive]:
            raise DataError(
                f"Expected the arrays {', '.join(ARRAYS)} in {path}. "
                f"Received: {', '.join(archive) or 'none'}; missing: {', '.join(missing)}."
            )
        return {name: archive[name] for name in ARRAYS}
    except (
        ValueError,
        OSError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
    ) as e:
        raise DataError(
            f"Expected a whole .npz archive of plain arrays at {path}. Received: a file that "
            f"cannot be read as one ({e}). Fetch or make it again."
        ) from e


def _read_idx_folder(folder: Path) -> dict[str, np.ndarray]:
    return {name: read_idx(_find_idx(folder, file)) for name, file in IDX_FILES.items()}


def _find_idx(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.exists():
            return candidate
    raise InputError(
        f"Expected the four IDX files {', '.join(IDX_FILES.values())} in {folder}, each as it is "
        f"or with .gz. Received: a folder without {name}. Put it there, or use another folder."
    )


def read_idx(path: Path) -> np.ndarray:
    """Reads one file of MNIST's own format, described at the end of
    http://yann.lecun.com/exdb/mnist/: two zero bytes, the type (8: unsigned byte), the number of
    dimensions, each dimension as a big-endian 32-bit integer, then the values.

    Args:
        path: The file; gzipped where its first two bytes say so.

    Returns:
        uint8, of the shape that the header gives.

    Raises:
        InputError: The file is missing or cannot be read.
        DataError: It is truncated, too long, or not an IDX file of unsigned bytes.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(_unreadable(path, error)) from error
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"Expected a whole gzip file at {path}. Received: a damaged one ({error}). "
                "Fetch it again."
            ) from error
    ndim = raw[3] if len(raw) > 3 else 0
    start = 4 + 4 * ndim
    if raw[:3] != b"\x00\x00\x08" or not ndim or len(raw) < start:
        raise DataError(
            f"Expected an IDX file of unsigned bytes at {path}, which opens with the bytes "
            f"00 00 08. Received: {raw[:4].hex(' ') or 'an empty file'}. Fetch it again."
        )
    shape = tuple(np.frombuffer(raw, ">u4", count=ndim, offset=4).tolist())
    if len(raw) - start != math.prod(shape):
        raise DataError(
            f"Expected {math.prod(shape)} bytes of shape {shape} after the header of {path}. "
            f"Received: {len(raw) - start}. Fetch it again."
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _load_keras() -> Digits:
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


def _load_tfds(name: str) -> Digits:
    import trainer.runtime  # noqa: F401  (imports TensorFlow quietly, or raises what is missing)

    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ConfigurationError(
            f"Expected TensorFlow Datasets for data='tfds:{name}'. Received: {error}. "
            "Install it: pip install 'digits-trainer[tfds]'"
        ) from error
    # Its progress bars and retry messages are noise in a log.
    tfds.disable_progress_bar()
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train, test = tfds.load(name, split=["train", "test"], batch_size=-1)
    except Exception as error:  # tfds, requests and TensorFlow's file system each raise their own.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"Expected the TensorFlow data set {name!r} with the splits train and test, prepared "
            f"in its data_dir or over the network. Received: {reason[:300]}. {_BUNDLED_INSTEAD}"
        ) from error
    arrays = {}
    for part, examples in (("train", tfds.as_numpy(train)), ("test", tfds.as_numpy(test))):
        if not {"image", "label"} <= set(examples):
            raise DataError(
                f"Expected the features image and label in tfds:{name}. "
                f"Received: {', '.join(examples)}."
            )
        images = examples["image"]
        # TensorFlow Datasets keeps the one channel of a grey image as a last axis.
        arrays[f"x_{part}"] = images[..., 0] if images.shape[-1:] == (1,) else images
        arrays[f"y_{part}"] = examples["label"]
    return Digits(**arrays)


def _unreadable(path: Path, error: OSError) -> str:
    return (
        f"Expected a readable file at {path}. Received: {error.strerror or error}. "
        "Check its permissions, or use data='bundled'."
    )
