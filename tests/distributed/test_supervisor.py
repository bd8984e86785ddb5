"""Who is told what when a worker is late, lost, hung, different or done.

The parents are the real ones, in processes and on sockets of their own. Their worker processes do
what a test tells them to, and deadlines are over when it says so (``scripted_worker``);
``test_workers`` has the real training.
"""

import contextlib
import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from support import ROOT, Constant, wait_for, with_hooks

from trainer.distributed.authentication import NO_SECRET, Session
from trainer.distributed.local import free_ports
from trainer.distributed.messages import CALLERS
from trainer.distributed.parent import (
    FREEZE_TIMEOUT,
    HEARTBEAT_TIMEOUT,
    LOSS_TIMEOUT,
    RESUME_HINT,
    STOP_TIMEOUT,
    TELL_TIMEOUT,
    unreachable,
)
from trainer.distributed.worker import _explain

SECRET = "what all workers of a run know\n"  # noqa: S105
REPORTS = {"connected", "idle", "training", "step", "trained"}
HANG = 300  # Seconds that only turn a hang of a test into its failure.


class Worker:
    """A parent and its worker process."""

    reports = 0

    def __init__(
        self, folder, workers, index, *, secret, settings=None, step_timeout=None, hooks=()
    ):
        self.folder = folder
        self.workers = workers
        host, port = workers[index].split(":")
        self.address = host, int(port)
        self.name = f"worker {index} ({workers[index]})"
        folder.mkdir()
        os.mkfifo(folder / "commands")
        # Open for reading, too, so that nobody waits for the other to open it.
        self.commands = os.open(folder / "commands", os.O_RDWR)
        config = {
            "folder": str(folder),
            "workers": workers,
            "index": index,
            "settings": settings or {},
            "step_timeout": step_timeout,
        }
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        if secret:
            (folder / "secret").write_text(secret)
            (folder / "secret").chmod(0o600)
            env["TRAINER_TOKEN_FILE"] = str(folder / "secret")
        with (folder / "stderr").open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / "tests/scripted_worker.py", "--config", json.dumps(config)],
                env=with_hooks(env, hooks),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    @functools.cached_property
    def pid(self):
        """The worker process', which has started."""
        word, pid = self.process.stdout.readline().split()
        assert word == "started"
        return int(pid)

    def tell(self, command):
        """Gives the worker process a command."""
        assert self.pid
        os.write(self.commands, f"{command}\n".encode())

    def do(self, command):
        """The same, and waits until it is done; a report has been handled by then, too."""
        self.tell(command)
        self.answers(command)
        if command.startswith(("tell", "step")):
            self.reports += 1
            self.until(
                lambda entry: entry[0] == "handled" and entry[1].keys() & REPORTS,
                self.reports,
            )

    def answers(self, command):
        assert self.process.stdout.readline() == f"{command}\n"

    def log(self):
        with contextlib.suppress(FileNotFoundError):
            # The last line may be incomplete.
            lines = (self.folder / "log").read_text().split("\n")[:-1]
            return [json.loads(line) for line in lines]
        return []

    def until(self, found, times=1):
        wait_for(
            lambda: sum(map(bool, map(found, self.log()))) >= times, self.process, seconds=HANG
        )

    def handles(self, key, *, times=1):
        """Waits until the parent has handled messages of a kind."""
        self.until(lambda entry: entry[0] == "handled" and key in entry[1], times)

    def receives(self, key, *, times=1):
        self.until(lambda entry: entry[0] == "received" and key in entry[1], times)

    def joined(self, *indices):
        """Waits until others have joined this one, worker 0."""
        for index in indices:
            self.until(lambda entry, index=index: entry == ["joined", index])

    def sets(self, deadline):
        """Waits until the parent has set a deadline; returns its seconds."""
        self.until(lambda entry: entry[:2] == ["deadline", deadline])
        return self.seconds(deadline)[-1]

    def seconds(self, deadline):
        return [entry[2] for entry in self.log() if entry[:2] == ["deadline", deadline]]

    def expire(self, deadline):
        """Lets a deadline be over."""
        (self.folder / deadline).touch()

    def says(self, text):
        """Waits until a text stands on its stderr."""
        wait_for(lambda: text in self.stderr(), self.process, seconds=HANG)

    def stderr(self):
        return (self.folder / "stderr").read_text()

    def send(self, number, *, parent=True, child=True):
        """Sends a signal to both processes, or one."""
        if parent:
            self.process.send_signal(number)
        if child:
            # A parent that is killed, or goes on and finds its peers gone, may end it first.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def end(self):
        """Waits for the end of both processes; returns the exit code and stderr."""
        self.process.communicate(timeout=HANG)  # Until nobody can write any more.
        return self.process.returncode, self.stderr()

    def close(self):
        self.process.kill()
        self.process.communicate()
        os.close(self.commands)


