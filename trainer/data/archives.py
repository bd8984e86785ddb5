"""Reads data sets from archives of NumPy's format, by their headers first.

    read_npz(Path("digits.npz"))["x_train"].shape

A file may be anyone's: memory is taken for sizes that it really has, and nothing is unpickled.
"""

import codecs
import contextlib
import dataclasses
import errno
import io
import math
import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from trainer import inputs
from trainer.data import layouts
from trainer.errors import DataError, InputError
from trainer.machine import aligned_empty, total_memory

CHUNK = 2**20  # Bytes read at a time.
MAX_HEADER = 1000  # Bytes of an array's header; NumPy writes 128.
MEMORY_SHARE = 0.5  # Of the machine's memory: the rest is for training.
# MNIST unpacks to five times its size. Small arrays are let through: those of a test may be blank.
MAX_RATIO = 200
SMALL = 16_000_000  # Bytes.


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads images and labels, by the names that ``layouts`` knows.

    The headers come first: memory is taken for sizes that the file really has, and nothing is ever
    unpickled, which could run code.

    Raises:
        InputError: The file cannot be read.
        DataError: It is no whole archive of those arrays, or they are too large for this machine.
    """
    try:
        opened = _BoundedReads(inputs.open_file(path).detach())
    except FileNotFoundError:
        raise InputError(
            f"Expected a data source: bundled, keras, tfds:NAME, an .npz file or a folder of IDX "
            f"files. Received: data={str(path)!r}, which does not exist. Use data='bundled'."
        ) from None
    except OSError as error:
        raise InputError(unreadable(path, error)) from error
    with opened:
        head = opened.read(64)
        if not head.startswith(b"PK"):
            received, remedy = kind(head)
            raise DataError(
                f"Expected an .npz archive of plain arrays at {path}. Received: {received}. "
                f"{remedy}"
            )
        try:
            return _read_members(path, opened)
        except (DataError, MemoryError):
            raise
        except OSError as error:
            if error.errno and error.errno != errno.EINVAL:  # EINVAL: a place before the beginning.
                raise InputError(unreadable(path, error)) from error
            raise _damaged(path, error) from error
        except Exception as error:  # zipfile, zlib and NumPy raise whatever the damage leads to.
            raise _damaged(path, error) from error


def kind(head: bytes) -> tuple[str, str]:
    """Returns what a file is that begins so, and what to do about it."""
    save = (
        "Save the four arrays with numpy.savez('digits.npz', x_train=..., y_train=..., "
        "x_test=..., y_test=...)."
    )
    for signature, received in (
        (b"\x93NUMPY", "one bare array"),
        (b"\x1f\x8b", "a gzip file"),
        (b"\x89HDF", "an HDF5 file"),
        (b"PAR1", "a Parquet file"),
        (b"\x80", "a pickle, which is never read: reading one can run code"),
    ):
        if head.startswith(signature):
            return received, save
    if head.startswith(b"\x00\x00\x08"):
        return "one IDX file", "Name the folder that has the four."
    if not head:
        return "an empty file", "Fetch or make it again."
    text = head.removeprefix(codecs.BOM_UTF8).decode("ascii", errors="replace")
    if all(letter.isprintable() or letter.isspace() for letter in text):
        return f"text ({' '.join(text.split())[:40]!r}), such as CSV", save
    return f"a file of another kind, which begins with the bytes {head[:8].hex(' ')}", save


class _BoundedReads(io.BufferedReader):
    """Refuses to read much at once, as zipfile does where an archive says its directory is long."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > CHUNK:
            raise zipfile.BadZipFile(f"a directory of {size:,} bytes")
        return super().read(CHUNK if size is None or size < 0 else size)


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of an array in numpy.lib.format."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """The size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def _read_members(path: Path, opened: io.BufferedReader) -> dict[str, np.ndarray]:
    with (
        zipfile.ZipFile(opened) as archive,
        contextlib.ExitStack() as stack,
    ):
        _check_directory(opened, archive)
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        found = layouts.canonical(members)
        if not found:
            present = ", ".join(map(repr, members))[:200] or "none"
            raise DataError(
                f"Expected the arrays x_train, y_train, x_test and y_test, or x and y, in {path}. "
                f"Received: {present}."
            )
        streams: dict[str, IO[bytes]] = {}
        headers: dict[str, Header] = {}
        for name, key in found.items():
            # With others, a piece of any size comes out of a small one.
            if members[key].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(
                    f"Expected {name} in {path} stored or deflated. Received: another "
                    "compression. Save it with numpy.savez_compressed."
                )
            streams[name] = stack.enter_context(archive.open(members[key]))
            headers[name] = read_header(path, name, streams[name])
        with naming(path):
            layouts.check_specs(headers)
        on_disk = os.fstat(opened.fileno()).st_size
        for name, header in headers.items():
            member = members[found[name]]
            size = member.file_size - streams[name].tell()
            if size != header.nbytes:
                raise DataError(
                    f"Expected {header.nbytes:,} bytes in {name} of {path}, whose header says "
                    f"{header.dtype} of shape {header.shape}. Received: {size:,}. "
                    "Fetch or make it again."
                )
            check_ratio(path, min(member.compress_size, on_disk), member.file_size)
        check_memory(path, sum(header.nbytes for header in headers.values()))
        return {name: _read_values(streams[name], headers[name]) for name in found}


