"""Who is told what when a worker is late, lost, frozen, different or done.

The parents are the real ones, in processes and on sockets of their own. What they watch follows a
plan instead of training, so that each case takes seconds; ``test_workers`` has the real thing.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT

from trainer.distributed.supervisor import STANDS
from trainer.launch import free_ports

PARENT = """
import json, sys
from dataclasses import dataclass
from trainer import cli
from trainer.distributed import supervisor
from trainer.distributed.cluster import Cluster

@dataclass
class Config:
    workers: str
    index: int
    startup_timeout: float
    child: str
    plan: str

def command(config):
    command = [sys.executable, "-c", config.child, config.plan]
    cluster = Cluster(tuple(json.loads(config.workers)), config.index)
    supervisor.run(command, cluster, startup_timeout=config.startup_timeout)

sys.exit(cli.run("task", Config, command))
"""

# Its plan: facts; seconds of training, in which it heeds signals unless deaf; how that ends; and
# the seconds that it saves for afterwards.
CHILD = """
import json, os, sys, time
from trainer import cli, errors
from trainer.distributed import worker as child

plan = {"facts": {}, "seconds": 0.5, "deaf": False, "ends": None, "saves": 0}
plan |= json.loads(sys.argv[1])
link = child.Link.find(os.environ)

def train():
    with cli.Signals() as signals:
        if plan["ends"] == "data":
            raise errors.DataError("the data is damaged.")
        try:
            link.meet(plan["facts"])
        except KeyboardInterrupt as interrupt:
            if str(interrupt) == "SIGTERM":
                raise errors.StoppedError("stopped by SIGTERM.") from None
            raise
        signals.defer()
        link.tell("connected")
        print("running", os.getpid(), flush=True)
        end = time.monotonic() + plan["seconds"]
        while time.monotonic() < end:
            if signals.received and not plan["deaf"]:
                raise errors.StoppedError(f"stopped by {signals.received}. Saved.")
            time.sleep(0.02)
        if plan["ends"] == "peer":
            raise child.PeerError("TensorFlow has lost another worker.")
        if plan["ends"] == "abort":
            os.abort()
        if plan["ends"] == "defect":
            raise AssertionError("a defect")
        link.tell("trained")
        print("trained", flush=True)
        time.sleep(plan["saves"])
        if plan["ends"] == "disk":
            raise errors.OutputError("the disk is full.")

link.run(train)
"""


class Run:
    """Some workers of a run."""

    def __init__(self, count, startup_timeout=20):
        self.workers = [f"127.0.0.1:{port}" for port in free_ports(count)]
        self.startup_timeout = startup_timeout
        self.processes = {}
        self.pids = {}

    def start(self, *indices, workers=None, startup_timeout=None, **plan):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        flags = {
            "workers": json.dumps(workers or self.workers),
            "startup-timeout": startup_timeout or self.startup_timeout,
            "child": CHILD,
            "plan": json.dumps(plan),
        }
        for index in indices:
            argv = [f"--{name}={value}" for name, value in {**flags, "index": index}.items()]
            self.processes[index] = subprocess.Popen(
                [sys.executable, "-c", PARENT, *argv],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )

    def running(self, *indices):
        """Waits until these train."""
        for index in indices:
            word, pid = self.processes[index].stdout.readline().split()
            assert word == "running"
            self.pids[index] = int(pid)

    def trained(self, index):
        assert self.processes[index].stdout.readline() == "trained\n"

    def send(self, number, index, *, child=True, parent=True):
        """Sends a signal to both processes of a worker, or one."""
        if parent:
            self.processes[index].send_signal(number)
        if child:
            # A parent that is killed, or goes on and finds its peers gone, may end it first.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[index], number)

    def end(self, index, *, within=20):
        """Waits for a worker's end; returns its exit code and what it said."""
        _, stderr = self.processes[index].communicate(timeout=within)
        return self.processes[index].returncode, stderr

    def name(self, index):
        return f"worker {index} ({self.workers[index]})"


@pytest.fixture
def run():
    made = []

    def make(*arguments, **options):
        made.append(Run(*arguments, **options))
        return made[-1]

    yield make
    for process in [process for one in made for process in one.processes.values()]:
        process.kill()
        process.communicate()


def assert_lost(ended, worker, how):
    code, said = ended
    assert code == 75, said
    assert said.startswith(f"task: {worker} was lost: {how}"), said
    assert said.endswith(f"{STANDS}\n")
    assert said.count("\n") == 1


def test_all_end_well_and_the_chief_last(run):
    three = run(3)
    three.start(0, 1, 2)
    for index in (1, 2):
        assert three.end(index) == (0, "")
    assert three.end(0) == (0, "")


def test_one_that_is_late_is_waited_for(run):
    two = run(2)
    two.start(0)
    time.sleep(2)
    two.start(1)
    assert [two.end(index) for index in (0, 1)] == [(0, "")] * 2


def test_one_whose_chief_is_late_waits(run):
    two = run(2)
    two.start(1)
    time.sleep(2)
    two.start(0)
    assert [two.end(index) for index in (0, 1)] == [(0, "")] * 2


