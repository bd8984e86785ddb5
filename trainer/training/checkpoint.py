"""Saves and restores the exact position of a run, so that one that was stopped goes on as if it had
not been: the same order of images, the same dropout, the same bits.

    keeper = Keeper(output_dir, facts, ...)
    position = keeper.restore(model)        # where the unfinished run was, or the beginning
    loop.fit(model, ..., position=position, after_call=keeper.after_call)
    keeper.finish()                         # when its files are written

A checkpoint is TensorFlow's (``tf.train.Checkpoint``). It holds every variable of the model, the
state of dropout's seed generators included, every variable of its optimizer, and as JSON the
position and what the run is.
"""

import dataclasses
import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trainer.distributed.collectives import Workers
from trainer.errors import (
    ConfigurationError,
    DataError,
    InputError,
    OutputError,
    StoppedError,
    TrainerError,
)
from trainer.runtime import keras, tf

FOLDER = "checkpoints"

# What a run may have and still go on from the checkpoint of one that had another. ``epochs`` may
# grow, where the learning rate is constant. ``threads`` changes the last bits and not what is
# computed: it is in ``environment``.
FREE_FIELDS = (
    "data",  # its digest must match
    "output_dir",
    "strategy",
    "gpus",
    "threads",
    "steps_per_execution",
    "checkpoint_every",
    "keep_checkpoints",
    "resume",
    "startup_timeout",
    "log_format",
    "report",
    "tensorboard",
    "tensorflow_logs",
)

_STATE_KEY = "state/.ATTRIBUTES/VARIABLE_VALUE"  # TensorFlow's name for the argument state=


@dataclasses.dataclass
class Position:
    """Where a run is, between two steps.

    Attributes:
        epoch: The epoch it is in, counted from 0.
        step: How many steps of that epoch are done.
        steps: How many steps of the whole run are done.
        totals: Sums over the steps of the epoch: the weights, then each function of ``loop.fit``.
        seconds: How long the epoch has taken so far.
        history: The epochs before, as ``loop.fit`` returns them.
    """

    epoch: int = 0
    step: int = 0
    steps: int = 0
    totals: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    history: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, step {self.step}"


