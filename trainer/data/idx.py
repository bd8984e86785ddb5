"""Reads images and labels in MNIST's own format, IDX: also Fashion-MNIST's, KMNIST's and EMNIST's.

    read_folder(Path("mnist"))["x_train"].shape
    read_folder(Path("gzip/emnist-letters"))    # the files whose names begin so, in a folder

A file may be anyone's: memory is taken for sizes that it really has.
"""

import contextlib
import gzip
import math
import os
import re
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np

from trainer import inputs
from trainer.data.archives import check_memory, check_ratio, fill, unreadable
from trainer.errors import DataError, InputError
from trainer.machine import aligned_empty

FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}

# With a dot for the last hyphen but one, as some programs unpack them; with a prefix in EMNIST.
_NAME = re.compile(
    r"(?P<prefix>|.*-)(?P<part>train|t10k|test)-(?P<kind>images|labels)[.-]idx[13]-ubyte(\.gz)?"
)
_NAMES = {"images": "x", "labels": "y", "train": "train", "t10k": "test", "test": "test"}


def find(folder: Path) -> dict[str, dict[str, Path]]:
    """Returns the IDX files in a folder by the beginning of their names, then by array; a file as
    it is before a gzipped one.

    Raises:
        InputError: The folder cannot be read.
    """
    found: dict[str, dict[str, Path]] = {}
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise InputError(unreadable(folder, error)) from error
    for name in names:
        if match := _NAME.fullmatch(name):
            array = f"{_NAMES[match['kind']]}_{_NAMES[match['part']]}"
            found.setdefault(match["prefix"], {}).setdefault(array, folder / name)
    return found


def prefix_exists(path: Path) -> bool:
    """Tells whether a path where nothing is is the beginning of IDX files' names."""
    with contextlib.suppress(OSError, ValueError, InputError):
        return not os.path.lexists(path) and f"{path.name}-" in find(path.parent)
    return False


def read_folder(path: Path) -> dict[str, np.ndarray]:
    """Reads MNIST's files in a folder, each as it is or gzipped.

    Args:
        path: The folder; where it has several data sets, the folder and the beginning of the names
            of one's files.

    Returns:
        The arrays by name: ``FILES``; those of training or of testing alone where the others are
        not there.

    Raises:
        InputError: A file is missing or cannot be read.
        DataError: One is no IDX file of unsigned bytes, or they are too large for this machine.
    """
    folder, prefix = (path, None) if path.is_dir() else (path.parent, f"{path.name}-")
    sets = find(folder)
    if prefix is None and len(sets) > 1:
        names = [name.rstrip("-") or "those without" for name in sets]
        raise InputError(
            f"Expected the files of one data set in {folder}. Received: those of {len(sets)}: "
            f"{', '.join(names)}. Name one: data={str(folder / names[-1])!r}."
        )
    found = sets.get(prefix if prefix is not None else next(iter(sets), ""), {})
    if not found:
        raise _missing(folder, FILES["x_train"])
    arrays: dict[str, np.ndarray] = {}
    for name in FILES:
        if name in found:
            before = sum(array.nbytes for array in arrays.values())
            arrays[name] = read_idx(found[name], before=before)
    for part in ("train", "test"):
        if len(missing := {f"x_{part}", f"y_{part}"} - arrays.keys()) == 1:
            raise _missing(folder, FILES[missing.pop()])
    return arrays


def _missing(folder: Path, name: str) -> InputError:
    return InputError(
        f"Expected the IDX files {', '.join(FILES.values())} in {folder}, each as it is or with "
        f".gz. Received: a folder without {name}. Put it there, or use another folder."
    )


def read_idx(path: Path, *, before: int = 0) -> np.ndarray:
    """Reads one file of MNIST's own format, described at the end of
    http://yann.lecun.com/exdb/mnist/: two zero bytes, the type (8: unsigned byte), the number of
    dimensions, each dimension as a big-endian 32-bit integer, then the values.

    Args:
        path: The file; gzipped where its first two bytes say so.
        before: Bytes of memory that were taken for other files of the data set.

    Returns:
        uint8, of the shape that the header gives: of one to three dimensions.

    Raises:
        InputError: The file is missing or cannot be read.
        DataError: It is truncated, too long, too large for this machine, or not an IDX file of
            unsigned bytes.
    """
    try:
        with inputs.open_file(path) as opened:
            size = os.fstat(opened.fileno()).st_size
            packed = opened.read(2) == b"\x1f\x8b"
            opened.seek(0)
            stream = cast("IO[bytes]", gzip.GzipFile(fileobj=opened)) if packed else opened
            return _read_idx(path, stream, size, packed, before)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"Expected a whole gzip file at {path}. Received: a damaged one ({error}). "
            "Fetch it again."
        ) from error
    except OSError as error:
        raise InputError(unreadable(path, error)) from error


def _read_idx(path: Path, stream: IO[bytes], size: int, packed: bool, before: int) -> np.ndarray:
    """Reads an IDX file of ``size`` bytes, unpacked by ``stream`` where it is ``packed``."""
    head = stream.read(4)
    ndim = head[3] if len(head) == 4 and head[:3] == b"\x00\x00\x08" else 0
    lengths = stream.read(4 * ndim)
    if not 1 <= ndim <= 3 or len(lengths) < 4 * ndim:
        raise DataError(
            f"Expected an IDX file of unsigned bytes at {path}, which opens with the bytes "
            f"00 00 08 and one to three dimensions. Received: {head.hex(' ') or 'an empty file'}. "
            "Fetch it again."
        )
    shape = tuple(np.frombuffer(lengths, ">u4").tolist())
    expected = math.prod(shape)
    there = expected if packed else size - stream.tell()
    if there == expected:
        check_memory(path, expected, before)
        check_ratio(path, size, expected)
        array = aligned_empty(shape, np.uint8)
        there = fill(array, stream) + len(stream.read(1))
    if there != expected:
        raise DataError(
            f"Expected {expected} bytes of shape {shape} after the header of {path}. "
            f"Received: {'more' if packed and there > expected else there}. Fetch it again."
        )
    return array
