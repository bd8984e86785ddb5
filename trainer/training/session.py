"""What a run does between two calls of its training step: it resumes, reports, and saves.

session = Session(config, workload, assembly, watcher, signals, link)
fit(..., begin=session.begin, after_call=session.after_call)
"""

import dataclasses
import math

from trainer import files
from trainer.config import TrainConfig
from trainer.distributed.collectives import Workers
from trainer.distributed.worker import Link
from trainer.models import optimizers
from trainer.reporting.progress import Watcher
from trainer.reporting.tensorboard import EpochEvents
from trainer.runtime import keras
from trainer.signals import Signals
from trainer.training.assembly import Assembly
from trainer.training.callback_state import CallbackState
from trainer.training.checkpoint import Checkpointer, Checkpoints
from trainer.training.position import Position
from trainer.training.resume import resume
from trainer.training.workload import Workload


class Session:
    """What a run does between the calls of its step: it resumes, reports, and saves."""

    def __init__(
        self,
        config: TrainConfig,
        workload: Workload,
        assembly: Assembly,
        watcher: Watcher,
        signals: Signals,
        link: Link | None,
    ) -> None:
        self.config = config
        self.workload = workload
        self.manifest = assembly.manifest
        self.watcher = watcher
        self.signals = signals
        self.link = link
        self.workers = Workers(assembly.strategy.strategy)
        self.ring = assembly.strategy.ring
        self.resumed = False
        self.first_sums = 0  # elements that the ring must have summed after the first call
        self.stopping: keras.callbacks.EarlyStopping | None = None
        if config.early_stopping:
            self.stopping = keras.callbacks.EarlyStopping(
                "val_loss", patience=config.early_stopping, restore_best_weights=True
            )
            self.stopping_state = CallbackState([self.stopping])
        self.checkpoints = Checkpoints(config.output_dir, keep=config.keep_checkpoints)
        self.checkpointer: Checkpointer | None = None

    @property
    def last_checkpoint(self) -> Position | None:
        """The position of the last checkpoint that this run has saved."""
        if self.checkpointer and self.checkpointer.count:
            return self.checkpointer.saved
        return None

    @property
    def checkpoint_age(self) -> float:
        """Seconds since the last checkpoint; NaN before the first."""
        if self.last_checkpoint is None or self.checkpointer is None:
            return math.nan
        return self.checkpointer.clock() - self.checkpointer.saved_at

    @property
    def best_epoch(self) -> int | None:
        """Number of the epoch, counted from 0, whose weights early stopping has kept."""
        return self.stopping.best_epoch if self.stopping else None

    def begin(self, model: keras.Model) -> Position:
        """Restores the unfinished run, if there is one."""
        self.checkpoints.track(model, extra=self.stopping_state.dumps if self.stopping else None)
        position, self.manifest = resume(
            self.checkpoints,
            model,
            self.manifest,
            policy=self.config.resume,
            finished_run=files.read_manifest(self.config.output_dir, self.workload.names).get(
                "run"
            ),
            workers=self.workers,
            notify=lambda text: self.watcher.say(text, "notice"),
        )
        self.checkpointer = Checkpointer(
            self.checkpoints,
            self.manifest,
            position,
            every=self.config.checkpoint_every,
            stop=lambda: self.signals.received,
            workers=self.workers,
        )
        self.resumed = position.steps > 0
        if self.stopping and position.steps:
            self.stopping_state.resume(self.checkpoints.extra.numpy(), position.epoch)
        if self.ring:
            parameters = sum(math.prod(weight.shape) for weight in model.trainable_weights)
            self.first_sums = self.ring.summed + parameters
        return dataclasses.replace(position)

    def callbacks(self) -> list[keras.callbacks.Callback]:
        """Returns the callbacks that the configuration asks for."""
        stopping: list[keras.callbacks.Callback] = []
        if self.stopping:  # Its state last: Keras resets the others where training begins.
            stopping = [keras.callbacks.History(), self.stopping, self.stopping_state]
        if not self.config.tensorboard or self.workers.index:
            return stopping
        return [
            *stopping,
            EpochEvents(
                self.config.output_dir,
                learning_rate=optimizers.learning_rate_by_epoch(
                    self.config, self.workload.train_examples
                ),
                before=lambda: self.checkpointer.saved.history if self.checkpointer else {},
            ),
        ]

    def after_call(self, position: Position) -> None:
        """Reports the step to the parent process, and saves a checkpoint if one is due."""
        self._report(position)
        self._check_ring()
        if self.checkpointer:  # Since begin.
            self.checkpointer.after_call(position)
        self._report(position)  # Saving to a slow disk is not a step that hangs.

    def _check_ring(self) -> None:
        """Reports once, after the first call of the step, if the gradients bypassed the ring."""
        if self.ring and self.ring.summed < self.first_sums:
            self.watcher.say(
                "The gradients are not summed by the ring of collectives='ring', but by "
                "TensorFlow's own collectives: the weights are right, the speed is theirs",
                "notice",
            )
        self.ring = None

    def _report(self, position: Position) -> None:
        if self.link:
            self.link.report_step(position.epoch + 1, position.step)
