"""The ring all-reduce over real connections, each worker a thread; and in place of TensorFlow's
all-reduce, each worker a process.
"""

import contextlib
import math
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import TIMEOUT, wait_for

from trainer.distributed import ring as ring_module
from trainer.distributed.authentication import MAC_SIZE, NO_SECRET, Secret, Session
from trainer.distributed.cluster import Cluster
from trainer.distributed.local import free_ports
from trainer.distributed.messages import CALLERS
from trainer.distributed.ring import connect
from trainer.errors import ConfigurationError

SECRET = Secret(b"what all workers of a run know")
SHAPES = [(3, 3, 1, 32), (32,), (0,), (), (1,), (500, 401)]


@contextlib.contextmanager
def joined(workers, index, secret=SECRET):
    ring = connect(Cluster(workers, index, secret))
    try:
        yield ring
    finally:
        ring.close()


def together(count, work, *, before=lambda index: None):
    """Joins so many workers; returns what ``work(ring)`` gives on each, or raises. Each calls
    ``before(index)`` before it joins.
    """
    workers = tuple(f"127.0.0.1:{port}" for port in free_ports(count))

    def one(index):
        before(index)
        with joined(workers, index) as ring:
            return work(ring)

    with ThreadPoolExecutor(count) as pool:
        return [future.result(60) for future in [pool.submit(one, i) for i in range(count)]]


@contextlib.contextmanager
def reached(address):
    """Connects to an address once somebody listens there."""
    host, port = address.split(":")
    connections = []

    def connected():
        with contextlib.suppress(ConnectionRefusedError):
            connections.append(socket.create_connection((host, int(port)), 5))
        return bool(connections)

    wait_for(connected)
    with connections[0] as stranger:
        yield stranger


def ones(workers, index, secret=SECRET):
    with joined(workers, index, secret) as ring:
        return ring.sum([np.ones(3)])[0].tolist()


def values(index, dtype=np.float32):
    noise = np.random.default_rng(index)
    return [noise.normal(0, 1, shape).astype(dtype).reshape(shape) for shape in SHAPES]


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_worker_has_the_sum_of_all(count, dtype):
    results = together(count, lambda ring: ring.sum(values(ring.index, dtype)))
    for position, shape in enumerate(SHAPES):
        own = [values(index, dtype)[position].astype(np.float64) for index in range(count)]
        for result in results:
            total = result[position]
            assert (total.dtype, total.shape) == (dtype, shape)
            # Each of the additions rounds once, to half a unit of what it adds up.
            bound = count * np.finfo(dtype).eps * np.abs(own).sum(axis=0)
            assert (np.abs(total - np.sum(own, axis=0)) <= bound).all()
            assert total.tobytes() == results[0][position].tobytes()


def announce(ring, call):
    """Has the ring's next sum call a function when it begins to send and receive."""
    exchange = ring._exchange

    def announced(outgoing, arriving):
        del ring._exchange
        call()
        exchange(outgoing, arriving)

    ring._exchange = announced


def test_repeated_sums_have_the_same_bits_whoever_is_late():
    def sums(late=None):
        waiting = threading.Semaphore(0)

        def work(ring):
            totals = []
            for _ in range(5):
                if ring.index == late:  # All others wait for this one.
                    for _ in range(ring.count - 1):
                        assert waiting.acquire(timeout=TIMEOUT)
                else:
                    announce(ring, waiting.release)
                totals.append([total.tobytes() for total in ring.sum(values(ring.index))])
            return totals

        return together(3, work)

    expected = sums()
    assert all(totals == expected[0][0] for worker in expected for totals in worker)
    for late in range(3):
        assert sums(late) == expected


@pytest.mark.parametrize("count", [2, 3])
def test_whole_numbers_are_added_whatever_there_are_of_them(count):
    def work(ring):
        return [ring.sum([np.full(size, ring.index + 1, np.int32)])[0] for size in range(5)]

    for result in together(count, work):
        expected = [[math.comb(count + 1, 2)] * size for size in range(5)]
        assert [total.tolist() for total in result] == expected


