"""Lines of a log: as collectors read them from a container, and to an output that may fail.

    json_line("epoch", "epoch 1/2  loss 0.2", worker=0, epoch=1, loss=0.2)
    # {"time": "2026-01-01T12:00:00.000Z", "severity": "INFO", "worker": 0, "event": "epoch",
    #  "message": "epoch 1/2  loss 0.2", "epoch": 1, "loss": 0.2}

Every line of ``--log-format json`` is made here: those of ``trainer.reporting.progress``, and the
error in which a command ends.

    print("epoch 1/2", file=DroppingStream(sys.stdout), flush=True)   # on a full disk, too
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

Severity = Literal["INFO", "WARNING", "ERROR"]


def json_line(
    event: str,
    message: str,
    *,
    severity: Severity = "INFO",
    worker: int = 0,
    clock: Callable[[], float] = time.time,
    **fields: object,
) -> str:
    """Formats one log entry as a JSON object on one line, without the newline.

    Args:
        event: What kind of entry it is, for programs: ``step``, ``epoch``, ``notice``, ``error``.
        message: The same for people.
        severity: As Cloud Logging's LogSeverity has it, see
            https://cloud.google.com/logging/docs/structured-logging.
        worker: Index of the worker that writes it; 0 where there is only one.
        clock: Seconds since the epoch of Unix.
        **fields: What else belongs to the entry, as ``json.dumps`` takes it.

    >>> json_line("notice", "slow", severity="WARNING", worker=1, clock=lambda: 0.25, step=3)
    '{"time": "1970-01-01T00:00:00.250Z", "severity": "WARNING", "worker": 1, "event": "notice", \
"message": "slow", "step": 3}'
    """
    moment = datetime.fromtimestamp(clock(), UTC).isoformat(timespec="milliseconds")
    entry = {
        "time": moment.replace("+00:00", "Z"),
        "severity": severity,
        "worker": worker,
        "event": event,
        "message": message,
    }
    return json.dumps(entry | fields)


class DroppingStream:
    """A text stream to which writing never fails: what the one below cannot take is dropped, so
    that a full disk, a closed pipe or a lost terminal under a log ends no training. When there is
    room again, it goes on.

    Args:
        stream: Where to write; None, as Python has it for a closed descriptor: nowhere.
        name: Its name in the line about the first failure that stderr gets; None: no line.
    """

    def __init__(self, stream: TextIO | None, name: str | None = None) -> None:
        self.stream = stream
        self.name = name
        self.stderr = sys.stderr  # A progress bar may show in its own lines what is printed later.

    def write(self, text: str) -> int:
        """Writes, or drops, a text; returns its length."""
        if self.stream:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:  # A file name may be valid in no encoding.
                encoding = self.stream.encoding
                self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:  # ValueError: it was closed in this process.
                self._drop(self.stream, error)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        if self.stream:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._drop(self.stream, error)

    def isatty(self) -> bool:
        """Tells whether it is a terminal."""
        return self.stream is not None and self.stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _drop(self, stream: TextIO, error: Exception) -> None:
        with contextlib.suppress(OSError, ValueError):
            _discard_buffer(stream)
        name, self.name = self.name, None
        if name:
            reason = getattr(error, "strerror", None) or error
            line = f"{name} cannot be written ({reason}): what it cannot take is dropped"
            print(line, file=DroppingStream(self.stderr), flush=True)


def _discard_buffer(stream: TextIO) -> None:
    """Empties the buffer of a stream that cannot be written, which would fail again with whatever
    is written next, and when Python exits (with 120 for an exit code).
    """
    descriptor = stream.fileno()
    kept, null = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, descriptor)
        stream.flush()
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
        os.close(null)
