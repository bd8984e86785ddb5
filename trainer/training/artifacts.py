"""The files a run leaves behind, each written whole or not at all.

    with claim(folder):                          # before training: can it be written at all?
        save(folder, model, history, facts)      # mnist.h5, history.json, mnist.json

A file is written under a temporary name beside its target, flushed to disk and renamed, so that at
every moment the old file or the new one is there, complete.
"""

import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import OutputError, StoppedError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

if TYPE_CHECKING:  # Checking the folder must not wait for TensorFlow.
    import keras

MODEL_FILE = "mnist.h5"
HISTORY_FILE = "history.json"
MANIFEST_FILE = "mnist.json"
FILES = (MODEL_FILE, HISTORY_FILE, MANIFEST_FILE)

# What is drawn of a run when those are safe, and can be missing: ``trainer.reporting.html``.
PAGE_FILE = "report.html"
CURVES_FILE = "curves.png"
REPORT_FILES = (PAGE_FILE, CURVES_FILE)


@contextlib.contextmanager
def claim(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Creates the folder where it does not exist, checks that it can be written, removes what a
    run that was killed while it saved has left there, and keeps other runs out until it ends.

    Args:
        folder: Where to write.
        wait: Seconds to wait for a run that is using it and is about to end, such as that of a
            pod that is being deleted.

    Raises:
        OutputError: It is a file, cannot be created or written, or another run is using it.
        StoppedError: Another run is using it still, after the wait.
    """
    with _output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, wait):
        with _output_errors(folder):
            for name in (*FILES, *REPORT_FILES):
                if (folder / name).is_dir():
                    raise OutputError(
                        f"Expected a file or nothing at {folder / name}. Received: a folder. "
                        "Move it away, or name another folder with --output-dir."
                    )
                temporary = _temporary(folder / name)
                temporary.write_bytes(b"\0")
                temporary.unlink()
        yield


def save(folder: Path, model: "keras.Model", history: dict[str, list[float]], facts: dict) -> dict:
    """Writes the model in Keras' HDF5 format, the history, and the manifest that describes both.

    Args:
        folder: A folder under ``claim``.
        model: A compiled model of stock layers.
        history: What ``loop.fit`` returned.
        facts: What else the manifest says: metrics, configuration, versions, data.

    Returns:
        The manifest: ``facts``, and under ``model`` the file's name, size in bytes, SHA-256, number
        of parameters, and ``weights_sha256`` (see that function).

    Raises:
        OutputError: A file cannot be written. Those that were there before are still there.
    """
    content = _hdf5(model)
    manifest = {
        "model": {
            "file": MODEL_FILE,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "parameters": model.count_params(),
            "weights_sha256": weights_sha256(model),
        },
        **facts,
    }
    files = {MODEL_FILE: content, HISTORY_FILE: _json(history), MANIFEST_FILE: _json(manifest)}
    write(folder, files)
    return manifest


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Writes files, all of them or none.

    Args:
        folder: A folder under ``claim``.
        files: Contents by name. The manifest is the last: whoever finds a new one finds the model
            whose SHA-256 it names.

    Raises:
        OutputError: One cannot be written. Those that were there before are still there.
    """
    with _output_errors(folder):
        try:
            for name, content in files.items():
                _write(_temporary(folder / name), content)
            for name in files:  # Renamed when all are on disk.
                _temporary(folder / name).replace(folder / name)
            flush(folder)
        finally:
            for name in files:
                _temporary(folder / name).unlink(missing_ok=True)


def remove(folder: Path, names: Iterable[str]) -> None:
    """Removes files, where they are there.

    Args:
        folder: A folder under ``claim``.
        names: Of the files.

    Raises:
        OutputError: One cannot be removed.
    """
    with _output_errors(folder):
        for name in names:
            (folder / name).unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict:
    """Returns the manifest in the folder; an empty one where there is none to read."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def weights_sha256(model: "keras.Model") -> str:
    """Returns the SHA-256 over the bytes of the trainable weights, in their order: equal for two
    runs exactly if they ended with the same bits.
    """
    digest = hashlib.sha256()
    for weight in model.trainable_weights:
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


class _HDF5(io.BytesIO):
    """A file in memory that ``model.save`` and h5py take for one on disk.

    HDF5 cannot write to a full disk without crashing the process (a segmentation fault, where the
    file cannot be closed): so it never writes to one here.
    """

    def __fspath__(self) -> str:
        return MODEL_FILE  # Keras chooses the format by the suffix ...

    __str__ = __fspath__  # ... of this


def _hdf5(model: "keras.Model") -> bytes:
    """Returns the content of a model's HDF5 file: what ``model.save`` writes, without the
    optimizer's variables.

    With them, Keras 3.15 loads a model that ``fit`` refuses: it builds the optimizer for no
    variables (``model._trainable_variables`` in ``load_model_from_hdf5``, which has none of the
    layers'). Without, ``fit`` goes on with the same optimizer and learning rate, its accumulators
    at their start.
    """
    import h5py
    from absl import logging  # Keras logs through it.

    verbosity = logging.get_verbosity()
    # Keras warns in four lines that the format which was asked for is an old one.
    logging.set_verbosity(logging.ERROR)
    try:
        model.save(saved := _HDF5())
    finally:
        logging.set_verbosity(verbosity)
    with h5py.File(saved, "r") as source, h5py.File(kept := _HDF5(), "w") as target:
        target.attrs.update(source.attrs)
        source.copy("model_weights", target)
    return kept.getvalue()


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    flush(path)


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder.
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(target: Path) -> Path:
    # One name for all runs: what a killed one left is overwritten, and never piles up.
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
        while not _lock(descriptor):
            if time.monotonic() >= until:
                error = StoppedError if wait else OutputError
                raise error(
                    f"Expected a folder that no other run is using at {folder}. Received: one in "
                    "use. Wait for that run, or name another folder with --output-dir."
                )
            time.sleep(0.5)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Locks a folder; False where another process has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # A file system without locks (NFS has none for folders).
    return True


@contextlib.contextmanager
def _output_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise OutputError(
            f"Expected a folder that can be written at {folder}. Received: {reason}. "
            "Make room or permission there, or name another folder with --output-dir."
        ) from error
