"""Shows the progress of a run: as a bar, lines of text, or JSON.

    with progress("auto", batch_size=128) as watcher:
        loop.fit(..., callbacks=[watcher])

Each watcher is a Keras callback that writes to stdout.
"""

import contextlib
import html
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO, cast

from rich.console import Console

from trainer.config import LogFormat
from trainer.log_lines import DroppingStream, Severity, json_line
from trainer.reporting.bar import Bar, format_duration, format_metrics, format_progress
from trainer.runtime import keras

SECONDS_BETWEEN_LINES = 10.0
SEVERITIES: dict[str, Severity] = {"notice": "WARNING", "error": "ERROR"}  # INFO for other events


@contextlib.contextmanager
def progress(
    log_format: LogFormat,
    *,
    batch_size: int,
    worker: int = 0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
    wall_clock: Callable[[], float] = time.time,
) -> Iterator["Watcher | Quiet"]:
    """Yields the watcher for a log format, and restores the terminal at the end.

    Args:
        log_format: As in ``TrainConfig.log_format``.
        batch_size: Images per step, for the number of images a second.
        worker: Index of this worker. Worker 0, the chief, reports for all; the others write only
            how they ended.
        stream: Where to write; None means stdout. What it cannot take is dropped.
        clock: Monotonic time in seconds, for rates and durations.
        wall_clock: Unix time in seconds, for the timestamps of JSON lines.
    """
    to_stdout = stream is None
    stream = cast("TextIO", DroppingStream(stream or sys.stdout, "stdout"))
    if log_format == "json":
        lines = JsonLines(batch_size, stream, clock, worker=worker, wall_clock=wall_clock)
    else:
        lines = PlainLines(batch_size, stream, clock)
    if worker:
        yield Quiet(lines)
    elif log_format == "auto" and to_stdout and Console().is_jupyter:
        with Notebook(batch_size, stream, clock) as notebook:
            yield notebook
    elif log_format == "auto" and Console(file=stream).is_terminal:
        with Terminal(batch_size, stream, clock) as terminal:
            yield terminal
    else:
        yield lines


class Watcher(keras.callbacks.Callback):
    """Computes rate and remaining time at each step; a subclass shows them.

    Args:
        batch_size: Images per step.
        stream: Where to write.
        clock: Monotonic time in seconds.
    """

    def __init__(self, batch_size: int, stream: TextIO, clock: Callable[[], float]) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.stream = stream
        self.clock = clock
        self.rate: float | None = None  # steps a second

    def say(self, message: str, event: str, **fields: object) -> None:
        """Reports an event.

        Args:
            message: What people read.
            event: Its kind, for programs: ``start``, ``strategy``, ``epoch``, ``notice``, ``done``.
            fields: The values in the message, for programs.
        """
        raise NotImplementedError

    def on_step(self, position: dict, metrics: dict[str, float]) -> None:
        """Shows how far the run is.

        Args:
            position: ``epoch`` of ``epochs`` and ``step`` of ``steps``, both counted from 1,
                ``images_per_second``, and ``seconds_left`` of the whole run.
            metrics: Means over the epoch so far, by name.
        """
        raise NotImplementedError

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.epoch = epoch
        self.epoch_start = self.clock()
        self.first: tuple[float, int] | None = None  # clock and step where the rate begins

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        step, steps, epochs = batch + 1, self.params["steps"], self.params["epochs"]
        now = self.clock()
        if self.first is None:
            # The first call of an epoch starts the input pipeline, and that of the run compiles
            # the step, too: the rate is measured from its end. Until then, that of the previous
            # epoch is shown.
            self.first = (now, step)
            if self.rate is None:
                self.rate = step / max(now - self.epoch_start, 1e-9)
        else:
            start, first = self.first
            self.rate = (step - first) / max(now - start, 1e-9)
        rate = self.rate
        position = {
            "epoch": self.epoch + 1,
            "epochs": epochs,
            "step": step,
            "steps": steps,
            "images_per_second": round(rate * self.batch_size, 1),
            "seconds_left": round((steps * (epochs - self.epoch) - step) / rate, 1),
        }
        self.on_step(position, logs or {})

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        seconds = self.clock() - self.epoch_start
        duration = format_duration(seconds)
        self.say(
            f"epoch {epoch + 1}/{self.params['epochs']}  {format_metrics(logs)}  {duration}",
            "epoch",
            epoch=epoch + 1,
            epochs=self.params["epochs"],
            seconds=round(seconds, 3),
            **logs,
        )


