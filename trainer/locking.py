"""A lock on a folder, so that two runs do not write into it at once.

    with hold_lock(folder, wait=60.0):
        ...

It is the system's (flock), which is released even when the process is killed. Where a file system
has none (NFS without locks), it is a lease: a file that its holder renews, and that another may
take when it has not been renewed for a while.
"""

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.errors import OutputError, StoppedError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

POLL_SECONDS = 0.5  # between two attempts to lock a folder that is in use
RENEW_SECONDS = 5.0
# Without a renewal for so long, the holder of a lease is taken for dead: twelve renewals, as NFS
# clients may show a file's former content for up to 60 s (acregmax in nfs(5)).
LEASE_SECONDS = 60.0
LEASE_FILE = ".digits-trainer.lease"


@contextlib.contextmanager
def hold_lock(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Holds the lock on a folder until the ``with`` block ends.

    Args:
        folder: A folder that exists and can be written.
        wait: Seconds to wait for another process that holds it.

    Raises:
        OutputError: Another process holds it.
        StoppedError: Another process holds it still, after the wait.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    until = time.monotonic() + wait
    try:
        while (locked := _try_to_lock(descriptor)) is False:
            if time.monotonic() >= until:
                raise _in_use(folder, wait)
            time.sleep(POLL_SECONDS)
        if locked:
            yield
            return
    finally:
        os.close(descriptor)
    with _hold_lease(folder, wait):
        yield


def _try_to_lock(descriptor: int) -> bool | None:
    """Locks a folder; False where another process has; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _in_use(folder: Path, wait: float) -> Exception:
    error = StoppedError if wait else OutputError
    return error(
        f"Expected a folder that no other run is using at {folder}. Received: one in use. Wait for "
        "that run, or use another output_dir."
    )


@contextlib.contextmanager
def _hold_lease(folder: Path, wait: float) -> Iterator[None]:
    lease = Lease(folder)
    if not lease.acquire(wait):
        raise _in_use(folder, wait)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):  # The file system may be away for a while.
                lease.renew()

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        lease.release()


class Lease:
    """A file that says that a folder is in use, for as long as its content changes.

    No clocks of two machines are compared: whoever waits looks at the content, by its own clock.

    Args:
        folder: The folder.
        clock: Monotonic time in seconds.
        sleep: Waits for some seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.path = folder / LEASE_FILE
        self.clock = clock
        self.sleep = sleep
        self.token = secrets.token_hex(8)
        self.renewals = 0

    def acquire(self, wait: float = 0.0) -> bool:
        """Takes the lease.

        Args:
            wait: Seconds to wait for a holder that renews it.

        Returns:
            False where a holder is alive, and still is after the wait.
        """
        until = self.clock() + wait
        seen, since = None, self.clock()
        while not self._create():
            content = self._read()
            if content != seen:
                renewed = seen is not None and content is not None
                seen, since = content, self.clock()
                if renewed and self.clock() >= until:
                    return False
            elif self.clock() - since >= LEASE_SECONDS:
                self._take_away(content)  # Its holder is gone; whoever creates it now has it.
            self.sleep(RENEW_SECONDS / 4)
        return True

    def renew(self) -> None:
        """Shows that the holder is alive."""
        self.renewals += 1
        if self._is_ours():
            self._write(os.O_WRONLY | os.O_TRUNC)

    def release(self) -> None:
        """Gives the lease back."""
        with contextlib.suppress(OSError):
            if self._is_ours():
                self.path.unlink()

    def _create(self) -> bool:
        try:
            self._write(os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return False
        return True

    def _take_away(self, stale: str | None) -> None:
        """Removes a lease, unless another process has done so and taken it meanwhile."""
        aside = self.path.with_name(f"{LEASE_FILE}.{self.token}")
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(aside)
            if aside.read_text(encoding="ascii", errors="replace") != stale:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _write(self, flags: int) -> None:
        descriptor = os.open(self.path, flags | os.O_NOFOLLOW, 0o644)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{self.token} {self.renewals}\n")

    def _read(self) -> str | None:
        try:
            return self.path.read_text(encoding="ascii", errors="replace")
        except OSError:
            return None

    def _is_ours(self) -> bool:
        return (self._read() or "").startswith(self.token)