@pytest.fixture
def start(tmp_path):
    """Starts workers of a run."""
    addresses = {}
    numbers = itertools.count()
    made = []

    def start(count, *indices, workers=None, secret=SECRET, **options):
        if count not in addresses:
            addresses[count] = [f"127.0.0.1:{port}" for port in free_ports(count)]
        for index in indices or range(count):
            folder = tmp_path / str(next(numbers))
            made.append(
                Worker(folder, workers or addresses[count], index, secret=secret, **options)
            )
        ours = made[len(made) - len(indices or range(count)) :]
        return ours[0] if len(indices) == 1 else ours

    yield start
    for worker in made:
        worker.close()


def train(*workers):
    """Lets workers meet and connect."""
    for worker in workers:
        worker.tell("meet")
    for worker in workers:
        worker.answers("meet")
        worker.do("tell connected")
    return workers


def assert_succeed(*workers):
    """Lets workers end their training, worker 0, which comes first, last."""
    for worker in reversed(workers):
        worker.do("tell trained")
        worker.tell("end")
    for worker in workers:
        assert worker.end() == (0, "")


def assert_end_well(*workers):
    """The same, whatever stands on stderr."""
    for worker in reversed(workers):
        worker.do("tell trained")
        worker.tell("end")
    assert [worker.end()[0] for worker in workers] == [0] * len(workers)


def assert_lost(ended, worker, how):
    assert ended == (75, f"task: {worker.name} was lost: {how}. {RESUME_HINT}\n")


# -- meeting


def test_all_end_well(start):
    assert_succeed(*train(*start(3)))


def test_a_worker_that_is_late_is_waited_for(start):
    chief = start(2, 0)
    chief.tell("meet")
    chief.handles("ready")
    late = start(2, 1)
    chief.joined(1)
    assert chief.seconds("connecting") == []  # It has not gone on alone.
    late.tell("meet")
    for worker in (chief, late):
        worker.answers("meet")
        worker.do("tell connected")
    assert_succeed(chief, late)


def test_a_worker_whose_chief_is_late_waits(start):
    workers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    host, port = workers[0].split(":")
    with socket.create_server((host, int(port))) as server:
        early = start(2, 1, workers=workers)
        early.tell("meet")
        server.accept()[0].close()  # It has called, and nobody has answered.
    chief = start(2, 0, workers=workers)
    assert_succeed(*train_from(chief, early))


def train_from(chief, early):
    chief.tell("meet")
    for worker in (chief, early):
        worker.answers("meet")
        worker.do("tell connected")
    return chief, early


@pytest.mark.full
def test_workers_that_never_come_are_named(start):
    chief, other = start(3, 0, 2)
    for worker in (chief, other):
        worker.tell("meet")
    chief.handles("ready", times=2)
    assert chief.sets("meeting") == 30
    chief.expire("meeting")
    for worker in (chief, other):
        code, stderr = worker.end()
        assert code == 75
        assert stderr.startswith("task: worker 1 (127.0.0.1:")
        assert stderr.endswith(
            "did not join within 30 s. Start the same command there too, or use a longer "
            "startup_timeout.\n"
        )


def test_a_chief_that_never_comes_is_named(start):
    other = start(2, 1)
    assert other.sets("meeting") == 30
    other.expire("meeting")
    code, stderr = other.end()
    assert code == 75
    assert stderr.startswith("task: worker 0 (127.0.0.1:")
    assert "did not join within 30 s." in stderr


