"""Child processes that read files of unknown origin, and their messages.

    with sandbox.Child("trainer.inference.read_hdf5", path) as child, child.deadline(60.0):
        header = child.receive()
        content = child.read(header["bytes"])

A message is a length of four bytes, a JSON object of that length, and the raw bytes it announces:
nothing in it can run code in whoever reads it. The parent checks all that it receives, because a
file may have taken over the process that read it. That process has none of the parent's secrets in
its environment, limits on memory, processor time and time, and, once it has imported what it needs,
nothing that it could open (``restrictions``).
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from trainer.errors import DataError, InputError, TrainerError

try:
    import resource
except ImportError:  # Windows has no limits.
    resource = None  # type: ignore[assignment]

MAX_HEADER = 2**20  # Bytes of a message's JSON: twice the longest path, each letter escaped.

# What a Python needs to start and to find its packages. No tokens, proxies, or LD_PRELOAD.
ENVIRONMENT = (
    *("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT"),
    *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"),  # Where libpython may lie.
    *("PYTHONHOME", "PYTHONUSERBASE", "PYTHONNOUSERSITE", "PYTHONUTF8"),
    *("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"),
)

_ERRORS = {error.exit_code: error for error in (DataError, InputError)}


class ProtocolError(Exception):
    """The other process ended, or sent something that is no message."""

    def __init__(self, reason: str = "reading it crashed") -> None:
        super().__init__(reason)


class Channel:
    """Messages to and from another process, over a pair of binary streams."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source = source
        self._sink = sink

    def send(self, header: dict, *payload: bytes | memoryview) -> None:
        """Sends a JSON object and the bytes that it announces.

        Raises:
            ProtocolError: The other process has ended.
        """
        text = json.dumps(header).encode()
        try:
            self._sink.write(len(text).to_bytes(4, "big"))
            for part in (text, *payload):
                self._sink.write(part)
            self._sink.flush()
        except (OSError, ValueError) as error:  # ValueError: closed by another thread.
            raise ProtocolError from error

    def send_error(self, error: TrainerError) -> None:
        """Sends an error, which ``receive`` raises in the other process."""
        self.send({"error": [error.exit_code, str(error)]})

    def receive(self) -> dict:
        """Returns the JSON object of the next message; its bytes are read with ``read``.

        Raises:
            DataError: The other process sent it.
            InputError: The other process sent it.
            ProtocolError: The other process ended, or sent something else.
        """
        size = int.from_bytes(self.read(4), "big")
        if size > MAX_HEADER:
            raise ProtocolError
        try:
            header = json.loads(self.read(size))
        except (ValueError, RecursionError) as error:
            raise ProtocolError from error
        match header:
            case {"error": [int(code), str(message)], **others} if code in _ERRORS and not others:
                raise _ERRORS[code](printable(message))
            case dict() if "error" not in header:
                return header
        raise ProtocolError

    def read(self, size: int) -> bytes:
        """Returns exactly so many bytes.

        Raises:
            ProtocolError: The other process ended before it had sent them.
        """
        try:
            content = self._source.read(size)
        except (OSError, ValueError) as error:
            raise ProtocolError from error
        if len(content) < size:
            raise ProtocolError
        return content


class Child(Channel):
    """A Python process that runs a module; its end is the end of the ``with`` block.

    Args:
        module: Name of the module, which calls ``enter`` before it reads anything.
        arguments: Its ``sys.argv[1:]``.
    """

    def __init__(self, module: str, *arguments: str | Path) -> None:
        # -P: nothing is imported from the current folder. This package is imported from where it
        # is here, even if it is not installed.
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Warnings of Pillow's and HDF5's libraries.
            env={
                **{name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "PYTHONWARNINGS": "ignore",
                # NumPy's threads would take the memory that the process is allowed.
                "OPENBLAS_NUM_THREADS": "1",
                # Blocks over 4 MB go back to the system at once, or one large picture would leave
                # too little for the next.
                "MALLOC_MMAP_THRESHOLD_": "4000000",
            },
        )
        pipes = cast("BinaryIO", self._process.stdout), cast("BinaryIO", self._process.stdin)
        super().__init__(*pipes)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    @contextlib.contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Ends the process if the block takes longer than that, and raises ``ProtocolError`` with
        the reason.
        """
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self._process.kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        except ProtocolError as error:
            if expired.is_set():
                raise ProtocolError(f"reading it takes more than {seconds:g} s") from error
            raise
        finally:
            timer.cancel()

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._source, self._sink):
            with contextlib.suppress(OSError):  # What is left in it has no reader.
                stream.close()


def enter(
    *, data: int | None = None, address_space: int | None = None, cpu_seconds: int | None = None
) -> Channel:
    """Limits what this process, a ``Child``, can use, and returns the channel to its parent.

    Args:
        data: Bytes of memory for data.
        address_space: Bytes of virtual memory for everything, code and mapped files too.
        cpu_seconds: Seconds of processor time.
    """
    # Ctrl-C reaches every process of the terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = Channel(sys.stdin.buffer, os.fdopen(os.dup(1), "wb"))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # A library's print is no message.
    if resource:
        for kind, limit in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_DATA, data),
            (resource.RLIMIT_AS, address_space),
            (resource.RLIMIT_CPU, cpu_seconds),
        ):
            if limit is not None:
                with contextlib.suppress(ValueError, OSError):  # macOS has some of them.
                    resource.setrlimit(kind, (limit, limit))
    return channel


def allow_cpu(seconds: int) -> None:
    """Limits the processor time that this process may still take."""
    if resource:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(usage.ru_utime + usage.ru_stime) + seconds
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def integers(value: object, *, count: int | None = None, most: int = 2**63) -> tuple[int, ...]:
    """Returns a list of integers from 0 to ``most`` in a received header.

    Raises:
        ProtocolError: It is something else, or not of ``count`` integers.

    >>> integers([28, 0], count=2, most=28)
    (28, 0)
    """
    if not (
        isinstance(value, list)
        and count in (None, len(value))
        and all(type(number) is int and 0 <= number <= most for number in value)
    ):
        raise ProtocolError
    return tuple(value)


def printable(text: str) -> str:
    r"""Returns a text that is one line, and does nothing to a terminal.

    >>> printable("7.png"), printable(chr(27))
    ('7.png', "'\\x1b'")
    """
    return text if text.isprintable() else repr(text)