@pytest.mark.full
def test_workers_that_never_come_are_named(run):
    three = run(3, startup_timeout=3)
    three.start(0, 2)
    for index in (0, 2):
        code, said = three.end(index)
        assert code == 75
        assert said.startswith(f"task: {three.name(1)} did not come within 3 s.")


def test_a_chief_that_never_comes_is_named(run):
    two = run(2, startup_timeout=2)
    two.start(1)
    code, said = two.end(1)
    assert (code, said.split(".")[0]) == (75, f"task: {two.name(0).split('.')[0]}")
    assert f"{two.name(0)} did not come within 2 s." in said


@pytest.mark.parametrize(
    ("facts", "difference"),
    [
        ({"seed": 1, "keras": "3.15.1"}, "seed=1 where worker 0 has seed=0"),
        ({"seed": 0, "keras": "3.14.0"}, "keras='3.14.0' where worker 0 has keras='3.15.1'"),
    ],
)
def test_one_that_would_train_something_else_is_refused(run, facts, difference):
    three = run(3)
    three.start(0, 1, facts={"seed": 0, "keras": "3.15.1"})
    three.start(2, facts=facts)
    for index in range(3):
        code, said = three.end(index)
        assert code == 78
        assert f"Received: {difference}, on {three.name(2)}." in said
        assert said.count("\n") == 1


def test_one_with_another_list_of_workers_is_refused(run):
    two = run(2)
    two.start(0)
    two.start(1, workers=[two.workers[0], "127.0.0.1:1"])
    for index in (0, 1):
        code, said = two.end(index)
        assert code == 78
        assert "Expected one list of workers everywhere. Received: " in said


@pytest.mark.full
def test_one_that_comes_twice_waits_for_the_first_to_go(run):
    three = run(3)
    three.start(0, 1)
    time.sleep(2)
    twin = Run(0, startup_timeout=3)
    twin.workers = three.workers
    twin.start(1)
    code, said = twin.end(1)
    assert code in (75, 78)  # its port is in use where the first one's TensorFlow has begun
    assert "another process has joined as worker 1" in said
    three.start(2)
    assert [three.end(index) for index in range(3)] == [(0, "")] * 3


@pytest.mark.full
def test_a_port_in_use_is_named(run):
    two = run(2)
    port = two.workers[0].split(":")[1]
    with socket.create_server(("", int(port))):
        two.start(0)
        code, said = two.end(0)
    assert code == 78
    assert f"Expected to listen at port {port}" in said
    assert "Address already in use" in said


def test_strangers_on_the_port_change_nothing(run):
    two = run(2)
    two.start(0)
    host, port = two.workers[0].split(":")
    end = time.monotonic() + 20
    sent = [b"GET / HTTP/1.1\r\n\r\n", b"\xff\n", b"[1]\n", b'{"ready": 1}\n', b"x" * 200_000, b""]
    held = []
    for content in sent:
        while True:
            try:
                held.append(socket.create_connection((host, int(port))))
                break
            except ConnectionRefusedError:
                assert time.monotonic() < end
                time.sleep(0.05)
        with contextlib.suppress(OSError):
            held[-1].sendall(content)
    two.start(1)
    assert [two.end(index) for index in (0, 1)] == [(0, "")] * 2
    for one in held:
        one.close()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_worker_that_is_killed_is_named_at_once(run, lost):
    three = run(3)
    three.start(0, 1, 2, seconds=60)
    three.running(0, 1, 2)
    three.send(signal.SIGKILL, lost)
    start = time.monotonic()
    for index in {0, 1, 2} - {lost}:
        assert_lost(three.end(index), three.name(lost), "its connection closed")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("lost", [0, 1])
def test_a_worker_whose_training_is_killed_is_named_at_once(run, lost):
    two = run(2)
    two.start(0, 1, seconds=60)
    two.running(0, 1)
    two.send(signal.SIGKILL, lost, parent=False)
    assert two.end(lost) == (137, f"task: error: killed by SIGKILL. {STANDS}\n")
    assert_lost(two.end(1 - lost), two.name(lost), "killed by SIGKILL")


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.full)])
def test_a_worker_whose_training_is_frozen_is_named(run, lost):
    two = run(2)
    two.start(0, 1, seconds=60)
    two.running(0, 1)
    two.send(signal.SIGSTOP, lost, parent=False)
    how = "its process was stopped (SIGSTOP)"
    assert_lost(two.end(1 - lost), two.name(lost), how)
    assert two.end(lost) == (75, f"task: {how}. {STANDS}\n")


@pytest.mark.full
@pytest.mark.parametrize("lost", [0, 1])
def test_a_worker_that_is_frozen_whole_is_named(run, lost):
    three = run(3)
    three.start(0, 1, 2, seconds=90)
    three.running(0, 1, 2)
    three.send(signal.SIGSTOP, lost)
    start = time.monotonic()
    for index in {0, 1, 2} - {lost}:
        assert_lost(three.end(index), three.name(lost), "no sign of life for 10 s")
    assert time.monotonic() - start < 20
    three.send(signal.SIGCONT, lost)
    assert three.end(lost)[0] == 75


