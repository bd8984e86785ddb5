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

import dataclasses
import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from trainer.distributed.collectives import Workers
from trainer.errors import OutputError, StoppedError
from trainer.runtime import keras, tf
from trainer.training.manifest import RunManifest
from trainer.training.position import Position

FOLDER = "checkpoints"

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

    Args:
        output_dir: The output folder; a folder in it is created with the first checkpoint.
        keep: Number of checkpoints to keep, the newest ones.
    """

    def __init__(self, output_dir: Path, *, keep: int) -> None:
        self.folder = output_dir / FOLDER
        self.keep = keep

    def track(self, model: keras.Model) -> None:
        """Sets the model, built and compiled, whose variables are saved and restored."""
        self.state = tf.Variable("", dtype=tf.string)
        self.checkpoint = tf.train.Checkpoint(**variables_of(model), state=self.state)
        self.manager: tf.train.CheckpointManager | None = None

    def newest_first(self) -> list[Path]:
        """Returns the checkpoints there are, as TensorFlow names them: paths without a suffix."""
        # From the folder itself: TensorFlow's own list of checkpoints can be damaged, too.
        numbers = {
            int(path.stem.removeprefix("steps-")): path.with_suffix("")
            for path in self.folder.glob("steps-*.index")
        }
        return [numbers[number] for number in sorted(numbers, reverse=True)]

    def read_state(self, path: Path) -> dict:
        """Returns the run's state in a checkpoint: the fields of its manifest, and ``position``.

        Raises:
            Exception: It is damaged: TensorFlow and JSON have an error for each kind of damage.
        """
        return json.loads(tf.train.load_checkpoint(str(path)).get_tensor(_STATE_KEY))

    def restore(self, path: Path) -> None:
        """Assigns a checkpoint's values to the variables of the model and its optimizer.

        Raises:
            Exception: It is damaged, or of another model; of any kind, as in ``read_state``.
        """
        self.checkpoint.restore(str(path)).assert_consumed()

    def save(self, position: Position, manifest: RunManifest) -> None:
        """Writes a checkpoint, and deletes the oldest beyond ``keep``.

        Raises:
            OutputError: It cannot be written; the last one is still there.
        """
        state = {**manifest.as_dict(), "position": dataclasses.asdict(position)}
        self.state.assign(json.dumps(state))
        try:
            self.folder.mkdir(exist_ok=True)
            self.manager = self.manager or self._manager()
            self.manager.save(checkpoint_number=position.steps)
        except (OSError, tf.errors.OpError) as error:
            reason = " ".join(str(error).split())[:300]
            raise OutputError(
                f"Expected to write a checkpoint in {self.folder}. Received: {reason}. "
                "Make room or permission there; earlier checkpoints are intact."
            ) from error

    def delete_all(self) -> None:
        """Deletes the folder of the checkpoints: there is nothing to resume any more."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.manager = None

    def _manager(self) -> tf.train.CheckpointManager:
        options = {"max_to_keep": self.keep, "checkpoint_name": "steps"}
        try:
            return tf.train.CheckpointManager(self.checkpoint, str(self.folder), **options)
        except ValueError:  # Its list of the checkpoints is damaged; they were found without it.
            (self.folder / "checkpoint").unlink()
            return tf.train.CheckpointManager(self.checkpoint, str(self.folder), **options)


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
