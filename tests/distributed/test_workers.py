"""Several workers, each a process of its own on this machine, and one, stopped and resumed: the
command as a user runs it.

What a worker's parent does without TensorFlow has more cases in ``test_supervisor``.
"""

import contextlib
import functools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from support import Command, assert_alike, assert_gradients_alike, outcome

from trainer.distributed.cluster import Cluster
from trainer.distributed.local import free_ports
from trainer.distributed.supervisor import CHECKPOINT_STANDS as STANDS
from trainer.training.checkpoint import FOLDER

RUN = ("--epochs", 2, "--train-limit", 768, "--test-limit", 100, "--threads", 1, "--no-report")
EAGER = (*RUN, "--steps-per-execution", 1, "--checkpoint-every", 1, "--log-format", "json")


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
            # A list of one is a worker alone.
            self.command.env["TF_CONFIG"] = Cluster(self.workers, index).tf_config
            self.processes[index] = self.command.start(*flags, "--output-dir", folder)
        del self.command.env["TF_CONFIG"]
        return self

    def child(self, index):
        """Returns the process of a worker that trains."""
        pid = self.processes[index].pid
        with contextlib.suppress(OSError, ValueError):  # It has ended.
            return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
        return None

    def send(self, number, index, *, child=False):
        pids = [self.child(index)] if child else []
        self.processes[index].send_signal(number)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(pid, number)

    def end(self, index, *, within=60):
        stdout, stderr = self.processes[index].communicate(timeout=within)
        return self.processes[index].returncode, stdout, stderr

    def until(self, condition):
        end = time.monotonic() + 120
        while not condition():
            if any(one.poll() is not None for one in self.processes.values()):
                assert condition(), [self.end(index) for index in self.processes]
                return
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
    return replicas.compute_together(name, [arguments] * count)