@pytest.mark.parametrize(
    ("name", "value", "chiefs"),
    [("seed", 1, 0), ("keras", "3.14.0", "3.15.1"), ("step", "keras", "winograd avx512")],
)
def test_a_worker_with_other_settings_is_named(start, name, value, chiefs):
    settings = {"seed": 0, "keras": "3.15.1", "step": "winograd avx512"}
    chief, alike = start(3, 0, 1, settings=settings)
    other = start(3, 2, settings={**settings, name: value})
    chief.joined(1, 2)
    for worker in (chief, alike, other):
        worker.tell("meet")
    for worker in (chief, alike, other):
        code, stderr = worker.end()
        assert code == 78
        difference = f"{name}={value!r} where worker 0 has {name}={chiefs!r}"
        assert f"Received: {difference}, on {other.name}." in stderr
        assert stderr.count("\n") == 1


@pytest.mark.parametrize("secret", [SECRET, None])
def test_a_worker_with_another_list_of_workers_is_refused(start, secret):
    chief = start(2, 0, secret=secret)
    workers = [chief.name[len("worker 0 (") : -1], "127.0.0.1:1"]
    other = start(2, 1, workers=workers, secret=secret)
    for worker in (chief, other):
        code, stderr = worker.end()
        assert code == 78
        assert "Expected one list of workers everywhere. Received: " in stderr


def test_a_worker_that_comes_twice_waits_for_the_first_to_go(start):
    chief, first = start(3, 0, 1)
    chief.joined(1)
    twin = start(3, 1)
    twin.receives("busy", times=2)  # So one of them has been handled.
    twin.expire("meeting")
    code, stderr = twin.end()
    assert code == 75
    assert "Worker 0 answered: another process has joined as worker 1" in stderr
    assert_succeed(*train(chief, first, start(3, 2)))


def test_a_port_in_use_is_named(start):
    (port,) = free_ports(1)
    with socket.create_server(("", port)):
        workers = [f"127.0.0.1:{port}", "127.0.0.1:1"]
        short = Constant("trainer.distributed.messages:PORT_TIMEOUT", 0.1)
        code, stderr = start(2, 0, workers=workers, hooks=[short]).end()
    assert code == 78
    assert f"Expected to listen on port {port}, for the address {workers[0]}." in stderr
    assert "Address already in use" in stderr


def reach(worker, processes):
    """Returns a connection to the port of a worker's address, once somebody listens there."""
    connections = []

    def connected():
        with contextlib.suppress(ConnectionRefusedError):
            connections.append(socket.create_connection(worker.address, timeout=HANG))
        return connections

    wait_for(connected, *processes)
    return connections[0]


# -- strangers


@pytest.mark.parametrize("secret", [SECRET, pytest.param(None, marks=pytest.mark.full)])
def test_strangers_on_the_port_change_nothing(start, secret):
    chief = start(2, 0, secret=secret)
    silent = [reach(chief, [chief.process])]
    for content in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\n",
        b"[1]\n",
        b'{"ready": 1}\n',
        b"x" * 200_000,
        b'{"hello": 1}',
        b'{"hello": 1}\n',
        b'{"hello": [1], "workers": 1}\n',
        b'{"hello": 1, "workers": ["a:1", "b:1"]}\n',
        b"[" * 60_000 + b"\n",
        b'{"verdict": [0, "", null]}\n',
        b'{"ended": [78, "", "named"]}\n',
    ):
        with reach(chief, [chief.process]) as stranger, contextlib.suppress(ConnectionError):
            stranger.sendall(content)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""  # Its connection is closed, without an answer.
    workers = train(chief, start(2, 1, secret=secret))
    assert_end_well(*workers)
    assert chief.stderr() == ("" if secret else NO_SECRET.notice + "\n")
    silent[0].close()


def test_any_number_of_silent_connections_keeps_nobody_out(start):
    chief = start(2, 0, hooks=[Constant("trainer.distributed.chief:HEARTBEAT_TIMEOUT", HANG)])
    with contextlib.ExitStack() as silent:
        connections = [
            silent.enter_context(reach(chief, [chief.process])) for _ in range(CALLERS + 20)
        ]
        for first in connections[:20]:
            assert first.recv(1) == b""
        assert_succeed(*train(chief, start(2, 1)))