def test_one_without_its_parent_ends(run):
    two = run(2)
    two.start(0, 1, seconds=60)
    two.running(0, 1)
    two.send(signal.SIGKILL, 1, child=False)
    assert_lost(two.end(0), two.name(1), "its connection closed")
    end = time.monotonic() + 10
    while Path(f"/proc/{two.pids[1]}").exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_worker_lost_when_the_chief_has_trained_costs_nothing(run):
    two = run(2, startup_timeout=30)
    two.start(0, saves=2)
    two.start(1, seconds=60)
    two.running(0, 1)
    two.trained(0)
    two.send(signal.SIGKILL, 1)
    time.sleep(3)  # The chief has saved, and waits for the one that does not know.
    assert two.processes[0].poll() is None
    two.processes.pop(1).communicate()
    two.start(1)
    assert two.end(1) == (0, "")
    code, said = two.end(0)
    assert code == 0
    assert said == (
        f"The model is saved. Waiting up to 30 s to tell {two.name(1)}, lost at the very end; "
        "Ctrl-C ends that.\n"
    )


def test_a_chief_that_waits_for_a_lost_worker_can_be_ended(run):
    two = run(2)
    two.start(0)
    two.start(1, seconds=60)
    two.running(0, 1)
    two.trained(0)
    two.send(signal.SIGKILL, 1)
    time.sleep(1.5)
    two.processes[0].terminate()
    assert two.end(0, within=5)[0] == 0


@pytest.mark.parametrize(("failing", "ends", "code"), [(1, "data", 65), (0, "disk", 73)])
def test_all_end_with_the_error_of_one(run, failing, ends, code):
    three = run(3)
    text = {"data": "the data is damaged.", "disk": "the disk is full."}[ends]
    three.start(failing, ends=ends)
    three.start(*{0, 1, 2} - {failing}, seconds=60 if failing else 0.5)
    for index in range(3):
        by = "" if index == failing else f"{three.name(failing)}: "
        assert three.end(index) == (code, f"task: error: {by}{text}\n")


@pytest.mark.parametrize(
    ("number", "stopped"),
    [
        (signal.SIGTERM, 0),
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.full),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.full),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.full),
    ],
)
def test_a_signal_to_one_that_waits_for_a_frozen_peer_ends_it_within_ten_seconds(
    run, number, stopped
):
    two = run(2)
    two.start(0, 1, seconds=60, deaf=True)
    two.running(0, 1)
    two.send(signal.SIGSTOP, 1 - stopped)
    two.send(number, stopped, child=False)
    code, said = two.end(stopped, within=10)
    assert code == 75
    assert said == (
        f"task: stopped by {number.name} while it waited for another worker. {STANDS}\n"
    )
    two.send(signal.SIGCONT, 1 - stopped)
    assert two.end(1 - stopped)[0] == 75


def test_a_signal_to_all_stops_all(run):
    two = run(2)
    two.start(0, 1, seconds=60)
    two.running(0, 1)
    for index in (0, 1):
        two.send(signal.SIGTERM, index, child=False)
    for index in (0, 1):
        assert two.end(index) == (75, "task: stopped by SIGTERM. Saved.\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(run, number, code):
    two = run(2)
    two.start(0, 1, seconds=60, deaf=True)
    two.running(0, 1)
    two.send(number, 1, child=False)
    time.sleep(0.5)
    two.send(number, 1, child=False)
    ended, said = two.end(1, within=3)
    assert ended == code
    assert f"stopped by a second {number.name}. The last checkpoint stands." in said


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)]
)
def test_a_signal_while_it_waits_for_the_others_is_heeded(run, number):
    two = run(2)
    two.start(0)
    time.sleep(2)
    two.send(number, 0, child=False)
    code, said = two.end(0, within=12)
    assert code == (75 if number == signal.SIGTERM else 130), said


def test_what_tensorflow_says_gives_way_to_who_was_lost(run):
    three = run(3)
    three.start(0, 2, seconds=2, ends="peer")
    three.start(1, seconds=60)
    three.running(0, 1, 2)
    time.sleep(3)
    three.send(signal.SIGKILL, 1)
    for index in (0, 2):
        assert_lost(three.end(index, within=8), three.name(1), "its connection closed")


@pytest.mark.full
@pytest.mark.parametrize(
    ("ends", "code", "how"),
    [("abort", 134, "killed by SIGABRT"), ("defect", 1, "a defect of the program")],
)
@pytest.mark.parametrize("lost", [0, 1])
def test_an_end_that_nothing_else_explains_is_its_own(run, lost, ends, code, how):
    two = run(2)
    two.start(lost, seconds=1, ends=ends)
    two.start(1 - lost, seconds=60)
    assert_lost(two.end(1 - lost), two.name(lost), how)
    ended, said = two.end(lost)
    assert ended == code
    assert how in said.splitlines()[-1]