def test_what_was_summed_is_counted():
    def work(ring):
        ring.sum([np.ones((2, 3)), np.ones(())])
        ring.sum([np.ones(10)])
        return ring.summed

    assert together(2, work) == [17, 17]


def test_what_is_added_stays_as_it_was():
    def work(ring):
        own = values(ring.index)
        for array in own:
            array.flags.writeable = False
        ring.sum(own)
        return own

    for index, own in enumerate(together(3, work)):
        assert all((a == b).all() for a, b in zip(own, values(index), strict=True))


def test_what_is_not_finite_stays_so_without_a_word():
    numbers = np.array([[np.inf, np.nan, 3e38], [-np.inf, 1, 3e38]], np.float32)
    for (total,) in together(2, lambda ring: ring.sum([numbers[ring.index]])):
        np.testing.assert_array_equal(total, np.array([np.nan, np.nan, np.inf], np.float32))


def test_sums_are_taken_by_tensorflow_without_a_copy():
    def work(ring):
        return [total.ctypes.data % 64 for total in ring.sum(values(ring.index)) if total.size]

    assert together(2, work) == [[0] * (len(SHAPES) - 1)] * 2


@pytest.mark.parametrize("late", range(3))
def test_workers_join_in_any_order(late, monkeypatch):
    calling, call = threading.Semaphore(0), ring_module._call

    async def announced(cluster):
        calling.release()
        return await call(cluster)

    def before(index):
        if index == late:  # All others listen, and call the next worker.
            for _ in range(2):
                assert calling.acquire(timeout=TIMEOUT)

    monkeypatch.setattr(ring_module, "_call", announced)
    results = together(3, lambda ring: ring.sum([np.ones(7)])[0].tolist(), before=before)
    assert results == [[3.0] * 7] * 3


@pytest.mark.parametrize(
    "content", [b"", b"GET / HTTP/1.1\r\n\r\n", b"digits-trainer ring \0\0\0\7"]
)
def test_strangers_do_not_join(content):
    workers = tuple(f"127.0.0.1:{port}" for port in free_ports(2))

    with ThreadPoolExecutor() as pool:
        first = pool.submit(ones, workers, 0)
        with reached(workers[0]) as stranger:
            stranger.sendall(content)
            if not content:
                stranger.close()
            # The stranger is there before worker 1.
            assert ones(workers, 1) == first.result(60) == [2.0] * 3


@pytest.mark.parametrize("count", [1, CALLERS + 20])
def test_silent_connections_keep_nobody_waiting(count, monkeypatch):
    monkeypatch.setattr(ring_module, "CONNECT_TIMEOUT", 300)
    workers = tuple(f"127.0.0.1:{port}" for port in free_ports(2))

    with ThreadPoolExecutor() as pool, contextlib.ExitStack() as silent:
        first = pool.submit(ones, workers, 0)
        for _ in range(count):
            silent.enter_context(reached(workers[0]))
        assert ones(workers, 1) == first.result(60) == [2.0] * 3


def test_workers_join_without_a_secret():
    workers = tuple(f"127.0.0.1:{port}" for port in free_ports(2))

    with ThreadPoolExecutor() as pool:
        first = pool.submit(ones, workers, 0, NO_SECRET)
        assert ones(workers, 1, NO_SECRET) == first.result(60) == [2.0] * 3


