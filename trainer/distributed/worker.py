"""The worker process, which trains, as the child of a parent process, and their messages.

    process = WorkerProcess([sys.executable, "-m", "trainer.task", *flags])  # in the parent
    await process.connect()
    async for message in process.messages(): ...

    Link.find(os.environ).run(lambda: train(...))                            # in the child

TensorFlow waits for the other workers inside C++, while it connects even with Python's global
interpreter lock held, so that no signal handler and no other thread of that process runs. Whatever
must never block is therefore done by the parent, which does not load TensorFlow
(``trainer.distributed.supervisor``).

They are connected by a pair of sockets that no other process has; ``messages`` lists what they
send.
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
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping, Sequence
from typing import Literal, NoReturn

from trainer.cli import INTERRUPTED
from trainer.distributed.messages import (
    EXIT_CODES,
    TRACEBACK_LIMIT,
    Connection,
    Outcome,
    encode,
)
from trainer.errors import ConfigurationError, StoppedError, TrainerError
from trainer.log_lines import DroppingStream
from trainer.signals import stop_signals

CLOSE_TIMEOUT = 5.0  # Seconds from the end of a process' connection to its own.

_LINE_LIMIT = 2**20  # Bytes of a message: a traceback may be all escapes.
_VARIABLE = "TRAINER_PARENT_FD"  # The child's file descriptor of the connection.


class PeerError(Exception):
    """An error of TensorFlow's that the loss of another worker may have caused."""


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
    """Re-raises errors that the loss of a peer can cause as ``PeerError``.

    The same errors have other causes, too. Only the parent processes know whether a peer was lost.
    """
    from trainer.runtime import tf  # Here: the parent processes do not load it.

    try:
        yield
    except (
        tf.errors.AbortedError,
        tf.errors.CancelledError,
        tf.errors.DeadlineExceededError,
        tf.errors.InternalError,
        tf.errors.UnavailableError,
        tf.errors.UnknownError,  # What an exception of the ring becomes inside a tf.function.
        ConnectionError,
    ) as error:
        raise PeerError(_describe(error)) from error


@contextlib.contextmanager
def out_of_memory_errors() -> Iterator[None]:
    """Re-raises TensorFlow's error for a device whose memory is exhausted.

    Raises:
        ConfigurationError: In its place; the message names the remedies.
    """
    from trainer.runtime import tf

    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        raise ConfigurationError(
            "Expected the training to fit into the memory of the device. Received: "
            f"{_describe(error)}. Use a smaller batch_size, or precision='mixed_bfloat16'."
        ) from error


def _describe(error: BaseException) -> str:
    """Returns an error's type and reason in one line.

    The message of an error inside a ``tf.function`` is a traceback of the graph; the reason is its
    last line, but for references to nodes.

    >>> _describe(ValueError("Graph execution error:" + chr(10) + "no such kernel."))
    'ValueError: no such kernel'
    """
    lines = [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not line.startswith(("[[", "The error could"))]
    name = type(error).__name__
    return f"{name}: {reasons[-1][:300].rstrip('.')}" if reasons else name


