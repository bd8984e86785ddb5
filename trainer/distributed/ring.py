"""A ring all-reduce over TCP sockets, for workers that have CPUs only.

    ring = connect(cluster)             # before TensorFlow's server listens at the port
    problem = install(ring, strategy)   # once the strategy exists: it reduces through the ring
    total, = ring.sum([gradient])       # on all workers, the same bits on each

The algorithm is that of Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of
workstations, 2009: each worker sends to the next one only, 2 (n - 1) / n times the size of the
arrays in total. TensorFlow's own ring does the same over gRPC, which packs, serializes, parses and
copies every byte, at several times the CPU time; two workers of one core each train 1.78 times as
fast as one with this ring, and 1.44 times with TensorFlow's (docs/performance.md).

Limits: it does not replace NCCL, since it does not handle GPUs; it takes one replica per worker;
its connections are authenticated when they are made (``authentication``), but what goes through
them is neither authenticated nor encrypted; and it replaces a private method of TensorFlow's. So it
is optional, and ``install`` compares its sums with TensorFlow's before they are used.
"""

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable, Sequence

import numpy as np

from trainer.distributed.authentication import MAC_SIZE, NONCE_SIZE, Session, nonce
from trainer.distributed.cluster import Cluster
from trainer.distributed.collectives import Workers
from trainer.distributed.messages import CALLERS, CONNECT_TIMEOUT, connect_socket, listen
from trainer.machine import aligned_empty
from trainer.runtime import tf

_HELLO = b"digits-trainer ring "
_TOKEN = b"."
_CLOSED = "the previous worker closed its connection"
_HELLO_SIZE = len(_HELLO) + 4 + NONCE_SIZE
_PAUSE = 0.05  # Seconds between two attempts to reach a worker.

# As ``CollectiveAllReduce._all_reduce`` of TensorFlow 2.21: (reduce_op, value, replica_id, options)
_AllReduce = Callable[[tf.distribute.ReduceOp, object, int, object], object]


def connect(cluster: Cluster) -> "Ring":
    """Joins a ring with all other workers, at the addresses that they have for TensorFlow.

    It returns when all have joined and have freed the ports for TensorFlow's servers, however long
    that takes; the worker's parent process enforces a deadline.

    Raises:
        ConfigurationError: This worker's port is in use.
        ConnectionError: A worker closed its connection.
    """
    index = cluster.index
    previous, next = asyncio.run(_join(cluster))
    for connection in (previous, next):
        connection.setblocking(True)
    # After the first round worker 0 knows that all have joined; after the second, all others do.
    for _ in range(2):
        if index == 0:
            next.sendall(_TOKEN)
        if previous.recv(len(_TOKEN)) != _TOKEN:
            raise ConnectionError(_CLOSED)
        if index:
            next.sendall(_TOKEN)
    return Ring(previous, next, cluster)


async def _join(cluster: Cluster) -> tuple[socket.socket, socket.socket]:
    """Returns the connections from the previous worker and to the next one."""
    with listen(cluster.workers[cluster.index]) as server:
        return await asyncio.gather(_accept(server, cluster), _call(cluster))


def install(ring: "Ring", strategy: tf.distribute.MultiWorkerMirroredStrategy) -> str:
    """Makes the replicas of a strategy, one on each worker, all-reduce through the ring.

    Before that, a sum is computed by TensorFlow's own collectives and by the ring; if the ring is
    not called, or gives another sum, on any worker, all workers keep TensorFlow's collectives.
    All workers must call this together, before anything is traced under the strategy.

    Returns:
        Why the ring is not used; empty where it is. All workers agree in this.

    Raises:
        tf.errors.OpError: A worker is gone.
    """
    # Small integers, so that their sums are exact.
    numbers = np.arange(1, 7, dtype=np.float32) * (ring.index + 1)
    values = [numbers, numbers.reshape(2, 3), numbers[0]]
    expected = _reduce(strategy, values)
    problem = ""
    try:
        operations = strategy.extended._cross_device_ops
        hook = _hook(ring, operations._all_reduce)
    except AttributeError as error:
        problem = f"this TensorFlow has another all-reduce ({error})"
    if not _all_without(problem, strategy):
        return problem or "another worker's TensorFlow has another all-reduce"
    summed = ring.summed
    operations._all_reduce = hook
    try:
        received = _reduce(strategy, values)
        if ring.summed == summed:
            problem = "TensorFlow does not call it"
        elif not all(map(np.array_equal, received, expected)):
            problem = "its sum is not TensorFlow's"
    except (TypeError, AttributeError) as error:  # Of another signature, while tracing.
        problem = f"this TensorFlow calls it in another way ({error})"
    finally:
        del operations._all_reduce
    if not _all_without(problem, strategy):
        return problem or "another worker's sum was wrong"
    operations._all_reduce = hook
    return ""


