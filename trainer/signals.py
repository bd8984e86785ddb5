"""Deferred handling of SIGINT (Ctrl-C) and SIGTERM, for a loop that checks between two steps."""

import signal
import threading
from types import FrameType


class Signals:
    """Records SIGINT (Ctrl-C) and SIGTERM, so that a loop can check for them between two steps.

    Before ``defer()`` each ends the program at once, as a ``KeyboardInterrupt``: then there is
    nothing to lose. Afterwards the first is only remembered, because an exception in the middle
    of TensorFlow's tracing comes out as another one; a second one ends the program at once.
    Outside the main thread, which signals do not reach, it does nothing.

        with Signals() as signals:
            signals.defer()
            while not signals.received: ...
    """

    received: str | None = None

    def __enter__(self) -> "Signals":
        self.deferred = False
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on the first signal is only remembered, in ``received``."""
        self.deferred = True
        for number in self.before:
            # Once more, because TensorFlow's cluster of several workers has put a handler of its
            # own in place of SIGTERM's (SigtermNotifier in TensorFlow 2.21).
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.deferred or self.received:
            raise KeyboardInterrupt(signal.Signals(number).name)
        self.received = signal.Signals(number).name
