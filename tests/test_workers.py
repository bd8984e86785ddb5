"""Several workers, each a process of its own on this machine: the command as a user runs it.

What a worker's parent does without TensorFlow has more cases in ``test_supervisor``.
"""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import assert_alike, assert_gradients_alike, outcome

from trainer.checkpoint import FOLDER
from trainer.cluster import Cluster
from trainer.launch import free_ports
from trainer.supervisor import STANDS

RUN = ("--epochs", 2, "--train-limit", 1024, "--test-limit", 200, "--threads", 1)
EAGER = (*RUN, "--steps-per-execution", 1, "--checkpoint-every", 2, "--log-format", "json")
STEPS = 2 * 8


class Group:
    """Workers that train together; worker 0's output folder is ``out``."""

    def __init__(self, command, count):
        self.command = command
        self.workers = tuple(f"127.0.0.1:{port}" for port in free_ports(count))
        self.processes = {}

    def start(self, *flags, only=None):
        for index in range(len(self.workers)) if only is None else only:
            # The others need no folder, and must make none.
            folder = "out" if index == 0 else "nowhere"
            self.command.env["TF_CONFIG"] = Cluster(self.workers, index).tf_config
            self.processes[index] = self.command.start(*flags, "--output-dir", folder)
        del self.command.env["TF_CONFIG"]
        return self

    def child(self, index):
        """Returns the process of a worker that trains."""
        pid = self.processes[index].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    def send(self, number, index, *, child=False):
        pids = [self.child(index)] if child else []
        self.processes[index].send_signal(number)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(self, index, *, within=60):
        stdout, stderr = self.processes[index].communicate(timeout=within)
        return self.processes[index].returncode, stdout, stderr

    def until(self, condition):
        end = time.monotonic() + 120
        while not condition():
            assert all(one.poll() is None for one in self.processes.values()), [
                self.end(index) for index, one in self.processes.items() if one.poll() is not None
            ]
            assert time.monotonic() < end, "it never came"
            time.sleep(0.002)

    def name(self, index):
        return f"worker {index} ({self.workers[index]})"

    def close(self):
        for process in self.processes.values():
            process.kill()
            process.communicate()


@pytest.fixture
def group(command):
    made = []

    def make(count):
        made.append(Group(command, count))
        return made[-1]

    yield make
    for one in made:
        one.close()


def compute(replicas, name, count, **arguments):
    """Calls a function of ``replicas.py`` in several workers; returns each one's result."""
    workers = tuple(f"127.0.0.1:{port}" for port in free_ports(count))
    files = [{"file": str(replicas.command.folder / f"{n}.npz")} for n in range(count)]
    started = [
        replicas.start(
            name,
            tf_config=Cluster(workers, index).tf_config,
            **arguments,
            **(files[index] if name == "gradients" else {}),
        )
        for index in range(count)
    ]
    return [result() for result in started]


def test_what_workers_exchange_arrives(replicas):
    for index, seen in enumerate(compute(replicas, "exchanged", 2)):
        assert seen == {
            "count": 2,
            "gathered": [10, 11],
            "first": 10,
            "shared": list(range(7)),
            "equal": [True, False],
        }, index