def _reduce(strategy: tf.distribute.Strategy, values: list[np.ndarray]) -> list[np.ndarray]:
    """Returns the sum over all replicas of each of the values."""

    @tf.function(autograph=False)
    def reduce() -> list[tf.Tensor]:
        def of_replica() -> list[tf.Tensor]:
            replica = tf.distribute.get_replica_context()
            tensors = [tf.constant(value) for value in values]
            return replica.all_reduce(tf.distribute.ReduceOp.SUM, tensors)

        return strategy.run(of_replica)

    return [total.numpy() for total in reduce()]


def _all_without(problem: str, strategy: tf.distribute.Strategy) -> bool:
    """Tells, on all workers alike, whether none has a problem; by TensorFlow's own collectives."""
    # Traced here, not by ``Workers.gather``, whose trace would stay with TensorFlow's collectives.
    total = tf.function(Workers(strategy).sum, autograph=False)(tf.constant(int(bool(problem))))
    return int(total) == 0


def _hook(ring: "Ring", stock: _AllReduce) -> _AllReduce:
    """Returns what replaces TensorFlow's ``_all_reduce``."""

    def all_reduce(
        reduce_op: tf.distribute.ReduceOp, value: object, replica_id: int, options: object
    ) -> object:
        tensors = tf.nest.flatten(value)
        if any(isinstance(tensor, tf.IndexedSlices) for tensor in tensors):  # of an embedding
            return stock(reduce_op, value, replica_id, options)
        dtypes = [tensor.dtype for tensor in tensors]
        sums = tf.numpy_function(lambda *arrays: ring.sum(arrays), tensors, dtypes)
        sums = tf.nest.flatten(sums)  # Eagerly, one output is no list.
        for tensor, total in zip(tensors, sums, strict=True):
            total.set_shape(tensor.shape)
        if reduce_op == tf.distribute.ReduceOp.MEAN:
            sums = [total / ring.count for total in sums]
        return tf.nest.pack_sequence_as(value, sums)

    return all_reduce


