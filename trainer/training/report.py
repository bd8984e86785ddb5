"""Draws the report of a finished run: ``report.html`` and ``curves.png``.

    report.draw(config, model, manifest, history, images=x_test, labels=y_test, ...)

The model is saved before that, so whatever goes wrong here is a notice and no error.
"""

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trainer.config import TrainConfig
from trainer.errors import StoppedError, TrainerError
from trainer.files import (
    CURVES_FILE,
    MODEL_FILE,
    PAGE_FILE,
    REPORT_FILES,
    remove_files,
    write_files,
)
from trainer.models import cnn
from trainer.reporting import html
from trainer.runtime import keras, release_memory

if TYPE_CHECKING:
    from trainer.reporting.progress import Watcher


def draw(
    config: TrainConfig,
    model: keras.Model,
    manifest: dict,
    history: Mapping[str, Sequence[float]],
    *,
    images: np.ndarray,
    labels: np.ndarray,
    stopped: Callable[[], str | None],
    watcher: "Watcher",
) -> None:
    """Draws the report of a run whose model is saved, or removes that of an earlier run.

    A failure or a signal ends the drawing with a notice and changes no exit code: that is about
    the model, which is complete.

    Args:
        config: The run's; its output folder is locked.
        model: The trained model.
        manifest: As ``mnist.json`` has it.
        history: As ``history.json`` has it.
        images: The test images, uint8 (n, 28, 28).
        labels: Their digits, integers (n,).
        stopped: Returns the name of the signal that was received, None before that.
        watcher: Shows the progress of the run, and the notice.
    """

    def check_stopped() -> None:
        if signal := stopped():
            raise StoppedError(f"stopped by {signal}")

    try:
        # An earlier run's would be taken for this one's.
        remove_files(config.output_dir, REPORT_FILES)
        if not config.report:
            return
        watcher.on_predict_begin()
        check_stopped()
        report = _render(config, model, manifest, history, images, labels, check_stopped)
        files = {PAGE_FILE: report.page, CURVES_FILE: report.curves}
        write_files(config.output_dir, files)
    except (Exception, KeyboardInterrupt) as error:
        reason = f"stopped by {stopped()}" if stopped() else _reason(error)
        watcher.say(
            f"No {PAGE_FILE}: {reason.rstrip('.')}. {MODEL_FILE} is complete.",
            "notice",
        )


def _render(
    config: TrainConfig,
    model: keras.Model,
    manifest: dict,
    history: Mapping[str, Sequence[float]],
    images: np.ndarray,
    labels: np.ndarray,
    check_stopped: Callable[[], None],
) -> html.Report:
    release_memory()
    # A copy outside the strategy's scope: under the strategy every call needs all workers.
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    probabilities = cnn.probabilities(
        copy,
        images,
        batch_size=config.batch_size // manifest["environment"]["replicas"],
        after_batch=check_stopped,
    )
    del copy
    release_memory()
    return html.render(
        manifest,
        history,
        images=images,
        labels=labels,
        probabilities=probabilities,
        after_picture=check_stopped,
    )


def _reason(error: BaseException) -> str:
    reason = " ".join(str(error).split())
    if isinstance(error, TrainerError):
        return reason
    if isinstance(error, ImportError):
        return f"{reason} (pip install matplotlib)"
    where = traceback.extract_tb(error.__traceback__)[-1]  # A bug: where it is, at least.
    return f"{type(error).__name__}: {reason} ({where.filename}, line {where.lineno})"
