"""Checkpoints: a resumed run has the same order of images and the same dropout masks, and ends with
the same bits, as one that was never interrupted.

    checkpoints = Checkpoints(output_dir, keep=3)
    checkpoints.track(model)
    checkpoints.save(position, manifest)
    checkpoints.restore(checkpoints.newest_first()[0])

A checkpoint is TensorFlow's (``tf.train.Checkpoint``). It holds every variable of the model, the
states of dropout's seed generators included, every variable of its optimizer, and as JSON the
position and the run manifest. ``trainer.training.resume`` decides which one a run may resume.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.distributed.collectives import Workers
from trainer.errors import OutputError, StoppedError
from trainer.files import flush, make_folder, output_errors
from trainer.runtime import keras, tf
from trainer.training.manifest import RunManifest
from trainer.training.position import Position

FOLDER = "checkpoints"

_FILE = re.compile(r"steps-(\d+)\.(?:index|data-\d{5}-of-\d{5})")
# A folder in which a checkpoint is being written; the second is TensorFlow's own.
_UNFINISHED = re.compile(r"steps-\d+(?:\.tmp|_temp)")
_STATE_KEY = "state/.ATTRIBUTES/VARIABLE_VALUE"  # TensorFlow's name for the argument state=


def variables_of(model: keras.Model) -> dict[str, list[tf.Variable]]:
    """Returns all variables that a checkpoint holds, in the order of the model and its optimizer:
    as lists, not as a graph of objects, so that none is left out for its name.
    """
    return {
        "model": [variable.value for variable in model.variables],
        "optimizer": [variable.value for variable in model.optimizer.variables],
    }


class Checkpoints:
    """The checkpoints in the output folder of a run.

    Each is TensorFlow's pair of files, ``steps-N.index`` and ``steps-N.data-00000-of-00001``, after
    N steps of the run. Nothing else in the folder is touched: it may be another program's.

    Args:
        output_dir: The output folder; a folder in it is created with the first checkpoint.
        keep: Number of checkpoints to keep, the newest ones.

    Attributes:
        unreadable: Numbers of steps of checkpoints that could not be read, which the next save
            deletes.
    """

    def __init__(self, output_dir: Path, *, keep: int) -> None:
        self.folder = output_dir / FOLDER
        self.keep = keep
        self.unreadable: set[int] = set()

    def track(self, model: keras.Model, extra: Callable[[], bytes] | None = None) -> None:
        """Sets what is saved and restored.

        Args:
            model: Built and compiled; its variables and its optimizer's.
            extra: Returns what else a checkpoint is to hold; after a restore, the attribute
                ``extra`` is a variable with it.
        """
        self.state = tf.Variable("", dtype=tf.string)
        parts = {**variables_of(model), "state": self.state}
        self.extra, self.make_extra = tf.Variable("", dtype=tf.string), extra
        if extra:
            parts["extra"] = self.extra
        self.checkpoint = tf.train.Checkpoint(**parts)

    def newest_first(self) -> list[Path]:
        """Returns the checkpoints there are, as TensorFlow names them: paths without a suffix."""
        return [
            files[0].with_suffix("")
            for _, files in sorted(self._files().items(), reverse=True)
            if not _is_data(files[0])
        ]

    def check_ours(self) -> None:
        """Checks that none of the files that this run would replace is of another program.

        Raises:
            OutputError: A checkpoint has no run's state.
        """
        for path in self.newest_first():
            with contextlib.suppress(tf.errors.OpError), _literal(path) as name:
                if tf.train.load_checkpoint(name).has_tensor(_STATE_KEY):
                    continue
                raise OutputError(
                    f"Expected {path} to be a checkpoint of this program. Received: one of another "
                    "program. Move it away, or use another output_dir."
                )

    def set_unreadable(self, path: Path) -> None:
        """Notes that a checkpoint cannot be read."""
        self.unreadable.add(int(path.name.removeprefix("steps-")))

    def read_state(self, path: Path) -> dict:
        """Returns the run's state in a checkpoint: the fields of its manifest, and ``position``.

        Raises:
            Exception: It is damaged: TensorFlow and JSON have an error for each kind of damage.
        """
        with _literal(path) as name:
            return json.loads(tf.train.load_checkpoint(name).get_tensor(_STATE_KEY))

    def restore(self, path: Path) -> None:
        """Assigns a checkpoint's values to the variables of the model and its optimizer.

        Raises:
            Exception: It is damaged, or of another model; of any kind, as in ``read_state``.
        """
        with _literal(path) as name:
            self.checkpoint.read(name).assert_existing_objects_matched()

    def save(self, position: Position, manifest: RunManifest) -> None:
        """Writes a checkpoint, and deletes the oldest beyond ``keep`` once it is on disk.

        Raises:
            OutputError: It cannot be written; the last one is still there.
        """
        self.unreadable.discard(position.steps)  # It is written anew.
        state = {**manifest.as_dict(), "position": dataclasses.asdict(position)}
        self.state.assign(json.dumps(state))
        if self.make_extra:
            self.extra.assign(self.make_extra())
        name = f"steps-{position.steps}"
        unfinished = self.folder / f"{name}.tmp"
        try:
            make_folder(unfinished)
            with _literal(unfinished / name) as path:
                self.checkpoint.write(path)
            _put_on_disk(unfinished, self.folder)
            unfinished.rmdir()
            self._rotate()
        except (OSError, tf.errors.OpError) as error:
            reason = " ".join(str(error).split())[:300]
            raise OutputError(
                f"Expected to write a checkpoint in {self.folder}. Received: {reason}. "
                "Make room or permission there; earlier checkpoints are intact."
            ) from error

    def delete_unfinished(self) -> None:
        """Deletes what a run left that was killed while it saved."""
        for path in self._listing():
            if _UNFINISHED.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)

    def delete_all(self) -> None:
        """Deletes the checkpoints: there is nothing to resume any more. The folder goes, too, if
        nothing else is in it.
        """
        self.delete_unfinished()
        with contextlib.suppress(OSError):
            for files in self._files().values():
                for path in files:
                    path.unlink()
            self.folder.rmdir()

    def _rotate(self) -> None:
        """Deletes all but the newest checkpoints; those that could not be read, and what is left of
        one without its index, count for none.
        """
        files = self._files()
        whole = {number for number, paths in files.items() if not _is_data(paths[0])}
        kept = sorted(whole - self.unreadable, reverse=True)[: self.keep]
        for number in files.keys() - set(kept):
            for path in files[number]:
                path.unlink()

    def _files(self) -> dict[int, list[Path]]:
        """Returns the files of each checkpoint by its number of steps, its index first: without
        that, what is left of it is no checkpoint.
        """
        files: dict[int, list[Path]] = {}
        # From the folder itself: TensorFlow's own list of checkpoints can be damaged.
        for path in self._listing():
            if match := _FILE.fullmatch(path.name):
                files.setdefault(int(match[1]), []).append(path)
        return {number: sorted(paths, key=_is_data) for number, paths in files.items()}

    def _listing(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.is_dir() else []


@contextlib.contextmanager
def _literal(path: Path) -> Iterator[str]:
    """Gives the name of a checkpoint under which TensorFlow can read and write it: in a name, it
    takes ``*``, ``?``, ``[`` and a backslash for a pattern of file names (``GetMatchingPaths``,
    which RestoreV2 and CheckpointReader call), and finds nothing, or another folder's; and a name
    must be valid UTF-8.
    """
    pattern = set(str(path)) & (set("*?[\\") - {os.sep})
    surrogate = any("\ud800" <= character <= "\udfff" for character in str(path))
    if not pattern and not surrogate:
        yield str(path)
        return
    with output_errors(Path(tempfile.gettempdir())):
        folder = tempfile.TemporaryDirectory(prefix="trainer-")
    with folder:
        link = Path(folder.name) / FOLDER
        link.symlink_to(path.parent.resolve(), target_is_directory=True)
        yield str(link / path.name)


def _put_on_disk(unfinished: Path, folder: Path) -> None:
    """Moves the files of a checkpoint into the folder, where they survive a power cut from then on.

    The index comes last: without it there is no checkpoint of that name.
    """
    files = sorted(
        (path for path in unfinished.iterdir() if _FILE.fullmatch(path.name)),
        key=_is_data,
        reverse=True,
    )
    for path in files:
        flush(path)
    for path in files:
        path.replace(folder / path.name)
    flush(folder)


def _is_data(path: Path) -> bool:
    return path.suffix != ".index"


class Checkpointer:
    """Saves checkpoints while a run trains: at each epoch's end, at intervals, and when the run is
    asked to stop.

    Args:
        checkpoints: Where to save.
        manifest: The manifest of the run.
        position: Where the run begins, or resumes.
        every: As ``TrainConfig.checkpoint_every``.
        stop: Returns the name of the signal that asks the run to stop; None before that.
        workers: The workers of the run. All of them call ``after_call`` together; worker 0 alone
            saves.
        clock: Monotonic time in seconds.

    Attributes:
        saved: The position of the last checkpoint, or that where the run began.
        count: Number of checkpoints saved.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        manifest: RunManifest,
        position: Position,
        *,
        every: str,
        stop: Callable[[], str | None],
        workers: Workers,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.checkpoints = checkpoints
        self.manifest = manifest
        self.every, self.in_seconds = parse_every(every)
        self.stop = stop
        self.workers = workers
        self.clock = clock
        self.saved = dataclasses.replace(position)
        self.saved_at = clock()
        self.count = 0

    def after_call(self, position: Position) -> None:
        """Saves a checkpoint if one is due.

        Raises:
            StoppedError: The run was asked to stop; its position is saved.
            OutputError: The checkpoint cannot be written.
        """
        signals = self.workers.gather(getattr(signal, self.stop() or "", 0))
        moved = (position.epoch, position.step) != (self.saved.epoch, self.saved.step)
        if moved and self.workers.index == 0 and (any(signals) or self._is_due(position)):
            self.checkpoints.save(position, self.manifest)
            self.saved = dataclasses.replace(position)
            self.saved_at = self.clock()
            self.count += 1
        for worker, number in enumerate(signals):
            if number:
                by = signal.Signals(number).name
                if worker != self.workers.index:
                    by += f" to worker {worker}"
                where = "with worker 0" if self.workers.index else f"in {self.checkpoints.folder}"
                raise StoppedError(
                    f"stopped by {by} at {position}. The checkpoint is {where}: the same command "
                    "resumes the run."
                )

    def _is_due(self, position: Position) -> bool:
        if not position.step:  # An epoch has ended.
            return True
        if self.in_seconds:
            return self.clock() - self.saved_at >= self.every
        return position.steps - self.saved.steps >= self.every


def parse_every(every: str) -> tuple[int, bool]:
    """Reads an interval between checkpoints.

    Args:
        every: As ``TrainConfig.checkpoint_every``.

    Returns:
        The interval, and whether it is in seconds; else it is in steps.

    >>> parse_every("90s"), parse_every("5m"), parse_every("200")
    ((90, True), (300, True), (200, False))
    """
    match = re.fullmatch(r"(\d+)([smh]?)", every)
    if match is None:
        raise ValueError(f"Expected an interval like 90s, 5m, 1h or 200. Received: {every!r}.")
    number, unit = match.groups()
    return int(number) * {"": 1, "s": 1, "m": 60, "h": 3600}[unit], bool(unit)