def _check_directory(opened: io.BufferedReader, archive: zipfile.ZipFile) -> None:
    """Checks the number of members: zipfile does not, and without some it would be other data."""
    # "End of central directory record" of PKWARE's APPNOTE.TXT, 4.3.16; 0xffff: see ZIP64.
    opened.seek(-22 - len(archive.comment), os.SEEK_END)
    count = int.from_bytes(opened.read(22)[10:12], "little")
    if count not in (len(archive.infolist()), 0xFFFF):
        raise zipfile.BadZipFile(f"{len(archive.infolist())} of {count} members are in it")


def read_header(path: Path, name: str, stream: IO[bytes]) -> Header:
    """Reads the header of an array; the stream is at its values then.

    Args:
        path: The file, for errors.
        name: The array, for errors.
        stream: At the beginning of the array.

    Raises:
        DataError: It is one of Python objects.
        ValueError: It is damaged, or of another version.
    """
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if not read:
        raise ValueError(f"version {version} of the format of arrays")
    try:
        with warnings.catch_warnings(action="ignore"):  # Of Python, about the literal in it.
            header = Header(*read(stream, max_header_size=MAX_HEADER))
    except (ValueError, SyntaxError) as error:  # NumPy's text would advise allow_pickle.
        raise ValueError(f"{name} has a header that is damaged or long") from error
    if any(length >= 2**63 for length in header.shape):
        raise ValueError(f"{name} has a header that is damaged")
    if header.dtype.hasobject:
        raise DataError(
            f"Expected plain arrays in {path}. Received: Python objects in {name}, which are never "
            "read: reading them can run code. Save it with an integer dtype."
        )
    return header


def _read_values(stream: IO[bytes], header: Header) -> np.ndarray:
    shape = header.shape[::-1] if header.fortran_order else header.shape
    array = aligned_empty(shape, header.dtype)
    if fill(array, stream) < array.nbytes:
        raise EOFError("it ends early")
    stream.read(1)  # Until the end, where zipfile compares the checksum.
    return array.T if header.fortran_order else array


def fill(array: np.ndarray, stream: IO[bytes]) -> int:
    """Reads into a C-contiguous array; returns the number of bytes that there were."""
    memory = array.reshape(-1).view(np.uint8).data
    filled = 0
    while filled < len(memory):
        count = stream.readinto(memory[filled : filled + CHUNK])  # type: ignore[attr-defined]
        if not count:
            break
        filled += count
    return filled


def check_memory(source: Path | str, size: int, before: int = 0) -> None:
    """Refuses what would leave too little memory for the training.

    Args:
        source: The file or data set, for the error.
        size: Bytes that it takes.
        before: Bytes that were taken for other files of the data set.
    """
    memory = total_memory()
    if memory and size + before > memory * MEMORY_SHARE:
        raise DataError(
            f"Expected data that takes at most {memory * MEMORY_SHARE / 1e9:.1f} GB, half of the "
            f"memory of this machine or container. Received: {(size + before) / 1e9:.1f} GB at "
            f"{source}. Use fewer examples, or more memory."
        )


def check_ratio(path: Path, packed: int, size: int) -> None:
    """Refuses what grows more when it is unpacked than pictures of digits do.

    Args:
        path: The file, for the error.
        packed: Its bytes, or those of a member of it.
        size: What it says that they unpack to, in bytes.
    """
    if size > SMALL and size > MAX_RATIO * packed:
        raise DataError(
            f"Expected compressed data at {path} that unpacks to at most {MAX_RATIO} times its "
            f"size. Received: {size / 1e9:.1f} GB from {packed:,} bytes. If it is right, save it "
            "uncompressed, with numpy.savez."
        )


def _damaged(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return DataError(
        f"Expected a whole .npz archive of plain arrays at {path}. Received: a file that cannot be "
        f"read as one ({reason}). Fetch or make it again."
    )


@contextlib.contextmanager
def naming(source: Path | str) -> Iterator[None]:
    """Adds the source and what to do to an error about what is in it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{error} Correct {source}, or use data='bundled'.") from error


def unreadable(path: Path, error: OSError) -> str:
    """Returns the message about a file that cannot be opened or read."""
    return (
        f"Expected a readable file at {path}. Received: {error.strerror or error}. "
        "Name a file that this user may read, or use data='bundled'."
    )
