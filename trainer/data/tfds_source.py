"""Data sets of TensorFlow Datasets: images with the features ``image`` and ``label``.

    found = load("cifar10")         # Digits, or Splits that are read by number

They are prepared as array_record files, whose examples have numbers; what has been prepared as
tfrecord files already is read into memory, if there is enough of it.
"""

import contextlib
import io
import logging
import math
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.data import archives
from trainer.data.digits import IMAGE_SHAPE
from trainer.errors import ConfigurationError, DataError, InputError

if TYPE_CHECKING:
    from trainer.data.dataset import Splits

PARTS = {"train": "train", "validation": "validation", "test": "test"}


def import_tfds(name: str) -> ModuleType:
    """Imports TensorFlow Datasets.

    Raises:
        ConfigurationError: It is not installed, or TensorFlow is not.
    """
    import trainer.runtime  # noqa: F401  (imports TensorFlow quietly, or raises what is missing)

    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ConfigurationError(
            f"Expected TensorFlow Datasets for data='tfds:{name}'. Received: {error}. "
            "Install it: pip install 'digits-trainer[tfds]'"
        ) from error
    # Its progress bars and retry messages are noise in a log.
    tensorflow_datasets.disable_progress_bar()
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)
    return tensorflow_datasets


def load(
    name: str, *, image_size: tuple[int, int] | None, remedy: str
) -> "dict[str, np.ndarray] | Splits":
    """Prepares and opens a data set.

    Args:
        name: As ``tfds.builder`` takes it.
        image_size: Height and width to which images are resized, if they have several sizes.
        remedy: What to do without a network.

    Returns:
        The arrays of a data set that is read into memory, as ``layouts.standardize`` takes them;
        else what is read by number.

    Raises:
        InputError: It is not there and cannot be reached.
        DataError: It has other features; or images of several sizes, and no ``image_size``.
        ConfigurationError: TensorFlow Datasets is not installed.
    """
    tfds = import_tfds(name)
    with _tfds_errors(name, remedy):
        builder = _builder(tfds, name)
        shape = _check_features(name, builder.info.features, image_size, remedy)
        builder.download_and_prepare()
        parts = [part for part in PARTS if part in builder.info.splits]
        if not {"train", "test"} & set(parts):
            raise DataError(
                f"Expected the splits train or test in tfds:{name}. Received: "
                f"{', '.join(builder.info.splits)}. {remedy}"
            )
        in_records = builder.info.file_format.value == "array_record"
        if in_records and shape != (*IMAGE_SHAPE, 1):
            return _by_number(builder, parts, image_size)
        if None in shape:
            raise DataError(
                f"Expected tfds:{name} prepared as array_record files, since its images have "
                f"several sizes. Received: {builder.info.file_format.value} in {builder.data_dir}. "
                "Prepare it anew: tfds build --file_format=array_record."
            )
        count = sum(builder.info.splits[part].num_examples for part in parts)
        size = math.prod(length or 0 for length in shape) + 8  # Labels are int64.
        archives.check_memory(f"tfds:{name}", count * size)
        return _in_memory(tfds, builder, parts)


@contextlib.contextmanager
def _tfds_errors(name: str, remedy: str) -> Iterator[None]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except (DataError, ConfigurationError):
        raise
    except Exception as error:  # tfds, requests and TensorFlow's file system each raise their own.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"Expected the TensorFlow data set {name!r} with the splits train and test, prepared "
            f"in its data_dir or over the network. Received: {reason[:300]}. {remedy}"
        ) from error


def _builder(tfds: ModuleType, name: str) -> Any:
    try:
        return tfds.builder(name, file_format="array_record")
    except ValueError as error:  # It has been prepared in another format.
        if "File format is already set" not in str(error):
            raise
        return tfds.builder(name)


def _check_features(
    name: str, features: Mapping, image_size: tuple[int, int] | None, remedy: str
) -> tuple[int | None, ...]:
    """Refuses other kinds of data before they are downloaded; returns the shape of an image."""
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
        raise DataError(
            f"Expected the features image and label in tfds:{name}. "
            f"Received: {', '.join(features)}. {remedy}"
        )
    image = features["image"]
    shape = tuple(image.shape)
    if image.np_dtype != np.uint8 or len(shape) != 3 or shape[2] not in (1, 3):
        raise DataError(
            f"Expected images of one or three channels, uint8, in tfds:{name}. "
            f"Received: {np.dtype(image.np_dtype)} of shape {shape}. {remedy}"
        )
    if None in shape and not image_size:
        raise DataError(
            f"Expected images of one size in tfds:{name}. Received: shape {shape}. Use image_size "
            "to resize them."
        )
    return shape


def _in_memory(tfds: ModuleType, builder: Any, parts: list[str]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for part in parts:
        examples = next(iter(tfds.as_numpy(builder.as_dataset(split=part).batch(2**62))))
        short = {"validation": "val"}.get(part, part)
        arrays |= {f"x_{short}": examples["image"], f"y_{short}": examples["label"]}
    return arrays


def _by_number(builder: Any, parts: list[str], image_size: tuple[int, int] | None) -> "Splits":
    from trainer.data.dataset import Splits
    from trainer.data.records import Records

    opened = {part: Records(builder, part, image_size) for part in parts}
    return Splits(opened.get("train"), opened.get("test"), opened.get("validation"))
