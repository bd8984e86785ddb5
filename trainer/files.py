"""A run's files: their names, the lock on their folder, and writing them whole or not at all.

    with lock_output_dir(folder):                # before training: can it be written at all?
        write_files(folder, {MODEL_FILE: content, MANIFEST_FILE: manifest})

A file is written under a temporary name beside its target, flushed to disk and renamed, so that at
every moment the old file or the new one is there, complete.
"""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.errors import OutputError, StoppedError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MODEL_FILE = "mnist.h5"
HISTORY_FILE = "history.json"
MANIFEST_FILE = "mnist.json"
FILES = (MODEL_FILE, HISTORY_FILE, MANIFEST_FILE)

# Written after those; they may be missing.
PAGE_FILE = "report.html"
CURVES_FILE = "curves.png"
REPORT_FILES = (PAGE_FILE, CURVES_FILE)

POLL_SECONDS = 0.5  # between two attempts to lock a folder that is in use


@contextlib.contextmanager
def lock_output_dir(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Locks the output folder of a run until the ``with`` block ends.

    It first creates the folder where it does not exist, checks that it can be written, and removes
    the temporary files of a run that was killed while it saved.

    Args:
        folder: The output folder.
        wait: Seconds to wait for a run that is using the folder and is about to end, such as that
            of a pod that is being deleted.

    Raises:
        OutputError: It is a file, cannot be created or written, or another run is using it.
        StoppedError: Another run is using it still, after the wait.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, wait):
        with output_errors(folder):
            for name in (*FILES, *REPORT_FILES):
                if (folder / name).is_dir():
                    raise OutputError(
                        f"Expected a file or nothing at {folder / name}. Received: a folder. "
                        "Move it away, or use another output_dir."
                    )
                temporary = _temporary(folder / name)
                temporary.write_bytes(b"\0")
                temporary.unlink()
        yield


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Writes files, all of them or none.

    Args:
        folder: A folder under ``lock_output_dir``.
        files: Contents by name, in the order in which they are to appear. A manifest comes last:
            a reader that finds a new one finds the model whose SHA-256 it names.

    Raises:
        OutputError: One cannot be written. The previous files are still there.
    """
    with output_errors(folder):
        try:
            for name, content in files.items():
                temporary = _temporary(folder / name)
                temporary.write_bytes(content)
                flush(temporary)
            for name in files:  # Renamed when all are on disk.
                _temporary(folder / name).replace(folder / name)
            flush(folder)
        finally:
            for name in files:
                _temporary(folder / name).unlink(missing_ok=True)


def place(source: Path, target: Path) -> None:
    """Copies a file or folder to ``target``, whole or not at all, in place of what is there.

    No system call that Python has replaces a folder that is not empty: for an instant there is
    neither, and after a kill in that instant the former one is there with the suffix ``.old``.

    Args:
        source: Its permissions are not copied.
        target: Its folder is created where it does not exist. Other processes may be placing
            something there, too: the last one wins.

    Raises:
        OSError: It cannot be written. What was there is still there.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        _copy(source, temporary)
        if source.is_dir() and target.exists():
            _exchange(temporary, target)
        else:
            temporary.replace(target)
        flush(target.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    """Copies a file or folder onto the disk, with the permissions that new files get."""
    if source.is_dir():
        target.mkdir()
        for path in source.iterdir():
            _copy(path, target / path.name)
    else:
        shutil.copyfile(source, target)
    flush(target)


def _exchange(new: Path, old: Path) -> None:
    """Swaps two folders: each has the other's name afterwards."""
    former = new.with_suffix(".old")
    old.rename(former)
    try:
        new.rename(old)
    except BaseException:
        former.rename(old)
        raise
    former.rename(new)


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Removes those of the files that exist.

    Args:
        folder: A folder under ``lock_output_dir``.
        names: The files' names.

    Raises:
        OutputError: One cannot be removed.
    """
    with output_errors(folder):
        for name in names:
            (folder / name).unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk (fsync)."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder.
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def output_errors(folder: Path) -> Iterator[None]:
    """Re-raises an ``OSError`` of writing in the folder as ``OutputError``."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise OutputError(
            f"Expected a folder that can be written at {folder}. Received: {reason}. "
            "Make room or permission there, or use another output_dir."
        ) from error


def _temporary(target: Path) -> Path:
    # The same name in every run: what a killed one left is overwritten, and never piles up.
    return target.with_name(f".{target.name}.tmp")


@contextlib.contextmanager
def _locked(folder: Path, wait: float) -> Iterator[None]:
    """Holds a lock on the folder, which the system releases even when the process is killed."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    until = time.monotonic() + wait
    try:
        while not _try_to_lock(descriptor):
            if time.monotonic() >= until:
                error = StoppedError if wait else OutputError
                raise error(
                    f"Expected a folder that no other run is using at {folder}. Received: one in "
                    "use. Wait for that run, or use another output_dir."
                )
            time.sleep(POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _try_to_lock(descriptor: int) -> bool:
    """Locks a folder; False where another process has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # A file system without locks (NFS has none for folders).
    return True