def greet(connection, workers, key, *, secret=True):
    """Greets as worker 1 that knows another secret; returns what it is answered."""
    hello = {"hello": 1, "workers": workers, "nonce": "00" * 16, "secret": secret}
    hello = json.dumps(hello).encode() + b"\n"
    with contextlib.suppress(ConnectionError):
        connection.sendall(hello)
    with connection.makefile("rb") as answers:
        challenge = answers.readline()
        session = Session(key, hello, challenge[65:], caller=True)
        for message in (b'{"heartbeat": 1}\n', b'{"ended": [78, "bad", "named"]}\n'):
            with contextlib.suppress(ConnectionError):
                connection.sendall(session.sign(message).hex().encode() + b" " + message)
        with contextlib.suppress(ConnectionError):
            return challenge, answers.read()
    return challenge, b""


def test_a_squatter_without_the_secret_does_not_keep_the_worker_out(start):
    chief = start(2, 0)
    for key, secret in ((b"another secret", True), (b"", False), (b"", True)):
        with reach(chief, [chief.process]) as squatter:
            challenge, answer = greet(squatter, chief.workers, key, secret=secret)
            assert b'"challenge"' in challenge
            assert answer == b""
    other = start(2, 1)
    workers = train(chief, other)
    assert_end_well(*workers)
    (notice,) = chief.stderr().splitlines()  # of three
    assert notice == (
        "A caller from 127.0.0.1 that greets as worker 1 was turned away: it has another secret. "
        "If it is that worker, start it again with the file that TRAINER_TOKEN_FILE names here."
    )


def test_a_worker_that_ends_after_its_greeting_is_no_stranger(start):
    chief = start(2, 0)
    hello = {"hello": 1, "workers": chief.workers, "nonce": "00" * 16, "secret": True}
    with reach(chief, [chief.process]) as ending, ending.makefile("rb") as answers:
        ending.sendall(json.dumps(hello).encode() + b"\n")
        assert b'"challenge"' in answers.readline()
        ending.shutdown(socket.SHUT_WR)
        assert answers.read() == b""
    assert_succeed(*train(chief, start(2, 1)))  # without a notice


def test_what_a_worker_has_sent_cannot_be_sent_again(start):
    workers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    host, port = workers[0].split(":")
    recorded = []
    with socket.create_server((host, int(port))) as server:
        other = start(2, 1, workers=workers)
        with server.accept()[0] as connection, connection.makefile("rb") as lines:
            recorded.append(lines.readline())
    chief = start(2, 0, workers=workers)
    chief.joined(1)
    with reach(chief, [chief.process]) as stranger, stranger.makefile("rb") as answers:
        stranger.sendall(recorded[0])  # a hello that is well-formed, and was the worker's
        assert b'"challenge"' in answers.readline()
        stranger.sendall(b"0" * 64 + b' {"ended": [78, "", "named"]}\n')
        assert answers.read() == b""
    workers = train(chief, other)
    assert_end_well(*workers)


@pytest.mark.parametrize(
    ("key", "verdict"),
    [
        (b"", [0, "", None]),
        pytest.param(b"another secret", [0, "", None], marks=pytest.mark.full),
        pytest.param(b"", [70, "\x1b[2Jdone", None], marks=pytest.mark.full),
        (b"another secret", [70, "\x1b[2Jdone", None]),
    ],
)
def test_who_is_at_the_chiefs_address_without_the_secret_is_not_believed(start, verdict, key):
    workers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    host, port = workers[0].split(":")
    challenge = json.dumps({"challenge": "00" * 16, "secret": bool(key)}).encode() + b"\n"
    content = json.dumps({"verdict": verdict}).encode() + b"\n"
    with socket.create_server((host, int(port))) as server:
        other = start(2, 1, workers=workers)
        other.tell("meet")
        for _ in range(2):
            with server.accept()[0] as connection, connection.makefile("rb") as lines:
                session = Session(key, lines.readline(), challenge, caller=False)
                connection.sendall(
                    b"".join(
                        session.sign(message).hex().encode() + b" " + message
                        for message in (challenge, content)
                    )
                    + content
                )
                with contextlib.suppress(ConnectionError):
                    assert lines.read() == b'{"heartbeat": 1}\n'  # without a MAC
    assert other.sets("agreeing") == TELL_TIMEOUT
    # The real one comes in time.
    assert_succeed(*train_from(start(2, 0, workers=workers), other))


