"""Event files for TensorBoard, written without the package tensorboard.

    loop.fit(..., callbacks=[EpochEvents(folder, learning_rate=rate, before=lambda: history)])

``tensorboard --logdir OUTPUT_DIR/tensorboard`` shows them.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from trainer.errors import OutputError
from trainer.files import MARK
from trainer.runtime import keras, tf

EVENTS_FOLDER = "tensorboard"
# The end of the event files' names, by which a run knows those that it may replace.
SUFFIX = f".{MARK}.v2"


class EpochEvents(keras.callbacks.Callback):
    """Writes the scalars of each epoch, with the tags of ``keras.callbacks.TensorBoard``.

    That callback does not know the epochs before a resume, and needs the package tensorboard, which
    TensorFlow 2.21 no longer installs and which only a reader of the files needs. When training
    begins, this one replaces its own event files, and writes the epochs before the resume first, so
    that none is there twice or missing.

    Args:
        output_dir: The run's output folder; the files are in ``tensorboard/train`` and
            ``tensorboard/validation`` there.
        learning_rate: Returns the learning rate at the end of an epoch, counted from 0.
        before: Returns the history of the epochs before this call, as ``loop.fit`` returns it.

    Raises:
        OutputError: From a callback, where an event file cannot be written.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        learning_rate: Callable[[int], float],
        before: Callable[[], Mapping[str, Sequence[float]]],
    ) -> None:
        super().__init__()
        self.folder = output_dir / EVENTS_FOLDER
        self.learning_rate = learning_rate
        self.before = before

    def on_train_begin(self, logs: dict | None = None) -> None:
        with self._errors():
            for path in self.folder.glob(f"*/events.out.tfevents.*{SUFFIX}"):
                path.unlink()
            self.writers = {
                name: tf.summary.create_file_writer(
                    os.fsencode(self.folder / name), filename_suffix=SUFFIX
                )
                for name in ("train", "validation")
            }
            history = {name: values for name, values in self.before().items() if name != "seconds"}
            for epoch, values in enumerate(zip(*history.values(), strict=True)):
                self._write(epoch, dict(zip(history, values, strict=True)))
            self._flush()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float]) -> None:
        with self._errors():
            self._write(epoch, logs)
            self._flush()

    def on_train_end(self, logs: dict | None = None) -> None:
        with self._errors():
            for writer in self.writers.values():
                writer.close()

    def _write(self, epoch: int, logs: Mapping[str, float]) -> None:
        # What tf.summary.scalar writes, which calls the package tensorboard.
        metadata = tf.compat.v1.SummaryMetadata(data_class="DATA_CLASS_SCALAR")
        metadata.plugin_data.plugin_name = "scalars"
        for name, value in {**logs, "learning_rate": self.learning_rate(epoch)}.items():
            part = "validation" if name.startswith("val_") else "train"
            with self.writers[part].as_default():
                tf.summary.write(
                    f"epoch_{name.removeprefix('val_')}",
                    tf.constant(value, tf.float32),
                    step=epoch,
                    metadata=metadata,
                )

    def _flush(self) -> None:
        for writer in self.writers.values():
            writer.flush()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, tf.errors.OpError) as error:
            reason = " ".join(str(error).split())[:300]
            raise OutputError(
                f"Expected to write event files in {self.folder}. Received: {reason}. Make room "
                "or permission there, or use tensorboard=False."
            ) from error