@pytest.mark.parametrize(
    ("count", "batch_size", "examples"),
    [
        (2, 128, 640),
        pytest.param(2, 128, 5120, marks=pytest.mark.full),
        pytest.param(3, 126, 5120, marks=pytest.mark.full),
    ],
)
def test_several_workers_train_as_one(replicas, count, batch_size, examples):
    data = {"examples": examples, "batch_size": batch_size}
    several = compute(replicas, "losses", count, **data)
    assert len({one["weights"] for one in several}) == 1
    one = replicas.compute("losses", **data)
    assert len(one["losses"]) == -(-examples // batch_size)
    for each in several:
        assert_alike(each, one)


@pytest.mark.full
@pytest.mark.parametrize(("count", "batch_size"), [(2, 64), (3, 63)])
def test_gradients_are_those_of_one(replicas, tmp_path, count, batch_size):
    data = {"examples": 100, "batch_size": batch_size}
    compute(replicas, "gradients", count, **data)
    replicas.compute("gradients", file=str(tmp_path / "one.npz"), **data)
    assert_gradients_alike(tmp_path / "0.npz", tmp_path / "one.npz")


@pytest.mark.full
@pytest.mark.parametrize("counts", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_workers(replicas, tmp_path, counts):
    """At the same step, in the same order of data, with the state it had."""
    data = {"examples": 640, "batch_size": 128}
    unbroken = replicas.compute("losses", **data)
    before, after = (
        compute(replicas, "losses", count, folder=str(tmp_path), stop_at=stop_at, **data)[0]
        for count, stop_at in zip(counts, (3, None), strict=True)
    )
    assert len(before["losses"]) == 3
    assert_alike({**after, "losses": before["losses"] + after["losses"]}, unbroken)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What two workers end with that nothing disturbs."""
    from conftest import Command

    folder = tmp_path_factory.mktemp("undisturbed")
    two = Group(Command(folder, folder), 2).start(*RUN)
    for index in (0, 1):
        code, stdout, stderr = two.end(index, within=200)
        assert code == 0, stderr
        # Worker 0 says that both have the same weights; the other one says nothing.
        assert ("the 2 workers hold the same weights" in stdout) == (index == 0)
        assert stderr == ""
    assert not (folder / "nowhere").exists()
    return outcome(folder / "out")


def steps_saved(folder):
    return max((int(p.stem.split("-")[1]) for p in (folder / FOLDER).glob("*.index")), default=0)


def stop(two, folder, number, step):
    """Stops a run by a signal to one worker, anywhere between this step and the next save."""
    if step is None:  # while it saves
        two.until(lambda: any("temp" in path.name for path in folder.glob(f"{FOLDER}/*")))
    else:
        two.until(lambda: steps_saved(folder) >= step)
        time.sleep(random.uniform(0, 1))
    stopped = 0 if step is None else random.choice([0, 1])
    two.send(number, stopped, child=number == signal.SIGKILL)
    for index in (0, 1):
        code, _, stderr = two.end(index, within=20)
        if code == 0:  # It came too late.
            continue
        if number == signal.SIGKILL and index == stopped:
            assert code in (-9, 137)
        elif number == signal.SIGKILL:
            assert code == 75, stderr
            assert f"{two.name(stopped)} was lost: " in stderr
            assert stderr.endswith(f"{STANDS}\n")
        else:
            assert code == 75, stderr
            assert f"stopped by {number.name}" in stderr
            assert "the same command goes on from there" in stderr


@pytest.mark.parametrize(
    ("number", "steps"),
    [
        (signal.SIGKILL, [None, 7]),
        (signal.SIGTERM, [2, 9]),
        pytest.param(signal.SIGKILL, 10, marks=pytest.mark.full),
        pytest.param(signal.SIGTERM, 10, marks=pytest.mark.full),
    ],
)
def test_two_workers_stopped_at_any_step_end_with_the_same_bits(
    group, command, undisturbed, number, steps
):
    out = command.folder / "out"
    if steps == 10:
        steps = sorted(random.sample(range(1, STEPS), 10))
    for step in steps:
        stop(group(2).start(*EAGER), out, number, step)
        if (out / "mnist.h5").exists():
            break
    if not (out / "mnist.h5").exists():
        two = group(2).start(*EAGER)
        assert [two.end(index, within=200)[0] for index in (0, 1)] == [0, 0]
    assert outcome(out) == undisturbed
    assert not (out / FOLDER).exists()


@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=pytest.mark.full)])
def test_a_frozen_worker_is_named_within_twenty_seconds(group, command, lost):
    two = group(2).start(*EAGER)
    two.until(lambda: steps_saved(command.folder / "out") >= 2)
    os.kill(two.child(lost), signal.SIGSTOP)
    how = "its process was stopped (SIGSTOP)"
    code, _, stderr = two.end(1 - lost, within=20)
    assert (code, stderr) == (
        75,
        f"python -m trainer.task: {two.name(lost)} was lost: {how}. {STANDS}\n",
    )


@pytest.mark.full
@pytest.mark.parametrize("lost", [0, 1])
def test_a_worker_frozen_whole_is_named_within_twenty_seconds(group, command, lost):
    two = group(2).start(*EAGER)
    two.until(lambda: steps_saved(command.folder / "out") >= 2)
    two.send(signal.SIGSTOP, lost, child=True)
    code, _, stderr = two.end(1 - lost, within=20)
    assert code == 75
    assert f"{two.name(lost)} was lost: no sign of life for 10 s. {STANDS}" in stderr
    assert stderr.count("\n") == 1


@pytest.mark.full
def test_a_worker_that_is_late_is_waited_for(group, command):
    two = group(2).start(*RUN, only=[0])
    time.sleep(15)  # as long as worker 0 takes to be ready
    two.start(*RUN, only=[1])
    assert [two.end(index, within=200)[0] for index in (0, 1)] == [0, 0]


@pytest.mark.full
def test_a_worker_that_never_comes_is_named(group):
    two = group(2).start(*RUN, "--startup-timeout", 12, only=[0])
    code, _, stderr = two.end(0)
    assert code == 75
    assert stderr == (
        f"python -m trainer.task: {two.name(1)} did not come within 12 s. Start the same command "
        "there too; --startup-timeout waits longer.\n"
    )


def test_a_worker_with_another_seed_is_refused(group):
    two = group(2).start(*RUN, only=[0]).start(*RUN, "--seed", 1, only=[1])
    for index in (0, 1):
        code, stdout, stderr = two.end(index)
        assert (code, stdout) == (78, "")
        assert f"Received: seed=1 where worker 0 has seed=0, on {two.name(1)}." in stderr
        assert stderr.count("\n") == 1


def test_a_batch_that_does_not_divide_is_refused_by_all(group):
    three = group(2).start(*RUN, "--batch-size", 127)
    for index in (0, 1):
        code, _, stderr = three.end(index)
        assert code == 2
        assert "multiple of the 2 replicas. Received: batch_size=127. Use 126 or 128." in stderr
        assert stderr.count("\n") == 1
