"""Loads a data set by the name of its source.

    digits = load("bundled")
    digits.x_train.shape, digits.y_train[:3]        # (60000, 28, 28), [5, 0, 4]
    splits = load("flowers")                        # a folder of pictures
    splits.train.classes, splits.train.spec

Sources: ``bundled``; a path: an ``.npz`` of Keras' layout, a ``.csv``, a folder of IDX files, of
``.npy`` files, or of pictures in a folder for each class; ``keras``; and ``tfds:NAME``. Only images
that are no ``Digits`` and the last two load TensorFlow, and none makes a tensor of it.
"""

import contextlib
import importlib.resources
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainer import inputs
from trainer.data import archives, idx, layouts, mapped, tables, tfds_source
from trainer.data.digits import ARRAYS, IMAGE_SHAPE, Digits
from trainer.errors import DataError, InputError, UsageError

if TYPE_CHECKING:
    from trainer.data.dataset import Splits

# Digits.sha256 of MNIST as its makers published it: 60,000 and 10,000 examples.
MNIST_SHA256 = "796354bf1a5bdb3f752e23f487245288f2c35b1e0bc343e07448cffbb5f56624"

# Folders of the parts of a data set.
_PARTS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
_CSV = "train.csv"  # In a folder, as Kaggle has it: the pictures of test.csv have no labels.
_BUNDLED_INSTEAD = "Use data='bundled', which needs no network."


def load(
    source: str, *, image_size: tuple[int, int] | None = None, skip_bad: bool = False
) -> "Digits | Splits":
    """Loads a data set, or opens one that is read while a model is trained on it.

    Args:
        source: ``bundled``, a path, ``keras`` or ``tfds:NAME``. Without a network, TensorFlow
            Datasets retries for three to four minutes before it gives up.
        image_size: Height and width to which the pictures of a folder are resized (``folders``).
        skip_bad: Whether to leave out pictures of a folder that cannot be read.

    Returns:
        ``Digits`` where all images are grey, of 28×28 pixels, and all labels from 0 to 9, whatever
        they show; else ``Splits``.

    Raises:
        InputError: The source is missing, unreadable or cannot be reached.
        DataError: Its content is not a valid data set.
        ConfigurationError: ``tfds:`` without TensorFlow Datasets, or ``keras`` without TensorFlow.
        UsageError: ``image_size`` or ``skip_bad`` for what is no folder of pictures.
    """
    found: Digits | Splits
    resized = pictures = False
    try:
        if source == "bundled":
            found = _load_bundled()
        elif source == "keras":
            found = _load_keras()
        elif source.startswith("tfds:"):
            name = source.removeprefix("tfds:")
            opened = tfds_source.load(name, image_size=image_size, remedy=_BUNDLED_INSTEAD)
            if isinstance(opened, dict):
                with archives.naming(source):
                    found = from_arrays(opened)
            else:
                found, resized = opened, True
        else:
            path = Path(source)
            if pictures := _is_folder(path) and not _holds_arrays(path):
                resized = True
                found = _open_pictures(path, image_size, skip_bad)
            else:
                found = _load_path(path)
    except MemoryError as error:
        raise DataError(
            f"Expected data at {source} that this process has memory for. Received: more. "
            "Use fewer examples, or allow it more memory."
        ) from error
    for name, unused in (
        ("image_size", image_size and not resized),
        ("skip_bad", skip_bad and not pictures),
    ):
        if unused:
            raise UsageError(
                f"{name} is for a folder of pictures. Received: data={source!r}. Leave it out."
            )
    return found


def _is_folder(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):  # Opening it will raise the same.
        return stat.S_ISDIR(path.stat().st_mode)
    return False


def _holds_arrays(folder: Path) -> bool:
    """Tells whether a folder has files of arrays, or none of which pictures could be read."""
    if idx.find(folder) or mapped.find(folder) or (folder / _CSV).exists():
        return True
    return not any(entry.is_dir() for entry in folder.iterdir())


def _load_path(path: Path) -> "Digits | Splits":
    if not _is_folder(path):
        if path.suffix.lower() == ".csv":
            arrays = tables.read_csv(path)
        elif idx.prefix_exists(path):
            arrays = idx.read_folder(path)
        else:
            arrays = archives.read_npz(path)
    elif idx.find(path):
        arrays = idx.read_folder(path)
    elif mapped.find(path):
        arrays = mapped.read_folder(path)
    elif (path / _CSV).exists():
        arrays = tables.read_csv(path / _CSV)
    else:
        raise InputError(
            f"Expected a folder of pictures, one for each class, of IDX files, of .npy files or "
            f"with a {_CSV} at {path}. Received: a folder without. Name another, or use "
            "data='bundled'."
        )
    with archives.naming(path):
        return from_arrays(arrays)


def from_arrays(arrays: Mapping[str, np.ndarray]) -> "Digits | Splits":
    """Returns a data set of images and labels, as ``load`` does.

    Args:
        arrays: By the names that ``layouts`` knows.

    Raises:
        DataError: They are no images and labels; or a class has no example.
    """
    names = layouts.canonical(arrays)
    images = layouts.standardize({name: arrays[key] for name, key in names.items()})
    if images.are_digits:
        empty = {"x": np.empty((0, *IMAGE_SHAPE), np.uint8), "y": np.empty(0, np.uint8)}
        parts = {name: images.arrays.get(name, empty[name[0]]) for name in ARRAYS}
        return Digits(
            **{
                name: part.reshape(-1, *IMAGE_SHAPE) if name[0] == "x" else part
                for name, part in parts.items()
            }
        )

    from trainer.data.arrays import ArrayDataset
    from trainer.data.dataset import Splits

    classes = [str(number) for number in images.classes]
    opened = {
        x.removeprefix("x_"): ArrayDataset((images.arrays[x], images.arrays[y]), x, classes)
        for x, y in layouts.PAIRS
        if x in images.arrays
    }
    return Splits(opened.get("train"), opened.get("test"), opened.get("val"))


def _open_pictures(path: Path, image_size: tuple[int, int] | None, skip_bad: bool) -> "Splits":
    """Opens a folder with a folder for each class; or with those of training and testing."""
    from trainer.data.dataset import Splits
    from trainer.data.folders import ImageFolder

    parts = {
        part: path / name
        for part, names in _PARTS.items()
        for name in names
        if (path / name).is_dir()
    }
    if "train" not in parts and "test" not in parts:
        parts = {"train": path}
    opened: dict[str, ImageFolder] = {}
    for part, folder in parts.items():
        first = next(iter(opened.values()), None)
        opened[part] = ImageFolder(
            folder,
            image_size=image_size,
            skip_bad=skip_bad,
            like=first,
        )
    return Splits(opened.get("train"), opened.get("test"), opened.get("validation"))


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
        tfds_source.import_tfds(source.removeprefix("tfds:"))


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
