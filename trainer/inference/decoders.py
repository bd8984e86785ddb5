"""Pictures, which may be anyone's, read in processes of their own.

    with reader.readers(2) as read:
        future = read(Path("seven.jpg"), "seven.jpg", "one")
        grey, seen = future.result()                            # or a TrainerError

Decoders are C, and a picture of 40 million pixels takes up to 0.7 GB while it is decoded: here that
is another process's memory, which is bounded; one that crashes or hangs is a picture that cannot be
read, and the next has a new process.
"""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import DataError, TrainerError

if TYPE_CHECKING:
    import numpy as np

    from trainer.inference.segmentation import Digits, Seen

MEMORY = 900_000_000  # Bytes of data of one process; code is not counted.
DEADLINE = 60.0  # Seconds for one picture.
MOST = 4  # Processes: each may take that memory.

Read = Callable[[Path | bytes, str, "Digits"], "Future[tuple[np.ndarray, list[Seen]]]"]


@contextlib.contextmanager
def readers(number: int) -> Iterator[Read]:
    """Starts processes, at most four, that read pictures side by side.

    Yields:
        What has one read: its path or content, the name for its errors, and how many digits it
        shows; the future is the picture and its digits, as ``trainer.inference.pictures`` and
        ``trainer.inference.segmentation`` give them, or one of their errors.
    """
    number = min(number, MOST)
    idle: queue.SimpleQueue[_Reader] = queue.SimpleQueue()
    all_readers = [_Reader() for _ in range(number)]
    for reader in all_readers:
        idle.put(reader)

    def read(*request: object) -> tuple:
        reader = idle.get()
        try:
            return reader.read(*request)
        finally:
            idle.put(reader)

    with ThreadPoolExecutor(number) as pool:
        try:
            yield lambda *request: pool.submit(read, *request)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for reader in all_readers:
                reader.end()


class _Reader:
    """One process; another takes its place when it has ended."""

    def __init__(self) -> None:
        self._ended = False
        self._start()

    def read(self, source: Path | bytes, name: str, digits: str) -> tuple:
        overdue = threading.Event()

        def give_up() -> None:
            overdue.set()
            self._process.kill()

        timer = threading.Timer(DEADLINE, give_up)
        timer.daemon = True
        timer.start()
        try:
            pickle.dump((source, name, digits), self._process.stdin)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)  # noqa: S301  (made by _serve, of arrays)
        except (EOFError, OSError, pickle.UnpicklingError):
            self._end_process()
            if not self._ended:
                self._start()
            reason = "reading it crashed"
            if overdue.is_set():
                reason = f"reading it takes more than {DEADLINE:g} s"
            answer = DataError(
                f"Expected an image at {name}. Received: a damaged file: {reason}. Leave it out."
            )
        finally:
            timer.cancel()
        if isinstance(answer, TrainerError):
            raise answer
        return answer

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        self._ended = True
        self._end_process()

    def _start(self) -> None:
        # This package is imported from where it is here, whatever the folder. Blocks over 4 MB go
        # back to the system at once, or one large picture would leave too little for the next.
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "trainer.inference.decoders"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Warnings of Pillow and its libraries.
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "PYTHONWARNINGS": "ignore",
                "OPENBLAS_NUM_THREADS": "1",
                "MALLOC_MMAP_THRESHOLD_": "4000000",
            },
        )

    def _end_process(self) -> None:
        process = self._process
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # What is left in it has no reader.
                stream.close()


def _serve() -> None:
    """Answers what comes on stdin on stdout, until it ends."""
    import io
    import signal

    # Ctrl-C reaches every process of the terminal; the command's own ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # A library's print is no answer.
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no limits.
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    from trainer.inference import pictures as images
    from trainer.inference import segmentation

    while True:
        try:
            source, name, digits = pickle.load(sys.stdin.buffer)  # noqa: S301  (of the command)
        except EOFError:
            return
        try:
            grey = images.open_image(
                io.BytesIO(source) if isinstance(source, bytes) else source, name
            )
            answer = grey, segmentation.find(grey, digits=digits, name=name)
        except TrainerError as error:
            answer = type(error)(*error.args)  # Without what its traceback keeps.
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
