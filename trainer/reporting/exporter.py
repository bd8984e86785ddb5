"""A Keras callback that keeps the metrics of a run up to date.

loop.fit(..., callbacks=[Exporter(metrics, batch_size=128)])
"""

import sys
from collections.abc import Callable

from trainer.reporting.metrics import Metrics
from trainer.reporting.progress import Watcher


class Exporter(Watcher):
    """Writes to ``Metrics`` what other watchers show.

    Args:
        metrics: Those that are served.
        batch_size: Examples per step, over all replicas.
        examples: Examples in an epoch.
        clock: Monotonic time in seconds.
    """

    def __init__(
        self, metrics: Metrics, batch_size: int, examples: int, clock: Callable[[], float]
    ) -> None:
        super().__init__(batch_size, sys.stdout, clock)
        self.metrics = metrics
        self.examples = examples
        self.steps = 0  # of the epoch that are counted

    def on_train_begin(self, logs: dict | None = None) -> None:
        self.metrics.progress()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        super().on_epoch_begin(epoch, logs)
        self.metrics.progress()
        self.steps = 0

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self.steps = max(self.steps, batch)  # A resumed epoch begins in its middle.

    def on_step(self, position: dict, metrics: dict[str, float]) -> None:
        before, self.steps = self.steps, position["step"]
        self.metrics.progress()
        self.metrics.steps.inc(self.steps - before)
        self.metrics.examples.inc(self._examples(self.steps) - self._examples(before))
        self.metrics.step(position, metrics)

    def _examples(self, steps: int) -> int:
        """Returns the number of examples in the first steps of an epoch, which may end in fewer."""
        return min(steps * self.batch_size, self.examples)

    def on_test_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.metrics.progress()

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self.metrics.progress()
        self.metrics.values(logs)

    def on_train_end(self, logs: dict | None = None) -> None:
        self.metrics.unwatch()

    def say(self, message: str, event: str, **fields: object) -> None:
        """Nothing: other watchers do."""
