"""A data set of pictures: a folder with one folder for each class.

    dataset = ImageFolder("pictures/train")
    dataset = ImageFolder("photos", image_size=(180, 180), channels=3, skip_bad=True)
    dataset.classes                     # the folders' names, sorted: their numbers are the labels

Files are JPEG or PNG, decoded by TensorFlow as they are needed.
"""

import functools
import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.data.dataset import Dataset
from trainer.errors import ConfigurationError, DataError, InputError, UsageError
from trainer.machine import available_cpus
from trainer.runtime import tf

SUFFIXES = (".jpeg", ".jpg", ".png")
_NAMED = 5  # Files that a message lists.
_SCOPE = "ImageFolder"  # Of the operations that read, in TensorFlow's errors.
_READ_AHEAD = 8  # Pictures a CPU: with 1, a quarter fewer are read a second (bench/fit.py).


class _File(NamedTuple):
    path: Path
    label: int
    bytes: int


class ImageFolder(Dataset):
    """Pictures and the numbers of their classes.

    Args:
        folder: Has a folder for each class; those inside them count as the same class. Files and
            folders whose names begin with a dot are left out, and files of other suffixes than
            .jpg, .jpeg and .png.
        image_size: Height and width to which pictures are resized, bilinearly with antialiasing, as
            ``keras.layers.Resizing`` does; None: all must have the size of the first.
        channels: 1, grey; 3, colour; None: colour if any picture has it.
        skip_bad: Whether to leave out pictures that cannot be read, are empty, or of another size,
            in place of an error.
        like: Another part of the same data set, such as its training pictures: this one's have its
            size, channels and classes, not all of which need pictures here.

    Attributes:
        skipped: What was left out, and why, by path.

    Raises:
        InputError: The folder is missing or cannot be read.
        DataError: It has no pictures, or bad ones, which the message lists; or a class without any.
        ConfigurationError: Pillow is not installed.
    """

    sorted_by_class = True

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        image_size: tuple[int, int] | None = None,
        channels: int | None = None,
        skip_bad: bool = False,
        like: "ImageFolder | None" = None,
    ) -> None:
        if channels not in (None, 1, 3):
            raise UsageError(f"channels must be 1 or 3. Received: {channels!r}.")
        self.folder = Path(folder)
        classes, files = _find(self.folder)
        headers = _headers([file.path for file in files])
        self.channels: int = like.channels if like else channels or _channels(headers)
        size: tuple[int, int]
        size, self.skipped = _sizes(files, headers, image_size, like.size if like else None)
        if self.skipped and not skip_bad:
            raise DataError(_bad(self.folder, self.skipped, size))
        self.files = [file for file in files if file.path not in self.skipped]
        if like:
            self._take_classes(classes, like)
            classes = list(like.classes)
        if not self.files:
            raise DataError(f"Expected pictures in {self.folder}. Received: bad ones alone.")
        present = {file.label for file in self.files}
        if not like and (len(present) < len(classes) or len(classes) < 2):
            absent = [name for number, name in enumerate(classes) if number not in present]
            raise DataError(
                f"Expected pictures of at least two classes in {self.folder}, a folder for each. "
                "Received: "
                + (f"none in {', '.join(absent[:_NAMED])}" if absent else f"only {classes[0]}")
                + ". Remove empty folders; or give the folder above."
            )
        self.classes: list[str] = classes
        self.size: tuple[int, int] = size
        self.resized = image_size is not None

    def _take_classes(self, classes: list[str], like: "ImageFolder") -> None:
        """Numbers the classes as those of another part."""
        if others := sorted(set(classes) - set(like.classes)):
            raise DataError(
                f"Expected the classes of {like.folder} in {self.folder}. Received: "
                f"{', '.join(others[:_NAMED])}, too. Give both the same folders."
            )
        numbers = [like.classes.index(name) for name in classes]
        self.files = [file._replace(label=numbers[file.label]) for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    # Both made at first use: several workers are connected before TensorFlow makes any tensor.

    @functools.cached_property
    def paths(self) -> tf.Tensor:
        """The files' paths, string (n,)."""
        with tf.device("CPU:0"):
            return tf.constant([os.fsencode(file.path) for file in self.files])

    @functools.cached_property
    def labels(self) -> tf.Tensor:
        """The numbers of their classes, int32 (n,)."""
        with tf.device("CPU:0"):
            return tf.constant([file.label for file in self.files], tf.int32)

    @property
    def spec(self) -> tuple:
        """Pictures of (height, width, channels), uint8, or float32 from 0 to 255 where they are
        resized; and class numbers, int32.
        """
        dtype = tf.float32 if self.resized else tf.uint8
        return tf.TensorSpec((*self.size, self.channels), dtype), tf.TensorSpec((), tf.int32)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the pictures' paths in the folder and their sizes in bytes, and of how they
        are read; their content would take as long to read as an epoch does.
        """
        digest = hashlib.sha256(f"{self.spec} {list(self.classes)}".encode())
        for file in self.files:
            name = os.fsencode(file.path.relative_to(self.folder).as_posix())
            digest.update(name + f"\0{file.bytes}\0".encode())
        return digest.hexdigest()

    def batches(self, numbers: np.ndarray, batch_size: int) -> tf.data.Dataset:
        """Returns pictures and labels in batches, decoded in parallel."""
        paths, labels = self.paths, self.labels  # Outside of the graph.

        def read(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            with tf.name_scope(_SCOPE):
                picture = tf.io.decode_image(
                    tf.io.read_file(paths[number]), self.channels, expand_animations=False
                )
                if self.resized:
                    picture = tf.image.resize(picture, self.size, antialias=True)
                return tf.ensure_shape(picture, self.spec[0].shape), labels[number]

        pictures = tf.data.Dataset.from_tensor_slices(numbers)
        ahead = _READ_AHEAD * available_cpus()
        pictures = pictures.map(read, num_parallel_calls=ahead, deterministic=True)
        return pictures.batch(batch_size)

    def explain(self, error: Exception) -> Exception:
        """Names the first picture that cannot be decoded."""
        if not isinstance(error, tf.errors.OpError) or f"{_SCOPE}/" not in str(error):
            return error  # It is not about a picture, and reading them all would take its time.
        for file in self.files:
            try:
                if file.path.stat().st_size == file.bytes:
                    tf.io.decode_image(file.path.read_bytes(), expand_animations=False)
                    continue
                reason = "another size than at the start"
            except (OSError, tf.errors.OpError) as found:
                reason = " ".join(str(found).split())[:200]
            return DataError(
                f"Expected a picture at {file.path}. Received: {reason}. Remove or replace it."
            )
        return error


def _find(folder: Path) -> tuple[list[str], list[_File]]:
    """Returns the names of the classes, and all files of pictures, both sorted."""
    try:
        names = sorted(
            entry.name
            for entry in os.scandir(folder)
            if entry.is_dir() and not entry.name.startswith(".")
        )
        files = [
            _File(path, label, path.stat().st_size)
            for label, name in enumerate(names)
            for path in _walk(folder / name)
        ]
    except OSError as error:
        raise InputError(
            f"Expected a folder with a folder of pictures for each class at {folder}. Received: "
            f"{error.strerror}{f' ({error.filename})' if error.filename != str(folder) else ''}."
        ) from error
    if not files:
        raise DataError(
            f"Expected a folder of pictures ({', '.join(SUFFIXES)}) for each class in {folder}. "
            f"Received: {len(names)} folders with none."
        )
    return names, files


def _walk(folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise error

    return sorted(
        Path(top, name)
        for top, folders, names in os.walk(folder, onerror=fail, followlinks=True)
        for name in names
        if name.lower().endswith(SUFFIXES)
        and not name.startswith(".")
        and not any(part.startswith(".") for part in Path(top).relative_to(folder).parts)
    )


class _Header(NamedTuple):
    size: tuple[int, int]  # height, width
    grey: bool
    error: str


def _headers(paths: list[Path]) -> list[_Header]:
    """Reads the beginning of each file."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ConfigurationError(
            f"Expected Pillow for a folder of pictures. Received: {error}. "
            "Install it: pip install pillow"
        ) from error

    def header(path: Path) -> _Header:
        try:
            with Image.open(path) as image:  # Decodes nothing.
                width, height = image.size
                return _Header((height, width), image.mode in ("1", "L", "LA", "I;16"), "")
        except UnidentifiedImageError:
            empty = path.stat().st_size == 0
            return _Header((0, 0), True, "empty" if empty else "no picture")
        except Exception as error:  # Pillow's decoders raise many kinds.
            return _Header((0, 0), True, str(error) or type(error).__name__)

    # Without threads, which take three times as long: Python's lock is what they wait for.
    return [header(path) for path in paths]