@pytest.mark.full
def test_what_workers_exchange_arrives(replicas):
    for index, seen in enumerate(compute(replicas, "exchanged", 2)):
        assert seen == {
            "count": 2,
            "gathered": [10, 11],
            "first": 10,
            "shared": list(range(7)),
            "equal": [True, False],
            "summed": [[1.0, 1.0], 2, 1.0],
            "mean": 0.5,
            "sparse": [[0.0, 0.0], [1.0, 1.0]],
            "eager": 3.0,
            "by_ring": True,
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
    files = [{"file": str(tmp_path / f"{index}.npz")} for index in range(count)]
    replicas.compute_together("gradients", [{**data, **file} for file in files])
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
    """Gives what one worker or two end with that nothing disturbs."""

    @functools.cache
    def of(count):
        folder = tmp_path_factory.mktemp("undisturbed")
        workers = Group(Command(folder, folder), count).start(*RUN)
        for index in range(count):
            code, stdout, stderr = workers.end(index, within=200)
            assert (code, stderr) == (0, "")
            # Worker 0 shows progress; another one says how it ended, and nothing else.
            last = f"worker {index} of 2 has the same weights as the others, bit for bit: SHA-256 "
            assert (last in stdout) == (count == 2)
            assert (stdout.count("\n") == 1) == (index == 1)
        assert not (folder / "nowhere").exists()
        return outcome(folder / "out")

    return of


def steps_saved(folder):
    return max((int(p.stem.split("-")[1]) for p in (folder / FOLDER).glob("*.index")), default=0)


def stop(workers, folder, number, *, in_save=False):
    """Stops a run by a signal to one worker: at a random step, or while it saves. Returns whether
    it was stopped before its end.
    """
    count = len(workers.workers)
    workers.start(*EAGER)
    # Early enough that there are steps left for more stops.
    step = random.randint(1, 3) + steps_saved(folder)

    def is_time():
        if in_save:
            return any("temp" in path.name for path in folder.glob(f"{FOLDER}/*"))
        return steps_saved(folder) >= step

    workers.until(lambda: is_time() or (folder / "mnist.h5").exists())
    time.sleep(0 if in_save else random.uniform(0, 0.3))
    stopped = 0 if in_save else random.randrange(count)
    workers.send(number, stopped, child=number == signal.SIGKILL)
    ends = [workers.end(index, within=20) for index in range(count)]
    if (folder / "mnist.h5").exists():
        return False
    for index, (code, _, stderr) in enumerate(ends):
        if number == signal.SIGKILL and index == stopped:
            assert code in (-9, 137)
        elif number == signal.SIGKILL:
            assert code == 75, stderr
            assert f"{workers.name(stopped)} was lost: " in stderr
            assert stderr.endswith(f"{STANDS}\n")
        else:
            assert code == 75, stderr
            assert f"stopped by {number.name}" in stderr
            assert "the same command goes on from there" in stderr
        assert stderr.count("\n") <= 1
    return True


@pytest.mark.parametrize(
    ("count", "signals"),
    [
        (1, [signal.SIGKILL, signal.SIGTERM]),
        (2, [signal.SIGKILL]),
        *(
            pytest.param(count, [number] * 10, marks=pytest.mark.full)
            for count in (1, 2)
            for number in (signal.SIGKILL, signal.SIGTERM)
        ),
    ],
)
def test_a_run_stopped_at_any_step_ends_with_the_same_bits(
    group, command, undisturbed, signals, count
):
    out = command.folder / "out"
    stopped = 0
    while stopped < len(signals):  # runs, each stopped several times, the first while it saves
        for number in signals[stopped : stopped + 4]:
            if not stop(group(count), out, number, in_save=stopped == 0):
                break
            stopped += 1
        if not (out / "mnist.h5").exists():
            last = group(count).start(*EAGER)
            assert [last.end(index, within=200)[0] for index in range(count)] == [0] * count
        assert outcome(out) == undisturbed(count)
        assert not (out / FOLDER).exists()
        (out / "mnist.h5").unlink()


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.full
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


@pytest.mark.full
def test_a_worker_lost_at_the_very_end_costs_nothing(group, command):
    two = group(2).start(*EAGER)
    for line in two.processes[0].stdout:
        if json.loads(line)["event"] == "weights":  # all is computed; worker 0 saves it
            break
    two.send(signal.SIGKILL, 1, child=True)
    two.end(1)
    two.start(*EAGER, only=[1])
    code, stdout, _ = two.end(1)
    assert (code, stdout) == (0, "")
    code, _, stderr = two.end(0)
    assert code == 0
    assert stderr.startswith("The model is saved. Waiting up to 300 s to tell worker 1 ")
    assert (command.folder / "out" / "mnist.h5").exists()


@pytest.mark.full
def test_pods_in_place_of_some_that_were_lost_after_the_end_say_what_came_out(group, command):
    command.env["TRAINER_JOB_UID"] = "this job"
    small = ("--epochs", 1, "--train-limit", 128, "--test-limit", 100, "--no-report")
    alone = command.run(*small, "--output-dir", "out")
    model = command.folder / "out" / "mnist.h5"
    before = model.stat()

    two = group(2).start(*small)
    assert two.end(1)[0] == 0
    code, stdout, stderr = two.end(0)
    assert (code, stderr) == (0, "")
    assert stdout.splitlines() == alone.stdout.splitlines()[-2:]
    assert model.stat() == before
    # The others may have ended before it was lost.
    code, _, stderr = group(2).start(*small, "--startup-timeout", 12, only=[0]).end(0)
    assert code == 0
    assert stderr.startswith("The model is saved. Waiting up to 12 s to tell worker 1 ")

    # Another Job trains.
    command.env["TRAINER_JOB_UID"] = "another"
    assert "epoch 1/1" in command.run(*small, "--output-dir", "out").stdout
    assert model.stat() != before


def test_a_worker_with_another_seed_is_refused(group):
    two = group(2).start(*RUN, only=[0]).start(*RUN, "--seed", 1, only=[1])
    for index in (0, 1):
        code, stdout, stderr = two.end(index)
        assert (code, stdout) == (78, "")
        assert f"Received: seed=1 where worker 0 has seed=0, on {two.name(1)}." in stderr
        assert stderr.count("\n") == 1


@pytest.mark.full
def test_a_batch_that_does_not_divide_is_refused_by_all(group):
    three = group(2).start(*RUN, "--batch-size", 127)
    for index in (0, 1):
        code, _, stderr = three.end(index)
        assert code == 2
        assert "multiple of the 2 replicas. Received: batch_size=127. Use 126 or 128." in stderr
        assert stderr.count("\n") == 1
