"""Reads images and labels from .npy files in a folder, the images mapped into memory.

    arrays = read_folder(Path("images"))        # x_train.npy, y_train.npy, x_test.npy, y_test.npy

Files are named as the arrays of an archive are (``layouts``).
"""

import os
from pathlib import Path
from typing import Literal

import numpy as np

from trainer import inputs
from trainer.data import archives, layouts
from trainer.data.archives import check_memory, naming, unreadable
from trainer.errors import DataError, InputError


def find(folder: Path) -> dict[str, Path]:
    """Returns the files of a folder by the names of their arrays in ``layouts.PAIRS``."""
    names = layouts.canonical(path.stem for path in folder.iterdir() if path.suffix == ".npy")
    return {name: folder / f"{file}.npy" for name, file in names.items()}


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Reads the labels of a folder, and maps its images: uint8 as they are.

    Returns:
        As ``layouts.standardize`` takes it.

    Raises:
        InputError: A file cannot be read.
        DataError: One is no whole array; they do not belong together; or images that are to be
            converted are too large for this machine.
    """
    arrays = {name: _map(path) for name, path in find(folder).items()}
    with naming(folder):
        layouts.check_specs(arrays)
    in_memory = [
        array for name, array in arrays.items() if name[0] == "y" or array.dtype != np.uint8
    ]
    check_memory(folder, sum(array.nbytes for array in in_memory))
    return {name: np.array(array) if name[0] == "y" else array for name, array in arrays.items()}


def _map(path: Path) -> np.ndarray:
    try:
        with inputs.open_file(path) as opened:
            head = opened.peek(64)[:64]
            if not head.startswith(b"\x93NUMPY"):
                received = "an array that ends early" if not head else archives.kind(head)[0]
                raise DataError(_expected(path, received))
            header = archives.read_header(path, path.stem, opened)
            start, size = opened.tell(), os.fstat(opened.fileno()).st_size
    except OSError as error:
        raise InputError(unreadable(path, error)) from error
    except DataError:
        raise
    except Exception as error:  # NumPy raises whatever the damage leads to.
        raise DataError(_expected(path, "a damaged header")) from error
    if size - start != header.nbytes or not header.nbytes:
        raise DataError(
            _expected(path, f"{size - start:,} bytes for {header.dtype} of shape {header.shape}")
        )
    order: Literal["C", "F"] = "F" if header.fortran_order else "C"
    return np.memmap(path, header.dtype, "r", start, header.shape, order)


def _expected(path: Path, received: str) -> str:
    return (
        f"Expected a whole array of numbers at {path}. Received: {received}. Save it again, with "
        "numpy.save."
    )