def _channels(headers: list[_Header]) -> int:
    return 1 if all(header.grey for header in headers if not header.error) else 3


def _sizes(
    files: list[_File],
    headers: list[_Header],
    image_size: tuple[int, int] | None,
    expected: tuple[int, int] | None,
) -> tuple[tuple[int, int], dict[Path, str]]:
    """Returns the size of all pictures, and why others are bad, by path."""
    bad = {
        file.path: header.error for file, header in zip(files, headers, strict=True) if header.error
    }
    if image_size:
        return (int(image_size[0]), int(image_size[1])), bad
    sizes = Counter(header.size for header in headers if not header.error)
    if not sizes:
        return (0, 0), bad
    (usual, _), *_ = sizes.most_common(1)
    usual = expected or usual
    bad |= {
        file.path: f"{header.size[0]}×{header.size[1]} pixels"
        for file, header in zip(files, headers, strict=True)
        if not header.error and header.size != usual
    }
    return usual, bad


def _bad(folder: Path, bad: dict[Path, str], size: tuple[int, int]) -> str:
    listed = [f"{path} ({why})" for path, why in list(bad.items())[:_NAMED]]
    if len(bad) > _NAMED:
        listed.append(f"and {len(bad) - _NAMED} others")
    sizes = any("pixels" in why for why in bad.values())
    return (
        f"Expected pictures{f' of {size[0]}×{size[1]} pixels' if sizes else ''} in {folder}. "
        f"Received: {', '.join(listed)}. Remove them, or use skip_bad=True"
        f"{', or image_size=(height, width) to resize all' if sizes else ''}."
    )
