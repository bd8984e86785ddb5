"""What a person watches while a run goes on: a bar on a terminal or in a notebook, lines, JSON.

    with progress("auto", batch_size=128) as watcher:
        loop.fit(..., callbacks=[watcher])

Each watcher is a Keras callback and writes to stdout.
"""

import contextlib
import html
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console

from trainer.config import LogFormat
from trainer.errors import OutputError
from trainer.reporting.bar import Bar, means, span
from trainer.runtime import keras, tf

EVENTS_FOLDER = "tensorboard"
SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def progress(
    log_format: LogFormat,
    *,
    batch_size: int,
    chief: bool = True,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator["Watcher | Quiet"]:
    """Gives the watcher for this output, and leaves the terminal as it was at the end.

    Args:
        log_format: As ``TrainConfig.log_format``.
        batch_size: Images in a step, for images a second.
        chief: Whether this is the worker that speaks for all; the others say how they ended.
        stream: Where to write; None: stdout.
        clock: Seconds, monotonic.
    """
    stream = stream or sys.stdout
    if not chief:
        kind = JsonLines if log_format == "json" else PlainLines
        yield Quiet(kind(batch_size, stream, clock))
    elif log_format == "json":
        yield JsonLines(batch_size, stream, clock)
    elif log_format == "auto" and stream is sys.stdout and Console().is_jupyter:
        with Notebook(batch_size, stream, clock) as notebook:
            yield notebook
    elif log_format == "plain" or not Console(file=stream).is_terminal:
        yield PlainLines(batch_size, stream, clock)
    else:
        with Terminal(batch_size, stream, clock) as terminal:
            yield terminal


class Watcher(keras.callbacks.Callback):
    """Follows a run and says where it is; the subclasses say it in their own way.

    Args:
        batch_size: Images in a step.
        stream: Where to write.
        clock: Seconds, monotonic.
    """

    def __init__(self, batch_size: int, stream: TextIO, clock: Callable[[], float]) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.stream = stream
        self.clock = clock
        self.rate = None  # steps a second

    def say(self, text: str, event: str, **facts: object) -> None:
        """Says something about the run: a sentence to people, an event with facts to machines."""
        raise NotImplementedError

    def on_step(self, place: dict, logs: dict[str, float]) -> None:
        """Shows ``place``: epoch, epochs, step, steps (from 1), images_per_second, seconds_left."""
        raise NotImplementedError

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.epoch = epoch
        self.epoch_start = self.clock()
        self.first = None

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        step, steps, epochs = batch + 1, self.params["steps"], self.params["epochs"]
        now = self.clock()
        if self.first is None:
            # The first call of an epoch starts its pipeline, and that of a run compiles as well:
            # the rate is counted from its end, and until then it is that of the epoch before.
            self.first = (now, step)
            if self.rate is None:
                self.rate = step / max(now - self.epoch_start, 1e-9)
        else:
            start, first = self.first
            self.rate = (step - first) / max(now - start, 1e-9)
        rate = self.rate
        place = {
            "epoch": self.epoch + 1,
            "epochs": epochs,
            "step": step,
            "steps": steps,
            "images_per_second": round(rate * self.batch_size, 1),
            "seconds_left": round((steps * (epochs - self.epoch) - step) / rate, 1),
        }
        self.on_step(place, logs or {})

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        seconds = self.clock() - self.epoch_start
        self.say(
            f"epoch {epoch + 1}/{self.params['epochs']}  {means(logs)}  {span(seconds)}",
            "epoch",
            epoch=epoch + 1,
            epochs=self.params["epochs"],
            seconds=round(seconds, 3),
            **logs,
        )


class PlainLines(Watcher):
    """For a pipe or a pod's log: a line every ten seconds, and one an epoch."""

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.last = self.clock()

    def on_step(self, place: dict, logs: dict[str, float]) -> None:
        if self.clock() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = self.clock()
            self.say(
                _sentence(place, logs),
                "step",
                **place,
                **logs,
            )

    def say(self, text: str, event: str, **facts: object) -> None:
        self.write(text)

    def write(self, line: str) -> None:
        """Writes a line at once. A reader that has gone away does not end the training."""
        try:
            print(line, file=self.stream, flush=True)
        except BrokenPipeError:
            # What is still in the buffer would raise again when the process ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class JsonLines(PlainLines):
    """For programs: what ``PlainLines`` says, as JSON objects: ``event``, the sentence as
    ``message``, as clouds' log viewers show it, and the facts in it.
    """

    def say(self, text: str, event: str, **facts: object) -> None:
        self.write(json.dumps({"event": event, "message": text, **facts}))


class Quiet(keras.callbacks.Callback):
    """For a worker that does not speak for all: it says how it ended, and nothing before.

    Args:
        lines: How it says that.
    """

    def __init__(self, lines: PlainLines) -> None:
        super().__init__()
        self.lines = lines

    def say(self, text: str, event: str, **facts: object) -> None:
        """As ``Watcher.say``."""
        if event == "weights":
            self.lines.say(text, event, **facts)


class Terminal(Watcher):
    """For a terminal: a bar that fills with each epoch, under the lines of the epochs so far."""

    def __enter__(self) -> "Terminal":
        self.bar = Bar(self.stream)
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def on_step(self, place: dict, logs: dict[str, float]) -> None:
        self.bar.show(place, logs)

    def on_test_begin(self, logs: dict | None = None) -> None:
        self.bar.note("evaluating")

    def on_predict_begin(self, logs: dict | None = None) -> None:
        self.bar.note("drawing the report")

    def say(self, text: str, event: str, **facts: object) -> None:
        self.bar.say(text)


class Notebook(Watcher):
    """For a notebook: a bar that fills with each epoch, under the lines of the epochs so far. It is
    all one output, replaced as it changes, so that a notebook stores its last state alone.
    """

    def __enter__(self) -> "Notebook":
        from IPython.display import DisplayHandle

        self.lines: list[str] = []
        self.handle = DisplayHandle()
        self.handle.display(self._content("starting"), raw=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if exception == (None, None, None):  # Else it shows how far it came.
            self._show()

    def on_step(self, place: dict, logs: dict[str, float]) -> None:
        self._show(_sentence(place, logs), place["step"] / place["steps"])

    def on_test_begin(self, logs: dict | None = None) -> None:
        self._show("evaluating")

    def on_predict_begin(self, logs: dict | None = None) -> None:
        self._show("drawing the report")

    def say(self, text: str, event: str, **facts: object) -> None:
        self.lines.append(text)
        self._show()

    def _show(self, now: str = "", share: float | None = None) -> None:
        self.handle.update(self._content(now, share), raw=True)

    def _content(self, now: str, share: float | None = None) -> dict[str, str]:
        """Returns what is shown, by MIME type; ``share`` is how full the bar is, None: unknown."""
        value = "" if share is None else f' value="{share:.3f}"'
        bar = f"<progress{value}></progress>  {html.escape(now)}" if now else ""
        lines = "".join(f"{html.escape(line)}\n" for line in self.lines)
        return {
            "text/html": f"<pre>{lines}{bar}</pre>",
            "text/plain": "\n".join([*self.lines, now]).rstrip(),
        }


class Events(keras.callbacks.Callback):
    """For TensorBoard: event files with the scalars of each epoch, named as
    ``keras.callbacks.TensorBoard`` names them.

    That callback does not know what a resumed run did before, and needs the package tensorboard,
    which TensorFlow 2.21 installs no more and which only a reader needs. This one writes the files
    anew when it begins: first the epochs before, so that none is there twice, or missing.

    Args:
        output_dir: The run's; the files are in ``tensorboard/train`` and ``tensorboard/validation``
            there.
        learning_rate: Gives that at the end of an epoch, counted from 0.
        before: Gives the history of the epochs before, as ``loop.fit`` returns it.
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
            for path in self.folder.glob("*/events.out.tfevents.*"):
                path.unlink()
            self.writers = {
                name: tf.summary.create_file_writer(str(self.folder / name))
                for name in ("train", "validation")
            }
            history = {name: values for name, values in self.before().items() if name != "seconds"}
            for epoch, values in enumerate(zip(*history.values(), strict=True)):
                self._write(epoch, dict(zip(history, values, strict=True)))
            self._flush()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        with self._errors():
            self._write(epoch, logs)
            self._flush()

    def on_train_end(self, logs: dict | None = None) -> None:
        with self._errors():
            for writer in self.writers.values():
                writer.close()

    def _write(self, epoch: int, logs: Mapping[str, float]) -> None:
        # As tf.summary.scalar writes it, which calls the package tensorboard.
        kind = tf.compat.v1.SummaryMetadata(data_class="DATA_CLASS_SCALAR")
        kind.plugin_data.plugin_name = "scalars"
        for name, value in {**logs, "learning_rate": self.learning_rate(epoch)}.items():
            part = "validation" if name.startswith("val_") else "train"
            with self.writers[part].as_default():
                tf.summary.write(
                    f"epoch_{name.removeprefix('val_')}",
                    tf.constant(value, tf.float32),
                    step=epoch,
                    metadata=kind,
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
                "or permission there, or leave out --tensorboard."
            ) from error


def _sentence(place: dict, logs: dict[str, float]) -> str:
    return (
        f"epoch {place['epoch']}/{place['epochs']}  "
        f"step {place['step']}/{place['steps']}  {means(logs)}  "
        f"{place['images_per_second']:,.0f} images/s  {span(place['seconds_left'])} left"
    )
