"""Where the images come from: checked uint8 arrays, whatever the source.

    digits = data.load("bundled")
    digits.x_train.shape, digits.y_train[:3]        # (60000, 28, 28), [5, 0, 4]

Sources: ``bundled``, a path (an ``.npz`` of Keras' layout or a folder of IDX files), ``keras`` and
``tfds:NAME``. Only the last two need TensorFlow; the others fail before it is loaded.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
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

from trainer.errors import ConfigurationError, DataError, InputError, UsageError

IMAGE_SHAPE = (28, 28)
NUM_CLASSES = 10
ALIGNMENT = 64  # bytes; EIGEN_MAX_ALIGN_BYTES of TensorFlow's builds

# Digits.sha256 of MNIST as its makers published it: 60,000 and 10,000 examples.
MNIST_SHA256 = "796354bf1a5bdb3f752e23f487245288f2c35b1e0bc343e07448cffbb5f56624"

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}

_BUNDLED_INSTEAD = "Use --data bundled, which needs no network."


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images and labels for training and for testing.

    Attributes:
        x_train: Training images, uint8 (n, 28, 28), 0 is background and 255 ink.
        y_train: Their digits, uint8 (n,), 0 to 9.
        x_test: Test images, as ``x_train``.
        y_test: Their digits, as ``y_train``.

    Raises:
        DataError: An array has another shape or dtype, a label is out of range, or there are not
            as many labels as images.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = f"x_{part}", f"y_{part}"
            _check_images(images, getattr(self, images))
            _check_labels(labels, getattr(self, labels))
            if len(getattr(self, images)) != len(getattr(self, labels)):
                raise DataError(
                    f"Expected one label for each image. Received: {len(getattr(self, images))} "
                    f"images in {images} and {len(getattr(self, labels))} labels in {labels}."
                )
            object.__setattr__(self, images, _aligned(getattr(self, images)))
            object.__setattr__(self, labels, _aligned(getattr(self, labels).astype(np.uint8)))

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of the four arrays: equal for equal data,
        whatever file it came from.
        """
        digest = hashlib.sha256()
        for name in ARRAYS:
            array = getattr(self, name)
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def first(self, train: int | None, test: int | None) -> "Digits":
        """Returns the first ``train`` training and ``test`` test examples; None means all.

        Raises:
            UsageError: There are fewer examples than that.
        """
        for name, limit, have in (
            ("train_limit", train, len(self.x_train)),
            ("test_limit", test, len(self.x_test)),
        ):
            if limit is not None and limit > have:
                raise UsageError(
                    f"{name} must be at most the {have} examples there are. "
                    f"Received: {name}={limit}. Leave it out to use them all."
                )
        return Digits(
            self.x_train[:train], self.y_train[:train], self.x_test[:test], self.y_test[:test]
        )


def load(source: str) -> Digits:
    """Loads a data set.

    Args:
        source: ``bundled``, a path, ``keras`` or ``tfds:NAME``.

    Raises:
        InputError: The source is missing, unreadable or cannot be reached.
        DataError: It is there and is not what it should be.
        ConfigurationError: ``tfds:`` without TensorFlow Datasets, or ``keras`` without TensorFlow.

    Without a network, TensorFlow Datasets tries for three to four minutes before it gives up.
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
            f"files. Received: --data {path}, where nothing is. Use --data bundled."
        ) from None
    except OSError as error:
        raise InputError(_unreadable(path, error)) from error
    try:
        # Never unpickled: a file of someone else's must not run code.
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
        f"or with .gz. Received: a folder without {name}. Name another folder with --data."
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
        # Keras announces its download on stdout, which is for this program's own lines.
        with contextlib.redirect_stdout(sys.stderr):
            (x_train, y_train), (x_test, y_test) = keras.datasets.mnist.load_data()
    except Exception as error:  # Keras raises a bare Exception when a download fails.
        raise InputError(
            "Expected MNIST from keras.datasets.mnist, in Keras' cache or over the network. "
            f"Received: {error}. {_BUNDLED_INSTEAD}"
        ) from error
    return Digits(x_train, y_train, x_test, y_test)


def _load_tfds(name: str) -> Digits:
    import trainer.runtime  # noqa: F401  (TensorFlow starts quietly, or says what is missing)

    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ConfigurationError(
            f"--data tfds:{name} needs TensorFlow Datasets. Received: {error}. "
            "Install it with: pip install 'digits-trainer[tfds]'"
        ) from error
    # Of what it says meanwhile (bars, retries), nothing is left in a log that helps.
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


def _aligned(array: np.ndarray) -> np.ndarray:
    """Returns the array, or a copy of it, that begins where TensorFlow wants its tensors to: it can
    then use the same memory.
    """
    if array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0:
        return array
    memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    aligned = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    aligned[...] = array
    return aligned


def _check_images(name: str, images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.shape[1:] != IMAGE_SHAPE or not len(images):
        raise DataError(
            f"Expected {name} as uint8 of shape (n, 28, 28) with n of at least 1. "
            f"Received: {images.dtype} of shape {images.shape}."
        )


def _check_labels(name: str, labels: np.ndarray) -> None:
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise DataError(
            f"Expected {name} as integers of shape (n,). "
            f"Received: {labels.dtype} of shape {labels.shape}."
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < NUM_CLASSES:
        raise DataError(
            f"Expected labels from 0 to {NUM_CLASSES - 1} in {name}. "
            f"Received: labels from {labels.min()} to {labels.max()}."
        )


def _unreadable(path: Path, error: OSError) -> str:
    return (
        f"Expected a readable file at {path}. Received: {error.strerror or error}. "
        "Check its permissions, or use --data bundled."
    )
