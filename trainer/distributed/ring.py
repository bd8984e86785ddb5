"""Adds up arrays over workers that have CPUs only, in a ring of TCP connections.

    ring = connect(cluster)         # before TensorFlow's server takes the port
    total, = ring.sum([gradient])   # on all workers, the same bits on each

The ring all-reduce (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of
workstations, 2009): each worker sends to the one behind it alone, and 2 (n - 1) / n of the arrays
in all. TensorFlow's own does the same by gRPC, where each byte is packed, serialized, parsed and
copied again: several times the CPU time, which workers of few cores do not have
(docs/performance.md).
"""

import contextlib
import select
import socket
import time
from collections.abc import Sequence

import numpy as np

from trainer.distributed.cluster import Cluster, split_address
from trainer.distributed.messages import CONNECT_TIMEOUT, listen

_HELLO = b"digits-trainer ring "
_TOKEN = b"."
_CLOSED = "the worker before this one closed its connection"
_PAUSE = 0.05  # Seconds between two attempts to reach a worker.
_ALIGNMENT = 64  # Bytes: from such an address TensorFlow takes an array without a copy.


class Ring:
    """The connections of one worker. All workers must call its methods in the same order.

    Args:
        before: From the worker before this one.
        behind: To the worker behind it.
        cluster: All workers, and which this one is.
    """

    def __init__(self, before: socket.socket, behind: socket.socket, cluster: Cluster) -> None:
        self.before, self.behind = before, behind
        self.index, self.count = cluster.index, len(cluster.workers)
        for connection in (before, behind):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)

    def sum(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the sum over all workers of each array, the same bits on every worker.

        In which order numbers are added depends on their place and the number of workers alone.

        Args:
            arrays: Contiguous; of any shapes and dtypes, the same on all workers.

        Raises:
            ConnectionError: A worker is gone.
        """
        totals = [_empty(array.shape, array.dtype) for array in arrays]
        own, out = _Flat(arrays), _Flat(totals)
        ends = [own.size * part // self.count for part in range(self.count + 1)]

        def part(number: int) -> slice:
            number %= self.count
            return slice(ends[number], ends[number + 1])

        # Each part goes round once, and every worker adds its own to it ...
        source = own
        for step in range(self.count - 1):
            arriving = part(self.index - step - 1)
            self._exchange(source[part(self.index - step)], out[arriving])
            with np.errstate(all="ignore"):  # What is not finite, the loop finds and names.
                for total, value in zip(out[arriving], own[arriving], strict=True):
                    total += value
            source = out
        # ... and once more, to replace what the others have of it.
        for step in range(self.count - 1):
            self._exchange(out[part(self.index - step + 1)], out[part(self.index - step)])
        return totals

    def _exchange(self, outgoing: list[np.ndarray], arriving: list[np.ndarray]) -> None:
        """Sends to the worker behind while it receives from the one before."""
        out, into = (
            [memoryview(array.view(np.uint8)) for array in arrays if array.size]
            for arrays in (outgoing, arriving)
        )
        while out or into:
            readable, writable, _ = select.select(
                [self.before] if into else [], [self.behind] if out else [], []
            )
            if writable:
                _advance(out, self.behind.send(out[0]))
            if readable:
                received = self.before.recv_into(into[0])
                if not received:
                    raise ConnectionError(_CLOSED)
                _advance(into, received)


class _Flat:
    """Arrays as if they were one behind the other; a slice gives the views that it is made of."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = [array.reshape(-1) for array in arrays]
        self.size = sum(array.size for array in self.arrays)

    def __getitem__(self, part: slice) -> list[np.ndarray]:
        views, start = [], 0
        for array in self.arrays:
            first, last = max(part.start - start, 0), max(part.stop - start, 0)
            views.append(array[first:last])
            start += array.size
        return views


def connect(cluster: Cluster) -> Ring:
    """Joins a ring with all other workers, at the addresses that they have for TensorFlow.

    Returns when all have joined and have left the ports to TensorFlow's servers; however long that
    takes: a worker's parent process limits it.

    Raises:
        ConfigurationError: This worker's port is in use.
    """
    index, count = cluster.index, len(cluster.workers)
    with listen(cluster.workers[index]) as server:
        following = (index + 1) % count
        behind = _call(cluster.workers[following], index)
        before = _accept(server, (index - 1) % count, index)
        while not _is(behind, following):  # Something else was there.
            behind.close()
            behind = _call(cluster.workers[following], index)
    # By a first round worker 0 learns that all have joined, by a second all others do.
    for _ in range(2):
        if index == 0:
            behind.sendall(_TOKEN)
        if _read(before, len(_TOKEN)) != _TOKEN:
            raise ConnectionError(_CLOSED)
        if index:
            behind.sendall(_TOKEN)
    return Ring(before, behind, cluster)


def _hello(index: int) -> bytes:
    return _HELLO + index.to_bytes(4, "big")


def _call(address: str, index: int) -> socket.socket:
    """Connects to a worker that may not be there yet, and says which this one is."""
    while True:
        with contextlib.suppress(OSError):
            connection = socket.create_connection(split_address(address), CONNECT_TIMEOUT)
            connection.sendall(_hello(index))
            connection.settimeout(None)  # It answers when it has reached the worker behind it.
            return connection
        time.sleep(_PAUSE)


def _accept(server: socket.socket, expected: int, index: int) -> socket.socket:
    """Waits for a worker's call, and answers which this one is."""
    server.settimeout(None)
    while True:
        connection, _ = server.accept()
        connection.settimeout(CONNECT_TIMEOUT)
        if _is(connection, expected):
            connection.sendall(_hello(index))
            connection.settimeout(None)
            return connection
        connection.close()


def _is(connection: socket.socket, index: int) -> bool:
    """Tells whether the other end is a worker of that number."""
    with contextlib.suppress(OSError):
        return _read(connection, len(_hello(index))) == _hello(index)
    return False


def _read(connection: socket.socket, size: int) -> bytes:
    """Returns so many bytes; fewer where the connection ends."""
    content = b""
    while len(content) < size and (more := connection.recv(size - len(content))):
        content += more
    return content


def _advance(views: list[memoryview], done: int) -> None:
    views[0] = views[0][done:]
    if not views[0]:
        del views[0]


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