def test_a_chief_with_another_secret_ends_the_others_with_a_line_of_their_own(start):
    chief = start(2, 0, secret=SECRET[::-1])
    other = start(2, 1)
    other.sets("agreeing")
    other.expire("agreeing")
    code, stderr = other.end()
    assert code == 78
    assert stderr == (
        "task: error: Expected the same secret on all workers, or none. Received: one here, and "
        f"another secret at {chief.name}. Let TRAINER_TOKEN_FILE name a file with the same content "
        "on every worker.\n"
    )
    chief.says("A caller from 127.0.0.1 that greets as worker 1 was turned away: it has another")
    assert chief.process.poll() is None


def test_a_secret_on_worker_0_alone_ends_the_other(start):
    chief, other = start(2, 0), start(2, 1, secret=None)
    other.sets("agreeing")
    other.expire("agreeing")
    code, stderr = other.end()
    assert code == 78
    assert f"Received: none here, and another secret at {chief.name}. Let TRAINER_" in stderr
    chief.says("greets as worker 1 was turned away: it has no secret. If it is that worker")
    assert_end_well(*train(chief, start(2, 1)))


def test_a_secret_on_the_other_worker_alone_ends_both(start):
    chief, other = start(2, 0, secret=None), start(2, 1)
    other.sets("agreeing")
    other.expire("agreeing")
    code, stderr = other.end()
    assert code == 78
    assert f"Received: one here, and no secret at {chief.name}. Let TRAINER_" in stderr
    code, stderr = chief.end()
    assert code == 78
    assert "Received: one on worker 1, none on worker 0. Let TRAINER_TOKEN_FILE name" in stderr


def test_a_secret_that_cannot_be_read_is_named(start):
    chief = start(2, 0, secret=SECRET[:5])
    code, stderr = chief.end()
    assert code == 78
    assert "Expected TRAINER_TOKEN_FILE to name a file with the secret" in stderr
    assert stderr.count("\n") == 1


# -- waiting


def test_who_is_waited_for_is_said_and_why(start):
    workers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    workers += ["digits-2.invalid:2222"]
    chief, other = start(3, 0, 1, workers=workers)
    chief.joined(1)
    assert chief.sets("waiting") == 10
    chief.expire("waiting")
    text = "Waiting for worker 2 (digits-2.invalid:2222): its name cannot be resolved ("
    for worker in (chief, other):
        worker.says(text)
        worker.says(f"They have not started yet, or cannot reach {chief.name}.\n")
    wait_for(lambda: chief.seconds("waiting") == [10, 20], chief.process)
    chief.expire("waiting")
    wait_for(lambda: chief.stderr().count(text) == 2, chief.process)
    assert chief.seconds("meeting") == [30]


def test_a_missing_worker_whose_machine_answers_is_told_from_another_program(start):
    workers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    chief = start(2, 0, workers=workers)
    reach(chief, [chief.process]).close()
    chief.expire("waiting")
    chief.says(f"Waiting for worker 1 ({workers[1]}): connection refused. ")
    host, port = workers[1].split(":")
    with socket.create_server((host, int(port))):
        wait_for(lambda: chief.seconds("waiting") == [10, 20], chief.process)
        chief.expire("waiting")
        chief.says(f"Waiting for worker 1 ({workers[1]}): something else answers there. ")
    assert_end_well(*train(chief, start(2, 1, workers=workers)))


