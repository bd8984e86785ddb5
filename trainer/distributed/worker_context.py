"""What a script's worker process has before the script runs: the strategy that it shares with the
other workers, and the connection to its parent process.

    with entered(WorkerContext(cluster, choice, link, job=None)):
        runpy.run_path("train.py")      # in which trainer.fit calls current()

MultiWorkerMirroredStrategy must be constructed before TensorFlow's first operation, and a script
makes its model before it calls ``trainer.fit``.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.distributed.cluster import Cluster
    from trainer.distributed.strategy import StrategyChoice
    from trainer.distributed.worker import Link


@dataclasses.dataclass(frozen=True)
class WorkerContext:
    """What a worker process shares with the others.

    Attributes:
        cluster: All workers, and which this one is.
        choice: The strategy of all of them.
        link: To the parent process.
        job: UID of the Kubernetes Job whose pod this is; None outside one.
    """

    cluster: "Cluster"
    choice: "StrategyChoice"
    link: "Link"
    job: str | None


_current: WorkerContext | None = None


def current() -> WorkerContext | None:
    """Returns what this process shares with other workers; None where it is alone."""
    return _current


@contextlib.contextmanager
def entered(context: WorkerContext) -> Iterator[None]:
    """Has ``current`` return a context."""
    global _current
    _current = context
    try:
        yield
    finally:
        _current = None
