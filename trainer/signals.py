"""Deferred handling of the signals that ask a run to stop, for a loop that checks for them between
two steps: SIGINT (Ctrl-C), SIGTERM, and SIGHUP (the terminal is gone).
"""

import signal
import threading
from types import FrameType

TERMINATING = ("SIGTERM", "SIGHUP")  # Not from the terminal: the run is to be resumed.


class Signals:
    """Records the signals that ask a run to stop, so that a loop can check for them.

    Before ``defer()`` the first ends the program at once, as a ``KeyboardInterrupt`` with the name
    of the signal: then there is nothing to lose. Afterwards the first is only remembered, because
    an exception in the middle of TensorFlow's tracing comes out as another one; a second one ends
    the program at once. Those that follow change nothing: an exception raised while another one is
    handled would hide how the program ends. Outside the main thread, which signals do not reach, it
    does nothing.

        with Signals() as signals:
            signals.defer()
            while not signals.received: ...

    Args:
        until_exit: The process exits after the ``with`` block: signals are ignored from then on,
            and cannot end it with another exit code. Else their handlers are as before.
    """

    received: str | None = None

    def __init__(self, *, until_exit: bool = False) -> None:
        self.until_exit = until_exit

    def __enter__(self) -> "Signals":
        self.deferred = False
        self.ending = False
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in stop_signals():
                self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self.ignore()
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if self.until_exit else handler)

    def defer(self) -> None:
        """From now on the first signal is only remembered, in ``received``."""
        self.deferred = True
        self.handle_again()

    def handle_again(self) -> None:
        """Puts the handlers in place once more, because TensorFlow's cluster of several workers has
        put one of its own in place of SIGTERM's (SigtermNotifier in TensorFlow 2.21).
        """
        for number in self.before:
            signal.signal(number, self._receive)

    def ignore(self) -> None:
        """From now on signals change nothing: how the program ends is decided."""
        self.ending = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.ending:
            return
        name, first = signal.Signals(number).name, not self.received
        self.received = self.received or name
        if self.deferred and first:
            return
        self.ending = True
        raise KeyboardInterrupt(name)


def stop_signals() -> list[signal.Signals]:
    """Returns the signals that ask a run to stop. SIGHUP is none of them where it is ignored, as
    under ``nohup``, or does not exist, as on Windows.
    """
    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    return [
        number
        for number in numbers
        if number and not (number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN)
    ]