def test_a_worker_says_why_worker_0_cannot_be_reached(start):
    workers = [f"127.0.0.1:{port}" for port in free_ports(2)]
    host, port = workers[0].split(":")
    other = start(2, 1, workers=workers)
    other.tell("meet")

    def says(reason, seconds):
        wait_for(lambda: other.seconds("waiting")[-1:] == [seconds], other.process)
        other.expire("waiting")
        other.says(f"Waiting for worker 0 ({workers[0]}): {reason}.\n")

    says("connection refused", 10)
    with socket.create_server((host, int(port))) as server:
        for _ in range(2):  # The second call comes when the first has been handled.
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")
            connection.close()
        says("something else answers there", 20)
    assert_end_well(*train_from(start(2, 0, workers=workers), other))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (socket.gaierror(-2, "Name or service not known"), "its name cannot be resolved (Name or"),
        (ConnectionRefusedError(111, "Connection refused"), "connection refused"),
        (TimeoutError("timed out"), "no answer"),
        (OSError(113, "No route to host"), "no route to host"),
        (ConnectionError("something else answers there"), "something else answers there"),
    ],
)
def test_why_an_address_cannot_be_reached(error, text):
    assert unreachable(error).startswith(text)


# -- losses


@pytest.mark.parametrize("lost", [0, 1])
def test_a_worker_that_is_killed_is_named(start, lost):
    workers = train(*start(3))
    workers[lost].send(signal.SIGKILL)
    for worker in workers:
        if worker is not workers[lost]:
            assert_lost(worker.end(), workers[lost], "its connection closed")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_worker_whose_process_is_killed_is_named(start, lost):
    workers = train(*start(2))
    workers[lost].send(signal.SIGKILL, parent=False)
    own = f"task: error: killed by SIGKILL. {RESUME_HINT}\n"
    assert workers[lost].end() == (137, own)
    assert_lost(workers[1 - lost].end(), workers[lost], "killed by SIGKILL")


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.full)])
def test_a_worker_whose_process_is_frozen_is_named(start, lost):
    assert FREEZE_TIMEOUT < HEARTBEAT_TIMEOUT
    workers = train(*start(2))
    workers[lost].send(signal.SIGSTOP, parent=False)
    how = "its process was stopped (SIGSTOP)"
    assert_lost(workers[1 - lost].end(), workers[lost], how)
    assert workers[lost].end() == (75, f"task: {how}. {RESUME_HINT}\n")


@pytest.mark.full
@pytest.mark.parametrize("lost", [0, 1])
def test_a_worker_that_is_frozen_whole_is_named(start, lost):
    workers = train(*start(3))
    workers[lost].send(signal.SIGSTOP)
    for worker in workers:
        if worker is not workers[lost]:
            assert_lost(worker.end(), workers[lost], "no heartbeat for 10 s")
    workers[lost].send(signal.SIGCONT)
    assert workers[lost].end()[0] == 75


def test_a_worker_process_ends_with_its_parent(start):
    chief, other = train(*start(2))
    other.send(signal.SIGKILL, child=False)
    assert_lost(chief.end(), other, "its connection closed")
    other.end()  # The worker process would keep stdout open.


def test_a_worker_lost_when_the_chief_has_trained_costs_nothing(start):
    chief, other = train(*start(2))
    chief.do("tell trained")
    other.send(signal.SIGKILL)
    other.end()
    chief.tell("end")
    notice = (
        f"Worker 0 is done. Waiting up to 30 s to tell {other.name}, lost at the very end; "
        "Ctrl-C ends that.\n"
    )
    chief.says(notice)
    assert start(2, 1).end() == (0, "")
    assert chief.end() == (0, notice)


def test_a_chief_that_waits_for_a_lost_worker_can_be_ended(start):
    chief, other = train(*start(2))
    chief.do("tell trained")
    other.send(signal.SIGKILL)
    other.end()
    chief.tell("end")
    chief.says("Worker 0 is done. Waiting up to 30 s to tell ")
    chief.send(signal.SIGTERM, child=False)
    assert chief.end()[0] == 0


# -- errors


@pytest.mark.parametrize(
    ("failing", "name", "code", "text"),
    [
        (1, "data", 65, "the data is damaged."),
        (0, "data", 65, "the data is damaged."),
        (1, "defect", 1, "AssertionError: a defect"),
    ],
)
def test_an_error_before_the_training_ends_all(start, failing, name, code, text):
    workers = start(3)
    workers[0].joined(1, 2)
    workers[failing].tell(f"raise {name}")
    for index, worker in enumerate(workers):
        ended, stderr = worker.end()
        assert ended == code
        by = "" if index == failing else f"{workers[failing].name}: "
        assert stderr.splitlines()[-1].startswith(f"task: error: {by}{text}")


