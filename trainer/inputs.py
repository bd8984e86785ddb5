"""Opens the files that a user names: regular ones, whose reading ends.

    with inputs.open_file(Path("digits.npz")) as file:
        head = file.read(6)

A named pipe would wait for a writer for ever, and a device such as /dev/zero never ends.
"""

import errno
import io
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_OTHERS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

# O_NONBLOCK: opening does not wait for a pipe's writer. It changes nothing for regular files.
# O_NOCTTY: a terminal that is opened does not become this process'. O_BINARY is Windows'.
_FLAGS = os.O_RDONLY | sum(getattr(os, f"O_{name}", 0) for name in ("NONBLOCK", "NOCTTY", "BINARY"))


def open_file(path: Path) -> io.BufferedReader:
    """Opens a regular file for reading.

    Args:
        path: The file, or a link to it.

    Returns:
        The open file, buffered.

    Raises:
        OSError: It is missing, cannot be opened, or is no regular file: a folder, a pipe, a device,
            a socket. ``strerror`` says which. Reading raises it, too.
    """
    try:
        _check(path.stat())  # First, because opening some devices has effects, as a tape's.
        descriptor = os.open(path, _FLAGS)
    except ValueError as error:  # A null character, or a letter that no name can have.
        raise FileNotFoundError(errno.ENOENT, "a name that no file can have") from error
    try:
        _check(os.fstat(descriptor))  # Another file may have taken its place.
        return io.BufferedReader(_File(descriptor, "rb"))
    except BaseException:
        os.close(descriptor)
        raise


class _File(io.FileIO):
    """Raises where there is nothing to read yet, as in /proc/kmsg; readers do not expect None."""

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        count = super().readinto(buffer)
        if count is None:
            raise BlockingIOError(errno.EAGAIN, "a file that waits for what is to be read")
        return count


def _check(status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"{_OTHERS.get(kind, 'a special file')}, not a regular file")
