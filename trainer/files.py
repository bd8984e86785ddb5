"""A run's files: their names, taking their folder, and writing them whole or not at all.

    with lock_output_dir(folder):                # before training: can it be written at all?
        write_files(folder, {MODEL_FILE: content, MANIFEST_FILE: manifest})

A file is written under a temporary name beside its target, flushed to disk and renamed, so that at
every moment the old file or the new one is there, complete.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.errors import OutputError
from trainer.locking import hold_lock


class Names(NamedTuple):
    """Names of a run's files.

    Attributes:
        model: Of the trained model; its suffix is that of its format.
        manifest: Of the description of the model, and of the run.
    """

    model: str
    manifest: str


MODEL_FILE = "mnist.h5"
HISTORY_FILE = "history.json"
MANIFEST_FILE = "mnist.json"
FILES = (MODEL_FILE, HISTORY_FILE, MANIFEST_FILE)

DIGITS = Names(MODEL_FILE, MANIFEST_FILE)  # of the network for digits
OTHERS = Names("model.keras", "model.json")  # of every other run
KINDS = (DIGITS, OTHERS)

# Written after those; they may be missing.
PAGE_FILE = "report.html"
CURVES_FILE = "curves.png"
REPORT_FILES = (PAGE_FILE, CURVES_FILE)
MARK = "digits-trainer"  # in the first bytes of each of them


@contextlib.contextmanager
def lock_folder(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Locks a folder until the ``with`` block ends. It first creates it where it does not exist,
    and checks that it can be written. Where the block raises before anything is written, folders
    that were created are removed.

    Args:
        folder: The folder.
        wait: As in ``lock_output_dir``.

    Raises:
        OutputError: It is a file, cannot be created or written, or another run is using it.
        StoppedError: Another run is using it still, after the wait.
    """
    with output_errors(folder):
        created = make_folder(folder)
    with hold_lock(folder, wait):
        try:
            with output_errors(folder):
                _check_writable(folder)
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # Not empty, most likely.
                for path in reversed(created):
                    path.rmdir()
            raise


@contextlib.contextmanager
def lock_output_dir(
    folder: Path, *, wait: float = 0.0, names: Names | None = DIGITS
) -> Iterator[None]:
    """Locks the output folder of a run, as ``lock_folder`` does, and checks that what the run would
    replace there is an earlier run's. A save that was killed between its renames is finished; one
    that was killed before is forgotten.

    Args:
        folder: The output folder.
        wait: Seconds to wait for a run that is using the folder and is about to end, such as that
            of a pod that is being deleted.
        names: Names of the run's files; None: not known yet, and not checked
            (``check_replaceable``).

    Raises:
        OutputError: It is a file, cannot be created or written, has files of another program under
            a run's names, or another run is using it.
        StoppedError: Another run is using it still, after the wait.
    """
    with lock_folder(folder, wait=wait):
        with output_errors(folder):
            _finish_killed_save(folder)
            if names:
                _check_replaceable(folder, names)
        yield


def check_replaceable(folder: Path, names: Names) -> None:
    """Checks that each file which a run replaces is an earlier run's, by what is in it.

    Args:
        folder: A folder under ``lock_output_dir``.
        names: Names of the run's files.

    Raises:
        OutputError: One is a folder, or another program's or the user's own.
    """
    with output_errors(folder):
        _check_replaceable(folder, names)


def check_output_dir(folder: Path, names: Names = DIGITS) -> None:
    """Checks what ``lock_output_dir`` and ``check_replaceable`` check, in a folder that exists, and
    changes nothing there.

    What a killed save has left is not finished: with it there, files are not compared.

    Raises:
        OutputError: As that raises.
    """
    with hold_lock(folder), output_errors(folder):
        _check_writable(folder)
        if not any(_TEMPORARY.fullmatch(path.name) for path in folder.iterdir()):
            _check_replaceable(folder, names)


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
        replace_files(folder, files)