@pytest.mark.parametrize("failing", [0, 1])
def test_out_of_memory_ends_all_at_once(start, failing):
    workers = train(*start(2))
    workers[failing].tell("raise memory")
    for index, worker in enumerate(workers):
        by = "" if index == failing else f"{workers[failing].name}: "
        text = f"task: error: {by}the device has too little memory.\n"
        assert worker.end() == (78, text)
        assert worker.seconds("loss") == []


def test_an_error_of_the_chief_while_it_saves_ends_all(start):
    chief, other = train(*start(2))
    other.do("tell trained")
    other.tell("end")
    chief.handles("ended")
    chief.do("tell trained")
    chief.tell("raise disk")
    assert chief.end() == (73, "task: error: the disk is full.\n")
    assert other.end() == (73, f"task: error: {chief.name}: the disk is full.\n")


@pytest.mark.parametrize(
    ("name", "text"),
    [("peer", "InternalError: no kernel image"), ("defect", "AssertionError: a defect")],
)
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_while_all_are_alive_ends_all_with_itself(start, failing, name, text):
    workers = train(*start(2))
    workers[failing].tell(f"raise {name}")
    # By then the loss of a peer would have been seen.
    assert workers[0].sets("loss") == LOSS_TIMEOUT > HEARTBEAT_TIMEOUT
    workers[0].expire("loss")
    other = workers[1 - failing]
    line = f"task: error: {workers[failing].name}: {text}. {RESUME_HINT}\n"
    assert other.end() == (1, line)
    code, stderr = workers[failing].end()
    assert code == 1
    assert stderr.startswith("Traceback (most recent call last):\n")
    assert stderr.endswith(f"task: error: {text}. {RESUME_HINT}\n")


def test_a_traceback_is_shown_however_long_its_encoding_is(start):
    chief, other = train(*start(2))
    other.tell("raise far")
    chief.sets("loss")
    chief.expire("loss")
    code, stderr = other.end()
    assert code == 1
    assert stderr.count("\N{SNOWMAN}") > 19_000
    code, stderr = chief.end()
    assert code == 1
    assert stderr.startswith(f"task: error: {other.name}: AssertionError: \N{SNOWMAN}")


def test_an_error_gives_way_to_the_loss_that_explains_it(start):
    chief, lost, other = train(*start(3))
    chief.tell("raise peer")
    other.tell("raise peer")
    chief.handles("ended")
    other.sets("telling")
    chief.sets("loss")
    lost.send(signal.SIGKILL)
    for worker in (chief, other):
        assert_lost(worker.end(), lost, "its connection closed")


@pytest.mark.parametrize(
    ("command", "code", "how"),
    [("abort", 134, "killed by SIGABRT"), ("exit", 3, "it ended with exit code 3 and no report")],
)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_crash_is_a_loss_of_its_worker(start, lost, command, code, how):
    workers = train(*start(2))
    workers[lost].tell(command)
    workers[0].sets("loss")
    workers[0].expire("loss")
    assert_lost(workers[1 - lost].end(), workers[lost], how)
    assert workers[lost].end() == (code, f"task: error: {how}. {RESUME_HINT}\n")


@pytest.mark.parametrize("command", ["babble", "hush"])
def test_a_worker_process_that_no_longer_reports_is_ended(start, command):
    short = Constant("trainer.distributed.worker:CLOSE_TIMEOUT", 0.1)
    workers = train(*start(2, hooks=[short]))
    workers[1].tell(command)
    workers[0].sets("loss")
    workers[0].expire("loss")
    how = "it no longer reports to its parent process"
    assert workers[1].end() == (1, f"task: error: {how}. {RESUME_HINT}\n")
    assert workers[0].end() == (1, f"task: error: {workers[1].name}: {how}. {RESUME_HINT}\n")