class Link:
    """A worker process' end of the connection to its parent. The process ends when the parent does,
    even while it is blocked.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.may_go = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    @classmethod
    def find(cls, environ: MutableMapping[str, str]) -> "Link | None":
        """Returns the connection to the parent; None where there is no parent. What names it is
        removed from the environment, which the processes that this one starts inherit.
        """
        if _VARIABLE not in environ:
            return None
        return cls(socket.socket(fileno=int(environ.pop(_VARIABLE))))

    def run(self, function: Callable[[], object]) -> NoReturn:
        """Calls the function, reports how it ended, and waits to be killed by the parent.

        TensorFlow's collectives let a peer fetch their result from this process, which must not
        exit before all peers have it.
        """
        try:
            function()
        except KeyboardInterrupt as interrupt:
            self._end(Outcome(INTERRUPTED, str(interrupt), "named"))
        except PeerError as error:
            self._end(Outcome(1, str(error), "unclear"), traceback.format_exc())
        except TrainerError as error:
            code = error.exit_code if error.exit_code in EXIT_CODES else 1
            self._end(Outcome(code, str(error), "named"))
        except BaseException as error:
            self._end(Outcome(1, _describe(error), "unclear"), traceback.format_exc())
        self._end(Outcome(0, "", "named"))

    def meet(self, settings: dict) -> None:
        """Waits until all workers have joined and their settings were found equal.

        Args:
            settings: What must be equal on all workers, by name; must be JSON-serializable. A
                worker that differs ends the run; the error names it and the difference.
        """
        self._send(ready=settings)
        self.may_go.wait()

    def tell(self, event: Literal["connected", "idle", "training", "trained"]) -> None:
        """Reports what this process does now.

        Args:
            event: ``connected``: TensorFlow is connected to the other workers, and training begins.
                ``idle``: what takes its own time goes on before and between trainings. ``training``
                follows it. ``trained``: all training is done.
        """
        self._send(**{event: 1})

    def report_step(self, epoch: int, step: int) -> None:
        """Reports progress, so that the parent knows that training does not hang.

        Args:
            epoch: Counted from 1.
            step: The last completed step of that epoch, counted from 1.
        """
        self._send(step=[epoch, step])

    def _end(self, outcome: Outcome, details: str = "") -> NoReturn:
        DroppingStream(sys.stdout).flush()
        DroppingStream(sys.stderr).flush()
        with contextlib.suppress(OSError):
            if details:
                self._send(traceback=details[-TRACEBACK_LIMIT:])
            self._send(ended=outcome)
        while True:
            signal.pause()

    def _send(self, **message: object) -> None:
        self.connection.sendall(encode(message))

    def _listen(self) -> None:
        for _ in self.connection.makefile("r", encoding="utf-8"):
            self.may_go.set()  # "go" is the only message.
        os._exit(StoppedError.exit_code)


class WorkerProcess:
    """The parent's end: starts the worker process, which ends with the parent.

    Args:
        command: What to start; it finds its end of the connection by ``Link.find``.

    Attributes:
        outcome: How it ended; None while it runs.
    """

    outcome: Outcome | None = None

    def __init__(self, command: Sequence[str]) -> None:
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, _VARIABLE: str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal is for the parent alone.
                preexec_fn=die_with_parent,
            )

    async def connect(self) -> None:
        """Opens the connection."""
        streams = await asyncio.open_connection(sock=self.socket, limit=_LINE_LIMIT)
        self.connection = Connection(*streams)

    async def messages(self) -> AsyncIterator[dict]:
        """Yields messages until the outcome is known: it was reported, or the process died."""
        while message := await self.connection.receive():
            if "ended" in message:
                self.outcome = self.outcome or message["ended"]
                return
            yield message
        loop = asyncio.get_running_loop()
        end = loop.time() + CLOSE_TIMEOUT
        while (code := self.process.poll()) is None and loop.time() < end:
            await asyncio.sleep(CLOSE_TIMEOUT / 500)
        if code is None:  # Something in it has closed the connection, or has written to it.
            self.kill(Outcome(1, "it no longer reports to its parent process", "unclear"))
        else:
            self.outcome = self.outcome or _explain(code)

    def go(self) -> None:
        """Lets it connect to the other workers."""
        self.connection.send(go=1)

    def signal(self, number: signal.Signals) -> None:
        """Forwards a signal."""
        self.process.send_signal(number)  # Python checks first that it has not ended.

    def is_stopped(self) -> bool:
        """Tells whether it is stopped (SIGSTOP), on systems that tell."""
        if self.outcome or not hasattr(os, "waitid"):  # macOS has it from Python 3.13 on.
            return False
        with contextlib.suppress(ChildProcessError):
            options = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self.process.pid, options) is not None
        return False

    def kill(self, outcome: Outcome) -> None:
        """Kills it, and sets its outcome, unless it has reported one itself."""
        self.outcome = self.outcome or outcome
        self.process.kill()

    def close(self) -> None:
        """Kills it, and waits for its end."""
        self.process.kill()
        self.process.wait()
        self.connection.close()


def die_with_parent() -> None:
    """Has Linux kill this process when its parent ends, for whatever reason
    (prctl PR_SET_PDEATHSIG); on other systems it does nothing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _explain(returncode: int) -> Outcome:
    """Returns the outcome of a process that ended without reporting one."""
    if returncode >= 0:
        text = f"it ended with exit code {returncode} and no report"
        return Outcome(returncode or 1, text, "crashed")
    number = signal.Signals(-returncode)
    if number in stop_signals():  # It handles them as soon as it has begun.
        code = INTERRUPTED if number == signal.SIGINT else StoppedError.exit_code
        return Outcome(code, f"stopped by {number.name} before it had begun", "named")
    # TensorFlow aborts (SIGABRT) in some cases where a peer is lost; SIGKILL comes from the
    # kernel's out-of-memory killer or from an operator.
    return Outcome(
        128 + number,
        f"killed by {number.name}",
        "lost" if number == signal.SIGKILL else "crashed",
    )
