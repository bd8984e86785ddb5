"""What a person watches while a run goes on: a bar on a terminal, lines in a log, JSON.

    with progress("auto", batch_size=128) as watcher:
        loop.fit(..., callbacks=[watcher])

Each watcher is a Keras callback and writes to stdout.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console

from trainer.bar import Bar, means, span
from trainer.config import LogFormat
from trainer.runtime import keras

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
                f"epoch {place['epoch']}/{place['epochs']}  "
                f"step {place['step']}/{place['steps']}  {means(logs)}  "
                f"{place['images_per_second']:,.0f} images/s  {span(place['seconds_left'])} left",
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

    def say(self, text: str, event: str, **facts: object) -> None:
        self.bar.say(text)