@pytest.mark.parametrize("key", [b"", b"another secret of a run"])
def test_who_does_not_know_the_secret_is_no_previous_worker(key):
    workers = tuple(f"127.0.0.1:{port}" for port in free_ports(2))

    with ThreadPoolExecutor() as pool:
        first = pool.submit(ones, workers, 0)
        with reached(workers[0]) as stranger:
            hello = b"digits-trainer ring \0\0\0\1" + bytes(16)
            stranger.sendall(hello)
            challenge = stranger.recv(len(hello), socket.MSG_WAITALL)
            assert len(stranger.recv(MAC_SIZE, socket.MSG_WAITALL)) == MAC_SIZE
            stranger.sendall(Session(key, hello, challenge, caller=True).sign(b""))
            assert stranger.recv(1) == b""
        assert ones(workers, 1) == first.result(60) == [2.0] * 3


@pytest.mark.parametrize("key", [b"", b"another secret of a run"])
def test_who_does_not_know_the_secret_is_no_next_worker(key):
    workers = tuple(f"127.0.0.1:{port}" for port in free_ports(2))
    challenge = b"digits-trainer ring \0\0\0\1" + bytes(16)
    port = int(workers[1].rpartition(":")[2])

    with ThreadPoolExecutor() as pool:
        with socket.create_server(("127.0.0.1", port)) as other:
            first = pool.submit(ones, workers, 0)
            connection, _ = other.accept()
            with connection:
                hello = connection.recv(len(challenge), socket.MSG_WAITALL)
                session = Session(key, hello, challenge, caller=False)
                connection.sendall(challenge + session.sign(challenge) + b".")
                with contextlib.suppress(ConnectionError):
                    assert connection.recv(1) == b""
        assert ones(workers, 1) == first.result(60) == [2.0] * 3


def test_something_else_at_a_workers_address_is_called_again():
    workers = tuple(f"127.0.0.1:{port}" for port in free_ports(2))
    port = int(workers[1].rpartition(":")[2])

    with ThreadPoolExecutor() as pool:
        with socket.create_server(("127.0.0.1", port)) as other:
            first = pool.submit(ones, workers, 0)
            other.accept()[0].close()
        assert ones(workers, 1) == first.result(60) == [2.0] * 3


@pytest.mark.parametrize("lost", range(3))
def test_a_worker_that_is_gone_is_an_error_for_all(lost):
    def work(ring):
        ring.sum([np.ones(10)])
        if ring.index == lost:
            return "gone"
        with contextlib.suppress(ConnectionError):
            while True:
                ring.sum([np.ones(1_000_000)])
        return "told"

    assert together(3, work) == ["gone" if index == lost else "told" for index in range(3)]


@pytest.mark.full
@pytest.mark.parametrize(
    ("way", "reasons"),
    [
        ("sum", 2 * ["its sum is not TensorFlow's"]),
        ("renamed", 2 * ["this TensorFlow has another all-reduce (no attribute '_all_reduce')"]),
        ("not called", 2 * ["TensorFlow does not call it"]),
        ("called otherwise", 2 * ["this TensorFlow calls it in another way"]),
        ("on one worker", ["another worker's TensorFlow has another all-reduce", "no attribute"]),
    ],
)
def test_a_ring_that_does_not_do_what_tensorflows_collectives_do_is_not_used(
    replicas, way, reasons
):
    arguments = {"collectives": "ring", "spoil_ring": way}
    for seen, reason in zip(
        replicas.compute_together("exchanged", [arguments] * 2), reasons, strict=True
    ):
        assert not seen["by_ring"]
        assert seen["notice"].startswith("The ring of collectives='ring' is not used: ")
        assert reason in seen["notice"]
        assert seen["summed"] == [[1.0, 1.0], 1.0, 2]
        assert seen["gathered"] == [10, 11]


def test_a_port_in_use_is_refused():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        cluster = Cluster((f"127.0.0.1:{port}", "127.0.0.1:1"), 0)
        with pytest.raises(ConfigurationError, match=f"listen on port {port}.*already in use"):
            connect(cluster)


def test_its_ports_are_free_when_all_have_joined():
    def work(ring):
        mine = ring.previous.getsockname()[1]
        with socket.create_server(("127.0.0.1", mine)):
            return mine

    assert len(set(together(3, work))) == 3