def test_an_error_gives_way_to_a_later_crash(start):
    chief, crashed, other = train(*start(3))
    other.tell("raise peer")
    chief.sets("loss")
    crashed.tell("abort")
    chief.handles("ended", times=2)
    chief.expire("loss")
    for worker in (chief, other):
        assert_lost(worker.end(), crashed, "killed by SIGABRT")
    assert crashed.end()[0] == 134


# -- progress


@pytest.mark.parametrize("hung", [0, 1])
def test_a_run_without_progress_ends_and_says_after_which_step(start, hung):
    workers = train(*start(2, step_timeout=40))
    for worker in workers:
        worker.do("step 1 11")
        worker.do("step 1 12")
        assert worker.seconds("step") == [1200, 40, 40]
    workers[hung].expire("step")
    text = f"no step ended for 40 s after epoch 1, step 12 (step_timeout). {RESUME_HINT}"
    for worker in workers:
        assert worker.end() == (75, f"task: {text}\n")


def test_a_run_that_never_takes_a_step_ends(start):
    workers = train(*start(2))
    workers[0].expire("step")
    text = "no step ended for 1200 s after all workers connected (step_timeout)"
    for worker in workers:
        assert worker.end() == (75, f"task: {text}. {RESUME_HINT}\n")


def test_what_a_script_does_between_two_trainings_may_take_any_time(start):
    workers = train(*start(2))
    for worker in workers:
        worker.do("tell idle")
        worker.expire("step")
    assert_succeed(*workers)


def test_each_training_of_a_script_compiles_its_own_first_step(start):
    workers = train(*start(2, step_timeout=40))
    for worker in workers:
        for command in ("step 1 1", "step 1 2", "tell idle", "tell training"):
            worker.do(command)
        assert worker.seconds("step") == [1200, 40, 40, 1200]
    workers[0].expire("step")
    text = "no step ended for 1200 s after training began (step_timeout)"
    for worker in workers:
        assert worker.end() == (75, f"task: {text}. {RESUME_HINT}\n")


def test_saving_the_model_is_no_hang(start):
    workers = train(*start(2))
    for worker in workers:
        worker.do("step 1 1")
        assert worker.seconds("step") == [1200, 300]
        worker.do("tell trained")
        worker.expire("step")
    assert_succeed(*workers)


# -- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_signal_to_a_worker_that_is_blocked_ends_all_in_time(start, number, stopped):
    workers = train(*start(2))
    workers[stopped].send(number, child=False)
    assert workers[stopped].sets("stopping") == STOP_TIMEOUT < 10
    workers[stopped].expire("stopping")
    how = f"stopped by {number.name} while it waited for another worker"
    assert workers[stopped].end() == (75, f"task: {how}. {RESUME_HINT}\n")
    assert_lost(workers[1 - stopped].end(), workers[stopped], how)


def test_a_signal_to_all_stops_all(start):
    workers = train(*start(2))
    for worker in workers:
        worker.send(signal.SIGTERM, child=False)
        worker.sets("stopping")
    for worker in workers:
        worker.tell("stop")
    for worker in workers:
        assert worker.end() == (75, "task: stopped by SIGTERM. Saved.\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(start, number, code):
    _, other = train(*start(2))
    other.send(number, child=False)
    other.sets("stopping")
    other.send(number, child=False)
    ended, stderr = other.end()
    assert ended == code
    assert f"stopped by a second {number.name}. Earlier checkpoints are intact." in stderr


def test_signals_without_end_change_no_exit_code(start):
    _, other = train(*start(2))
    while other.process.poll() is None:  # Until it is gone: while it ends, too.
        other.send(signal.SIGTERM, child=False)
    ended, stderr = other.end()
    assert ended == 75, stderr
    assert "Traceback" not in stderr


def test_a_worker_process_that_is_stopped_before_it_has_begun_is_no_crash():
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        outcome = _explain(-number)
        assert outcome == (code, f"stopped by {number.name} before it had begun", "named")
    assert _explain(-signal.SIGSEGV).kind == "crashed"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_while_a_worker_waits_for_the_others_is_heeded(start, number, code):
    chief = start(2, 0)
    chief.tell("meet")
    chief.handles("ready")
    chief.send(number, child=False)
    assert chief.end()[0] == code
