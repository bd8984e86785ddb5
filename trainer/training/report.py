"""Draws report.html and curves.png of a run that has ended, and keeps it from failing.

    augmented = augmented_images(config, workload)      # while the workload has its training data
    report = Report(config, workload, model, replicas, stopped, watcher, augmented)
    report.draw(manifest, history)

The model is saved before that, so whatever goes wrong here is a notice and no error.
"""

import contextlib
import functools
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trainer.config import TrainConfig
from trainer.errors import StoppedError, TrainerError
from trainer.files import CURVES_FILE, PAGE_FILE, REPORT_FILES, remove_files, write_files
from trainer.reporting import charts, html
from trainer.runtime import keras, release_memory
from trainer.training.workload import Predictions, Workload

if TYPE_CHECKING:
    from trainer.reporting.progress import Watcher


class Report:
    """The report of a run.

    Args:
        config: The run's; its output folder is locked.
        workload: What it has trained.
        model: The trained model.
        replicas: Number of replicas that a batch was split among.
        stopped: Returns the name of the signal that was received, None before that.
        watcher: Shows the progress of the run, and the notice.
        augmented: What ``augmented_images`` has returned.
    """

    def __init__(
        self,
        config: TrainConfig,
        workload: Workload,
        model: keras.Model,
        replicas: int,
        stopped: Callable[[], str | None],
        watcher: "Watcher",
        augmented: Sequence[np.ndarray] = (),
    ) -> None:
        self.config = config
        self.workload = workload
        self.model = model
        self.batch_size = config.batch_size // replicas
        self.stopped = stopped
        self.watcher = watcher
        self.augmented = augmented

    def draw(self, manifest: dict, history: Mapping[str, Sequence[float]]) -> None:
        """Draws the report of a run whose model is saved, or removes that of an earlier run.

        A failure or a signal ends the drawing with a notice and changes no exit code: that is about
        the model, which is complete.

        Args:
            manifest: As ``mnist.json`` has it.
            history: As ``history.json`` has it.
        """
        try:
            # An earlier run's would be taken for this one's.
            remove_files(self.config.output_dir, REPORT_FILES)
            if not self.config.report:
                return
            self.watcher.on_predict_begin()
            self._check_stopped()
            report = self._render(manifest, history)
            files = {PAGE_FILE: report.page, CURVES_FILE: report.curves}
            write_files(self.config.output_dir, files)
        except (Exception, KeyboardInterrupt) as error:
            reason = f"stopped by {self.stopped()}" if self.stopped() else _reason(error)
            self.watcher.say(
                f"No {PAGE_FILE}: {reason.rstrip('.')}. {self.workload.names.model} is complete.",
                "notice",
            )

    @functools.cached_property
    def predictions(self) -> Predictions:
        """What the model predicts for the images that judge it."""
        release_memory()
        # A copy outside the strategy's scope: under the strategy every call needs all workers.
        copy = self.model
        if self.workload.names.model.endswith(".h5"):
            copy = keras.models.clone_model(self.model)
            copy.set_weights(self.model.get_weights())
        predicted = self.workload.predictions(
            copy,
            batch_size=self.batch_size,
            after_batch=self._check_stopped,
        )
        del copy
        release_memory()
        return predicted

    def _render(self, manifest: dict, history: Mapping[str, Sequence[float]]) -> html.Report:
        predicted = self.predictions
        return html.render(
            manifest,
            history,
            images=predicted.images,
            labels=predicted.labels,
            probabilities=predicted.probabilities,
            classes=predicted.classes,
            augmented=self.augmented,
            after_picture=self._check_stopped,
        )

    def _check_stopped(self) -> None:
        if signal := self.stopped():
            raise StoppedError(f"stopped by {signal}")


def augmented_images(config: TrainConfig, workload: Workload) -> list[np.ndarray]:
    """Returns some training images as the augmentation makes them, as small as they are drawn; none
    where they are not drawn, or cannot be read.
    """
    if not config.report:
        return []
    small = []
    with contextlib.suppress(Exception):  # The training has read them: it is for it to complain.
        for image in workload.augmented(charts.AUGMENTED):
            every = max(1, max(image.shape[:2]) // charts.PIXELS)
            small.append(image[::every, ::every].copy())
    return small


def _reason(error: BaseException) -> str:
    reason = " ".join(str(error).split())
    if isinstance(error, TrainerError):
        return reason
    if isinstance(error, ImportError):
        return f"{reason} (pip install matplotlib)"
    where = traceback.extract_tb(error.__traceback__)[-1]  # A bug: where it is, at least.
    return f"{type(error).__name__}: {reason} ({where.filename}, line {where.lineno})"