class Keeper:
    """Finds where an unfinished run was, and saves where this one is.

    Args:
        output_dir: The run's; the checkpoints are in a folder there, made when the first is saved.
        facts: What the run is, as JSON holds it: ``run`` (its identity), ``config``, ``data``
            (with its digest), ``versions``, ``environment``, and in a Kubernetes Job ``job``, its
            uid: ``resume="never"`` does not forget what another pod of the same Job has done.
        finished_run: The identity of the run that the files in ``output_dir`` are of, if any.
        resume: As ``TrainConfig.resume``.
        every: As ``TrainConfig.checkpoint_every``.
        keep: How many of the newest stay.
        stop: Names the signal that asks the run to stop, or gives None.
        workers: Those of the run. All of them restore, stop, and call ``after_call`` and ``finish``
            together; worker 0 alone reads and writes the folder.
        warn: Takes a sentence for the user.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        output_dir: Path,
        facts: dict,
        *,
        finished_run: str | None,
        resume: str,
        every: str,
        keep: int,
        stop: Callable[[], str | None],
        workers: Workers,
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = output_dir / FOLDER
        self.facts = facts
        self.finished_run = finished_run
        self.resume = resume
        self.every, self.in_seconds = parse_every(every)
        self.keep = keep
        self.stop = stop
        self.workers = workers
        self.warn = warn
        self.clock = clock

    def restore(self, model: keras.Model) -> Position:
        """Puts model and optimizer where the newest readable checkpoint of the unfinished run has
        them; without one, leaves them as they are.

        Returns:
            The position there; the beginning of a run where there is nothing to resume.

        Raises:
            ConfigurationError: The unfinished run has another configuration or other data.
            DataError: There are checkpoints, and none can be read.
            InputError: ``resume`` is ``must`` and there is nothing to resume.
        """
        # One by one and in order, not as a graph of objects: nothing is left out by its name.
        parts = {
            "model": [variable.value for variable in model.variables],
            "optimizer": [variable.value for variable in model.optimizer.variables],
        }
        position = None
        if self.workers.index == 0:
            self.state = tf.Variable("", dtype=tf.string)
            checkpoint = tf.train.Checkpoint(**parts, state=self.state)
            if self.resume == "never" and not self.facts.get("job"):
                self.finish()
            position = self._restore_newest(checkpoint)
            if position is None and self.resume == "must":
                raise InputError(
                    f"Expected an unfinished run to resume in {self.folder}. Received: none. "
                    "Leave out --resume must to start one."
                )
            self.manager = self._manager(checkpoint)
        if self.workers.count > 1:
            position = self._share(position, [*parts["model"], *parts["optimizer"]])
        self.saved = position or Position()
        self.saved_at = self.clock()
        return dataclasses.replace(self.saved)

    def after_call(self, position: Position) -> None:
        """Saves at an epoch's end, when it is time, and when the run is asked to stop.

        Raises:
            StoppedError: The run was asked to stop; the position is saved.
            OutputError: The checkpoint cannot be written.
        """
        asked = self.workers.gather(getattr(signal, self.stop() or "", 0))
        moved = (position.epoch, position.step) != (self.saved.epoch, self.saved.step)
        since = (
            self.clock() - self.saved_at if self.in_seconds else position.steps - self.saved.steps
        )
        due = any(asked) or not position.step or since >= self.every
        if moved and due and self.workers.index == 0:
            self._save(position)
        for worker, number in enumerate(asked):
            if number:
                by = signal.Signals(number).name
                if worker != self.workers.index:
                    by += f" to worker {worker}"
                where = "with worker 0" if self.workers.index else f"in {self.folder}"
                raise StoppedError(
                    f"stopped by {by} at {position}. The checkpoint is {where}: the same command "
                    "goes on from there."
                )

    def finish(self) -> None:
        """Removes the checkpoints: there is nothing to resume any more."""
        if self.workers.index == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _share(self, position: Position | None, variables: list[tf.Variable]) -> Position | None:
        """Gives the other workers what worker 0 has restored, bit for bit."""
        state = json.dumps(position and dataclasses.asdict(position))
        state = json.loads(self.workers.broadcast(state.encode()))
        if state is None:
            return None
        content = self.workers.broadcast(b"".join(value.numpy().tobytes() for value in variables))
        if self.workers.index:
            start = 0
            for variable in variables:
                dtype, shape = variable.dtype.as_numpy_dtype, variable.shape
                count = shape.num_elements()
                value = np.frombuffer(content, dtype, count, start).reshape(shape)
                variable.assign(value)
                start += value.nbytes
        return Position(**state)

    def _manager(self, checkpoint: tf.train.Checkpoint) -> tf.train.CheckpointManager:
        options = {"max_to_keep": self.keep, "checkpoint_name": "steps"}
        try:
            return tf.train.CheckpointManager(checkpoint, str(self.folder), **options)
        except ValueError:  # Its list of the checkpoints is damaged; they were found without it.
            (self.folder / "checkpoint").unlink()
            return tf.train.CheckpointManager(checkpoint, str(self.folder), **options)

    def _save(self, position: Position) -> None:
        self.state.assign(json.dumps({**self.facts, "position": dataclasses.asdict(position)}))
        try:
            self.folder.mkdir(exist_ok=True)
            self.manager.save(checkpoint_number=position.steps)
        except (OSError, tf.errors.OpError) as error:
            reason = " ".join(str(error).split())[:300]
            raise OutputError(
                f"Expected to write a checkpoint in {self.folder}. Received: {reason}. "
                "Make room or permission there; the last checkpoint stands."
            ) from error
        self.saved = dataclasses.replace(position)
        self.saved_at = self.clock()

    def _restore_newest(self, checkpoint: tf.train.Checkpoint) -> Position | None:
        # Of the folder itself: TensorFlow's own list of checkpoints can be damaged as well.
        numbered = {
            int(path.stem.removeprefix("steps-")): path.with_suffix("")
            for path in self.folder.glob("steps-*.index")
        }
        for number in sorted(numbered, reverse=True):
            path = str(numbered[number])
            try:
                state = json.loads(tf.train.load_checkpoint(path).get_tensor(_STATE_KEY))
                # Of a run that was killed before it could remove them; or asked to be forgotten,
                # unless by a pod in whose place this one is: it began the run anew already.
                if state["run"] == self.finished_run or (
                    self.resume == "never" and state.get("job") != self.facts.get("job")
                ):
                    self.finish()
                    return None
                self._check(state)
                checkpoint.restore(path).assert_consumed()
            except TrainerError:
                raise
            except Exception as error:  # TensorFlow and JSON have one for each kind of damage.
                reason = " ".join(str(error).split())[:200]
                self.warn(f"The checkpoint {path} cannot be read ({reason}): trying the one before")
                continue
            self.facts["run"] = state["run"]
            position = Position(**state["position"])
            self.warn(f"Resuming the unfinished run in {self.folder} at {position}")
            return position
        if numbered and self.resume == "never":
            self.finish()
        elif numbered:
            raise DataError(
                f"Expected a readable checkpoint in {self.folder}. Received: {len(numbered)}, all "
                "damaged. Use --resume never to start anew."
            )
        return None

    def _check(self, state: dict) -> None:
        """Compares what a checkpoint is of with what this run is."""
        differences = [
            f"{name}={self.facts['config'].get(name)!r} where it has {name}={value!r}"
            for name, value in state["config"].items()
            if name not in FREE_FIELDS
            and name != "epochs"
            and value != self.facts["config"].get(name)
        ]
        # The learning rate of a schedule depends on how many there are.
        may_grow = state["config"].get("schedule", "constant") == "constant"
        epochs = self.facts["config"]["epochs"]
        if epochs < state["config"]["epochs"] or (
            epochs != state["config"]["epochs"] and not may_grow
        ):
            differences.append(
                f"epochs={self.facts['config']['epochs']} where it has "
                f"epochs={state['config']['epochs']}"
            )
        if self.facts["data"]["sha256"] != state["data"]["sha256"]:
            differences.append("other images or labels")
        if differences:
            raise ConfigurationError(
                f"Expected the unfinished run in {self.folder} to go on as it began. Received: "
                f"{', '.join(differences)}. Use its flags, or --resume never to start anew."
            )
        differences = [
            f"{name} is {self.facts[part].get(name)} and was {value}"
            for part in ("versions", "environment")
            for name, value in state[part].items()
            if value != self.facts[part].get(name)
        ]
        if differences:
            self.warn(
                f"The run goes on, but its last bits will differ from an unbroken one's: "
                f"{', '.join(differences)}"
            )


def parse_every(every: str) -> tuple[int, bool]:
    """Reads an interval between checkpoints: a number, and whether it is of seconds.

    >>> parse_every("90s"), parse_every("5m"), parse_every("200")
    ((90, True), (300, True), (200, False))
    """
    number, unit = re.fullmatch(r"(\d+)([smh]?)", every).groups()
    return int(number) * {"": 1, "s": 1, "m": 60, "h": 3600}[unit], bool(unit)