class Ring:
    """The connections of one worker in a ring. All workers must call ``sum`` in the same order.

    Args:
        previous: The connection from the previous worker.
        next: The connection to the next worker.
        cluster: All workers, and which of them this one is.

    Attributes:
        index: Number of this worker, counted from 0.
        count: Number of workers.
        summed: Number of array elements summed so far, over all calls: after a training step, at
            least the number of the model's trainable parameters.
    """

    def __init__(self, previous: socket.socket, next: socket.socket, cluster: Cluster) -> None:
        self.previous, self.next = previous, next
        self.index, self.count, self.summed = cluster.index, len(cluster.workers), 0
        for connection in (previous, next):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)

    def sum(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the sum over all workers of each array, with the same bits on every worker.

        The order of the additions depends only on an element's position and the number of workers.

        Args:
            arrays: Contiguous, of any shapes and numeric dtypes, which are the same on all workers.

        Returns:
            New arrays of the same shapes and dtypes, aligned for TensorFlow.

        Raises:
            ConnectionError: A worker is gone.
        """
        totals = [aligned_empty(array.shape, array.dtype) for array in arrays]
        own, out = _Flat(arrays), _Flat(totals)
        ends = [own.size * part // self.count for part in range(self.count + 1)]

        def part(number: int) -> slice:
            number %= self.count
            return slice(ends[number], ends[number + 1])

        # Reduce-scatter: each part goes round once, and every worker adds its own values ...
        source = own
        for step in range(self.count - 1):
            arriving = part(self.index - step - 1)
            self._exchange(source[part(self.index - step)], out[arriving])
            with np.errstate(all="ignore"):  # The training loop reports what is not finite.
                for total, value in zip(out[arriving], own[arriving], strict=True):
                    total += value
            source = out
        # ... all-gather: each part goes round once more, and every worker stores it.
        for step in range(self.count - 1):
            self._exchange(out[part(self.index - step + 1)], out[part(self.index - step)])
        self.summed += own.size
        return totals

    def close(self) -> None:
        """Closes the connections."""
        self.previous.close()
        self.next.close()

    def _exchange(self, outgoing: list[np.ndarray], arriving: list[np.ndarray]) -> None:
        """Sends to the next worker while it receives from the previous one."""
        out, into = (
            [array.view(np.uint8).data for array in arrays if array.size]
            for arrays in (outgoing, arriving)
        )
        while out or into:
            readable, writable, _ = select.select(
                [self.previous] if into else [], [self.next] if out else [], []
            )
            if writable:
                _advance(out, self.next.send(out[0]))
            if readable:
                received = self.previous.recv_into(into[0])
                if not received:
                    raise ConnectionError(_CLOSED)
                _advance(into, received)


class _Flat:
    """Arrays as one concatenated array; a slice gives the views that it consists of."""

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


def _hello(index: int) -> bytes:
    """Returns the first message of a worker on a connection, with a nonce at its end."""
    return _HELLO + index.to_bytes(4, "big") + nonce()


async def _call(cluster: Cluster) -> socket.socket:
    """Connects to the next worker, which may not be listening yet."""
    following = (cluster.index + 1) % len(cluster.workers)
    while True:
        with contextlib.suppress(OSError):  # TimeoutError is one.
            connection = await connect_socket(cluster.workers[following])
            with contextlib.ExitStack() as failed:
                failed.callback(connection.close)
                if await _greet(connection, cluster, following):
                    failed.pop_all()
                    return connection
        await asyncio.sleep(_PAUSE)


async def _greet(connection: socket.socket, cluster: Cluster, expected: int) -> bool:
    """Authenticates this worker and the one that it has called; tells whether it is accepted."""
    loop = asyncio.get_running_loop()
    hello = _hello(cluster.index)
    async with asyncio.timeout(CONNECT_TIMEOUT):
        await loop.sock_sendall(connection, hello)
        challenge = await _read(connection, _HELLO_SIZE)
        mac = await _read(connection, MAC_SIZE)
    session = Session(cluster.secret.key, hello, challenge, caller=True)
    if not session.verify(mac, challenge) or not _is_worker(challenge, expected):
        return False
    await loop.sock_sendall(connection, session.sign(b""))
    return await _read(connection, len(_TOKEN)) == _TOKEN


async def _accept(server: socket.socket, cluster: Cluster) -> socket.socket:
    """Waits for the connection of the previous worker, whoever else connects before."""
    loop = asyncio.get_running_loop()
    accepted: asyncio.Future[socket.socket] = loop.create_future()
    callers: dict[asyncio.Task, socket.socket] = {}  # the oldest first

    async def answer(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if await _answer(connection, cluster) and not accepted.done():
                accepted.set_result(connection)

    def close(task: asyncio.Task) -> None:
        connection = callers.pop(task)
        if not accepted.done() or accepted.result() is not connection:
            connection.close()

    async def accept() -> None:
        while True:
            try:
                connection, _ = await loop.sock_accept(server)
            except OSError:  # The caller is gone already, or there are too many open files.
                await asyncio.sleep(_PAUSE)
                continue
            task = loop.create_task(answer(connection))
            callers[task] = connection
            task.add_done_callback(close)
            if len(callers) > CALLERS:
                next(iter(callers)).cancel()
            await asyncio.sleep(0)

    server.setblocking(False)
    accepting = loop.create_task(accept())
    await accepted
    for task in (accepting, *callers):
        task.cancel()
    await asyncio.gather(accepting, *callers, return_exceptions=True)
    return accepted.result()


async def _answer(connection: socket.socket, cluster: Cluster) -> bool:
    """Authenticates this worker and the one that calls; tells whether that is the previous one."""
    loop = asyncio.get_running_loop()
    connection.setblocking(False)
    async with asyncio.timeout(CONNECT_TIMEOUT):
        hello = await _read(connection, _HELLO_SIZE)
        if not _is_worker(hello, (cluster.index - 1) % len(cluster.workers)):
            return False
        challenge = _hello(cluster.index)
        session = Session(cluster.secret.key, hello, challenge, caller=False)
        await loop.sock_sendall(connection, challenge + session.sign(challenge))
        if not session.verify(await _read(connection, MAC_SIZE), b""):
            return False
    await loop.sock_sendall(connection, _TOKEN)
    return True


def _is_worker(hello: bytes, index: int) -> bool:
    return hello[:-NONCE_SIZE] == _hello(index)[:-NONCE_SIZE]


async def _read(connection: socket.socket, size: int) -> bytes:
    """Returns ``size`` bytes; fewer where the connection ends."""
    loop = asyncio.get_running_loop()
    content = b""
    while len(content) < size and (more := await loop.sock_recv(connection, size - len(content))):
        content += more
    return content


def _advance(views: list[memoryview], done: int) -> None:
    views[0] = views[0][done:]
    if not views[0]:
        del views[0]
