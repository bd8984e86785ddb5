"""The process that trains as the child of one that watches it, and what the two tell each other.

    child = Child([sys.executable, "-m", "trainer.task", *flags])      # in the parent, by asyncio
    await child.connect()
    async for message in child.messages(): ...

    Link.find(os.environ).run(lambda: train(...))                      # in the child, with threads

TensorFlow waits for another worker inside C++, at its start even with Python's lock held, so that
no handler and no thread of that process runs. What must never wait is therefore the parent's, which
loads no TensorFlow (``trainer.distributed.supervisor``).

Each message is a line of JSON, on a pair of sockets:

    to the parent  {"ready": facts}, {"connected": 1}, {"trained": 1}, {"ended": [code, text, kind]}
    to the child   {"go": 1}
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Literal, NamedTuple, NoReturn

from trainer.cli import INTERRUPTED
from trainer.distributed.messages import encode, receive, send
from trainer.errors import StoppedError, TrainerError

_VARIABLE = "TRAINER_PARENT_FD"  # The file descriptor by which a child finds its parent.


class Outcome(NamedTuple):
    """How a child ended.

    Attributes:
        code: Its exit code, as a shell reports it.
        text: Why, in a sentence or the end of one.
        kind: ``named``: as it should, or by an error that it names; ``lost``: killed or stopped,
            which is a reason of its own; ``unclear``: in a way that the loss of another worker
            can have caused.
    """

    code: int
    text: str
    kind: Literal["named", "lost", "unclear"]


class PeerError(StoppedError):
    """What TensorFlow raises where the loss of another worker is the likely cause."""


class Link:
    """A child's end of the connection to its parent, with which it ends, whatever it waits for."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.may_go = threading.Event()
        threading.Thread(target=self._follow, daemon=True).start()

    @classmethod
    def find(cls, environ: Mapping[str, str]) -> "Link | None":
        """Returns the connection to the parent; None where there is no parent."""
        if _VARIABLE not in environ:
            return None
        return cls(socket.socket(fileno=int(environ[_VARIABLE])))

    def run(self, function: Callable[[], object]) -> NoReturn:
        """Calls the function, tells the parent how it ended, and waits to be ended by it.

        The others fetch from this process what all have reduced together: it must not be gone
        before they have it.
        """
        try:
            function()
            outcome = Outcome(0, "", "named")
        except PeerError as error:
            outcome = Outcome(error.exit_code, str(error), "unclear")
        except TrainerError as error:
            outcome = Outcome(error.exit_code, str(error), "named")
        except KeyboardInterrupt as interrupt:
            outcome = Outcome(INTERRUPTED, str(interrupt), "named")
        except BaseException:
            traceback.print_exc()
            outcome = Outcome(1, "a defect of the program, shown above", "unclear")
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            self._send(ended=outcome)
        while True:
            signal.pause()

    def meet(self, facts: dict) -> None:
        """Says what this worker is about to train, and waits until all have come and agree.

        Args:
            facts: By name, whatever must be equal on all workers.
        """
        self._send(ready=facts)
        self.may_go.wait()

    def tell(self, event: Literal["connected", "trained"]) -> None:
        """Says how far it is: connected to the other workers, or through with the training."""
        self._send(**{event: 1})

    def _send(self, **message: object) -> None:
        self.connection.sendall(encode(message))

    def _follow(self) -> None:
        for _ in self.connection.makefile("r", encoding="utf-8"):
            self.may_go.set()  # There is one message only.
        os._exit(StoppedError.exit_code)


class Child:
    """A parent's end: starts the process, and ends it with this one.

    Args:
        command: What to start; it finds its end by ``Link.find``.

    Attributes:
        outcome: How it ended; None while it runs.
    """

    outcome: Outcome | None = None

    def __init__(self, command: Sequence[str]) -> None:
        self.connection, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, _VARIABLE: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # The terminal's Ctrl-C is for the parent alone.
                preexec_fn=die_with_parent,
            )

    async def connect(self) -> None:
        """Opens the connection."""
        self.reader, self.writer = await asyncio.open_connection(sock=self.connection)

    async def messages(self) -> AsyncIterator[dict]:
        """Yields what the child says, until ``outcome`` is known: it has said so, or is gone."""
        while message := await receive(self.reader):
            if "ended" in message:
                self.outcome = self.outcome or Outcome(*message["ended"])
                return
            yield message
        self.process.wait()
        self.outcome = self.outcome or _explain(self.process.returncode)

    def go(self) -> None:
        """Lets it connect to the other workers."""
        send(self.writer, go=1)

    def signal(self, number: signal.Signals) -> None:
        """Passes a signal on."""
        self.process.send_signal(number)  # Not to one that has ended: Python looks first.

    def is_stopped(self) -> bool:
        """Tells whether it is stopped (SIGSTOP), where the system tells."""
        if self.outcome or not hasattr(os, "waitid"):  # macOS has it from Python 3.13 on.
            return False
        with contextlib.suppress(ChildProcessError):
            options = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self.process.pid, options) is not None
        return False

    def kill(self, outcome: Outcome) -> None:
        """Ends it, whatever it does; ``outcome`` says why, unless it has said so itself."""
        self.outcome = self.outcome or outcome
        self.process.kill()

    def close(self) -> None:
        """Ends it, and waits for that."""
        self.process.kill()
        self.process.wait()
        self.writer.close()


def die_with_parent() -> None:
    """Has Linux kill this process when its parent is gone, however that ended
    (prctl PR_SET_PDEATHSIG); elsewhere it does nothing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _explain(returncode: int) -> Outcome:
    """Returns how a child ended that said nothing."""
    if returncode >= 0:
        text = f"it ended without a word, with exit code {returncode}"
        return Outcome(returncode or 1, text, "unclear")
    number = signal.Signals(-returncode)
    # TensorFlow ends itself by other signals when a worker is gone (SIGABRT).
    kind = "lost" if number == signal.SIGKILL else "unclear"
    return Outcome(128 + number, f"killed by {number.name}", kind)