class PlainLines(Watcher):
    """For a pipe or the log of a pod: a line every ten seconds and one per epoch."""

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.last = self.clock()

    def on_step(self, position: dict, metrics: dict[str, float]) -> None:
        if self.clock() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = self.clock()
            self.say(_sentence(position, metrics), "step", **position, **metrics)

    def say(self, message: str, event: str, **fields: object) -> None:
        self.write(message)

    def write(self, line: str) -> None:
        """Writes a line and flushes it."""
        print(line, file=self.stream, flush=True)


class JsonLines(PlainLines):
    """For log collectors and programs: the events of ``PlainLines`` as ``json_line`` has them.

    Args:
        batch_size: Images per step.
        stream: Where to write.
        clock: Monotonic time in seconds.
        worker: Index of this worker.
        wall_clock: Unix time in seconds.
    """

    def __init__(
        self,
        batch_size: int,
        stream: TextIO,
        clock: Callable[[], float],
        *,
        worker: int,
        wall_clock: Callable[[], float],
    ) -> None:
        super().__init__(batch_size, stream, clock)
        self.worker = worker
        self.wall_clock = wall_clock

    def say(self, message: str, event: str, **fields: object) -> None:
        self.write(
            json_line(
                event,
                message,
                severity=SEVERITIES.get(event, "INFO"),
                worker=self.worker,
                clock=self.wall_clock,
                **fields,
            )
        )


class Quiet(keras.callbacks.Callback):
    """For the workers other than the chief, which reports for all: only how this one ended.

    Args:
        lines: Writes that.
    """

    def __init__(self, lines: PlainLines) -> None:
        super().__init__()
        self.lines = lines

    def say(self, message: str, event: str, **fields: object) -> None:
        """As ``Watcher.say``."""
        if event == "weights":
            self.lines.say(message, event, **fields)


class Terminal(Watcher):
    """For a terminal: a progress bar for the current epoch, below a line for each one before."""

    def __enter__(self) -> "Terminal":
        self.bar = Bar(self.stream)
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def on_step(self, position: dict, metrics: dict[str, float]) -> None:
        self.bar.show(position, metrics)

    def on_test_begin(self, logs: dict | None = None) -> None:
        self.bar.set_status("evaluating")

    def on_predict_begin(self, logs: dict | None = None) -> None:
        self.bar.set_status("drawing the report")

    def say(self, message: str, event: str, **fields: object) -> None:
        self.bar.say(message)


class Notebook(Watcher):
    """For a notebook: as ``Terminal``, in one output cell that is replaced as it changes, so that
    a saved notebook holds its last state alone.
    """

    def __enter__(self) -> "Notebook":
        from IPython.display import DisplayHandle

        self.lines: list[str] = []
        self.handle = DisplayHandle()
        self.handle.display(self._content("starting"), raw=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if exception == (None, None, None):  # After an error the bar stays where it was.
            self._show()

    def on_step(self, position: dict, metrics: dict[str, float]) -> None:
        self._show(_sentence(position, metrics), position["step"] / position["steps"])

    def on_test_begin(self, logs: dict | None = None) -> None:
        self._show("evaluating")

    def on_predict_begin(self, logs: dict | None = None) -> None:
        self._show("drawing the report")

    def say(self, message: str, event: str, **fields: object) -> None:
        self.lines.append(message)
        self._show()

    def _show(self, status: str = "", fraction: float | None = None) -> None:
        self.handle.update(self._content(status, fraction), raw=True)

    def _content(self, status: str, fraction: float | None = None) -> dict[str, str]:
        """Returns the output by MIME type; ``fraction`` None is an indeterminate bar."""
        value = "" if fraction is None else f' value="{fraction:.3f}"'
        bar = f"<progress{value}></progress>  {html.escape(status)}" if status else ""
        lines = "".join(f"{html.escape(line)}\n" for line in self.lines)
        return {
            "text/html": f"<pre>{lines}{bar}</pre>",
            "text/plain": "\n".join([*self.lines, status]).rstrip(),
        }


def _sentence(position: dict, metrics: dict[str, float]) -> str:
    return (
        f"epoch {position['epoch']}/{position['epochs']}  "
        f"step {position['step']}/{position['steps']}  {format_progress(position, metrics)}"
    )