def replace_files(folder: Path, files: dict[str, bytes]) -> None:
    """Writes files like ``write_files``, into any folder.

    Raises:
        OSError: One cannot be written. The previous files are still there.
    """
    token = secrets.token_hex(8)
    try:
        for name, content in files.items():
            descriptor, _ = _create_temporary(folder / name, token)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in files:  # Renamed when all are on disk.
            _temporary(folder / name, token).replace(folder / name)
        flush(folder)
    finally:
        for name in files:
            _temporary(folder / name, token).unlink(missing_ok=True)


def read_manifest(folder: Path, names: Names = DIGITS) -> dict:
    """Returns the manifest in the folder; an empty one if there is none, or it is unreadable."""
    return _read_json(folder / names.manifest)


def is_complete(folder: Path, names: Names = DIGITS) -> bool:
    """Tells whether the model in the folder is the one that the manifest beside it describes."""
    model = read_manifest(folder, names).get("model")
    return isinstance(model, dict) and model.get("sha256") == _sha256(folder / names.model)


def is_marked(path: Path) -> bool:
    """Tells whether a picture or a page was written by this program.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return MARK.encode() in file.read(4096)


def make_folder(folder: Path) -> list[Path]:
    """Creates a folder, and its parents, where they do not exist, on disk.

    Returns:
        Those that did not exist, parents first.

    Raises:
        OSError: It cannot be created, or is a file.
    """
    created = [] if folder.parent.exists() else make_folder(folder.parent)
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        flush(folder.parent)
        created.append(folder)
    return created


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
    except OSError as error:
        # Some file systems cannot flush the names in a folder (CIFS, some of FUSE).
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
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


def _temporary(target: Path, token: str) -> Path:
    """Returns the name that a file has until it is whole; one token for the files of one save."""
    return target.with_name(f".{target.name}.{token}.tmp")


_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<token>[0-9a-f]{16})\.tmp")


def _create_temporary(target: Path, token: str) -> tuple[int, Path]:
    """Creates a temporary file; opens no file, and follows no link, that is there already."""
    path = _temporary(target, token)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)  # of Unix, of Windows
    return os.open(path, flags, 0o666), path


def _check_writable(folder: Path) -> None:
    descriptor, probe = _create_temporary(folder / MODEL_FILE, secrets.token_hex(8))
    os.close(descriptor)
    probe.unlink()


def _finish_killed_save(folder: Path) -> None:
    """Finishes a save that was killed when its model was in place and its manifest not yet; removes
    the temporary files of one that was killed before that.
    """
    known = {HISTORY_FILE, *REPORT_FILES, *DIGITS, *OTHERS}
    left: dict[str, dict[str, Path]] = {}
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and match["name"] in known and not path.is_symlink():
            left.setdefault(match["token"], {})[match["name"]] = path
    for files in left.values():
        for names in KINDS:
            manifest = files.get(names.manifest)
            model = _read_json(manifest).get("model") if manifest else None
            if isinstance(model, dict) and model.get("sha256") == _sha256(folder / names.model):
                for name in (names.model, HISTORY_FILE, names.manifest):
                    if name in files:
                        files.pop(name).replace(folder / name)
                flush(folder)
        for path in files.values():
            path.unlink()


def _check_replaceable(folder: Path, names: Names) -> None:
    is_ours = {
        names.manifest: lambda path: isinstance(_read_json(path).get("model"), dict),
        names.model: lambda path: is_complete(path.parent, names),
        HISTORY_FILE: lambda path: "seconds" in _read_json(path),
        PAGE_FILE: is_marked,
        CURVES_FILE: is_marked,
    }
    for name, check in is_ours.items():
        path = folder / name
        if path.is_dir():
            received = "a folder"
        elif path.exists() and not check(path):
            received = "one that no run of this program has left there as it is"
        else:
            continue
        raise OutputError(
            f"Expected a file of an earlier run or nothing at {path}. Received: {received}. "
            "Move it away, or use another output_dir."
        )


def _read_json(path: Path) -> dict:
    """Returns the object in a JSON file; an empty one where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _sha256(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
