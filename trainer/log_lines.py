"""One line of a structured log, as Cloud Logging and other collectors read it from a container.

    json_line("epoch", "epoch 1/2  loss 0.2", worker=0, epoch=1, loss=0.2)
    # {"time": "2026-01-01T12:00:00.000Z", "severity": "INFO", "worker": 0, "event": "epoch",
    #  "message": "epoch 1/2  loss 0.2", "epoch": 1, "loss": 0.2}

Every line of ``--log-format json`` is made here: those of ``trainer.reporting.progress``, and the
error in which a command ends.
"""

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

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
