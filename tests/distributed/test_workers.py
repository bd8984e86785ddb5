"""Several workers, each a process of its own on this machine, and one, stopped and resumed: the
command as a user runs it.

What a worker's parent does without TensorFlow has more cases in ``test_supervisor``.
"""

import contextlib
import functools
import os
import signal
import socket
from pathlib import Path

import pytest
from support import (
    TIMEOUT,
    Command,
    Constant,
    Pause,
    assert_alike,
    assert_gradients_alike,
    outcome,
    wait_for,
)

from trainer.cli import ADVICE
from trainer.distributed.authentication import make_secret
from trainer.distributed.cluster import Cluster
from trainer.distributed.local import free_ports
from trainer.distributed.parent import RESUME_HINT
from trainer.training.checkpoint import FOLDER

RUN = ("--epochs", 2, "--train-limit", 768, "--test-limit", 100, "--threads", 1, "--no-report")
EAGER = (*RUN, "--steps-per-execution", 1, "--checkpoint-every", 1)

# However late a worker is on a machine that is busy otherwise.
UNHURRIED = Constant("trainer.distributed.parent:WAITING_NOTICE", 3600)


class Group:
    """Workers that train together; worker 0's output folder is ``out``."""

    def __init__(self, command, count):
        self.command = command
        self.workers = tuple(f"127.0.0.1:{port}" for port in free_ports(count))
        self.processes = {}
        secret = command.home / f"secret-{self.workers[0]}"
        secret.write_text(make_secret())
        secret.chmod(0o600)
        command.env["TRAINER_TOKEN_FILE"] = str(secret)

    def start(self, *flags, only=None, hooks=()):
        for index in range(len(self.workers)) if only is None else only:
            # The others need no folder, and must make none.
            folder = "out" if index == 0 else "nowhere"
            # A list of one is a worker alone.
            self.command.env["TF_CONFIG"] = Cluster(self.workers, index).tf_config
            self.processes[index] = self.command.start(
                *flags, "--output-dir", folder, hooks=[*hooks, UNHURRIED]
            )
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
            with contextlib.suppress(ProcessLookupError):  # It may have ended with its parent.
                os.kill(pid, number)

    def reach(self, pause):
        """Waits until a worker pauses."""
        pause.wait(*self.processes.values())

    def end(self, index):
        stdout, stderr = self.processes[index].communicate(timeout=TIMEOUT)
        return self.processes[index].returncode, stdout, stderr

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
@pytest.mark.parametrize("collectives", ["tensorflow", "ring"])
def test_what_workers_exchange_arrives(replicas, collectives):
    for index, seen in enumerate(compute(replicas, "exchanged", 2, collectives=collectives)):
        assert seen == {
            "count": 2,
            "gathered": [10, 11],
            "first": 10,
            "shared": list(range(7)),
            "nothing": [],
            "differing": [[], [1], [1]],
            "summed": [[1.0, 1.0], 1.0, 2],
            "mean": 0.5,
            "sparse": [[0.0, 0.0], [1.0, 1.0]],
            "eager": 3.0,
            "by_ring": collectives == "ring",
            "notice": "",
        }, index


@pytest.mark.parametrize(
    ("collectives", "count", "batch_size", "examples"),
    [
        ("tensorflow", 2, 128, 640),
        pytest.param("ring", 2, 128, 640, marks=pytest.mark.full),
        pytest.param("tensorflow", 2, 128, 5120, marks=pytest.mark.full),
        pytest.param("ring", 3, 126, 5120, marks=pytest.mark.full),
    ],
)
def test_several_workers_train_as_one(replicas, collectives, count, batch_size, examples):
    data = {"examples": examples, "batch_size": batch_size}
    several = compute(replicas, "losses", count, collectives=collectives, **data)
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
            code, stdout, stderr = workers.end(index)
            assert (code, stderr) == (0, "")
            # Worker 0 shows progress; another one says how it ended, and nothing else.
            last = f"worker {index} of 2 has the same weights as the others, bit for bit: SHA-256 "
            assert (last in stdout) == (count == 2)
            assert (stdout.count("\n") == 1) == (index == 1)
        assert not (folder / "nowhere").exists()
        return outcome(folder / "out")

    return of


# When the files of a checkpoint are written, and not yet in their place.
SAVE = "trainer.training.checkpoint:_put_on_disk"
# A signal must reach a worker, and be obeyed, on a machine that is busy otherwise, too.
PATIENT = Constant("trainer.distributed.parent:STOP_TIMEOUT", 300)

KILLS = [(signal.SIGKILL, point) for point in ("save", (1, 1), (1, 4), (2, 0), (2, 5))]
STOPS = [(signal.SIGTERM, point) for point in ((1, 1), (1, 3), (1, 5), (2, 1), (2, 4))]


def stop(workers, tmp_path, number, point, stopped):
    """Stops a run by a signal to one worker: when a step has ended, or while it saves."""
    pauses = [
        Pause(folder=tmp_path / str(index), worker=index, after_step=point)
        for index in range(len(workers.workers))
    ]
    if point == "save":
        pauses = [Pause(folder=tmp_path / "save", worker=0, calling=SAVE)]
    workers.start(*EAGER, hooks=[*pauses, PATIENT])
    for pause in pauses:
        workers.reach(pause)
    workers.send(number, stopped, child=number == signal.SIGKILL and len(workers.workers) > 1)
    if number != signal.SIGKILL:
        pauses[stopped].wait(*workers.processes.values(), seen=number.name)
        for pause in pauses:
            pause.go()
    for index in range(len(workers.workers)):
        code, _, stderr = workers.end(index)
        if number == signal.SIGKILL and index == stopped:
            assert code == -9
        elif number == signal.SIGKILL:
            assert code == 75, stderr
            assert f"{workers.name(stopped)} was lost: its connection closed." in stderr
            assert stderr.endswith(f"{RESUME_HINT}\n")
        else:
            assert code == 75, stderr
            assert f"stopped by {number.name}" in stderr
            assert "the same command resumes the run" in stderr
        assert stderr.count("\n") <= 1


@pytest.mark.parametrize(
    ("count", "stops", "stopped"),
    [
        (2, [KILLS[2]], 1),
        *(
            pytest.param(count, stops, stopped, marks=pytest.mark.full)
            for count, stopped in ((1, 0), (2, 0), (2, 1))
            for stops in (KILLS[stopped:], STOPS)
        ),
    ],
)
def test_a_run_stopped_at_any_step_ends_with_the_same_bits(
    group, command, undisturbed, tmp_path, count, stops, stopped
):
    out = command.folder / "out"
    for number, (signal_number, point) in enumerate(stops):
        folder = tmp_path / f"stop-{number}"
        folder.mkdir()
        stop(group(count), folder, signal_number, point, stopped)
        assert not (out / "mnist.h5").exists()
    last = group(count).start(*EAGER)
    assert [last.end(index)[0] for index in range(count)] == [0] * count
    assert outcome(out) == undisturbed(count)
    assert not (out / FOLDER).exists()


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.full
def test_a_worker_whose_process_is_frozen_is_named(group, tmp_path, lost):
    pause = Pause(folder=tmp_path / "pause", after_step=(1, 2), worker=lost)
    two = group(2).start(*EAGER, hooks=[pause])
    two.reach(pause)
    os.kill(two.child(lost), signal.SIGSTOP)
    how = "its process was stopped (SIGSTOP)"
    code, _, stderr = two.end(1 - lost)
    assert (code, stderr) == (
        75,
        f"python -m trainer.task: {two.name(lost)} was lost: {how}. {RESUME_HINT}\n",
    )


@pytest.mark.full
@pytest.mark.parametrize("lost", [0, 1])
def test_a_worker_frozen_whole_is_named(group, tmp_path, lost):
    pause = Pause(folder=tmp_path / "pause", after_step=(1, 2), worker=lost)
    two = group(2).start(*EAGER, hooks=[pause])
    two.reach(pause)
    two.send(signal.SIGSTOP, lost, child=True)
    code, _, stderr = two.end(1 - lost)
    assert code == 75
    assert f"{two.name(lost)} was lost: no heartbeat for 10 s. {RESUME_HINT}" in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize("hung", [0, pytest.param(1, marks=pytest.mark.full)])
def test_a_worker_that_hangs_ends_the_run_and_says_after_which_step(group, tmp_path, hung):
    pause = Pause(folder=tmp_path / "pause", after_step=(1, 3), worker=hung)
    two = group(2).start(*EAGER, "--step-timeout", 15, hooks=[pause])
    for index in (0, 1):
        code, _, stderr = two.end(index)
        assert (code, stderr) == (
            75,
            "python -m trainer.task: no step ended for 15 s after epoch 1, step 3 "
            f"(step_timeout). {RESUME_HINT} (--step-timeout)\n",
        )


@pytest.mark.parametrize("failing", [1, pytest.param(0, marks=pytest.mark.full)])
def test_an_error_of_tensorflow_while_all_are_alive_is_no_loss(group, tmp_path, failing):
    pause = Pause(
        folder=tmp_path / "pause",
        after_step=(1, 2),
        worker=failing,
        error="tf.errors.InternalError(None, None, 'cuDNN launch failure')",
    )
    pause.go()
    two = group(2).start(*EAGER, hooks=[pause])
    text = f"InternalError: cuDNN launch failure. {RESUME_HINT} {ADVICE}\n"
    code, _, stderr = two.end(failing)
    assert code == 1
    assert stderr.startswith("Traceback (most recent call last):\n")
    assert stderr.endswith(f"\npython -m trainer.task: error: {text}")
    code, _, stderr = two.end(1 - failing)
    assert (code, stderr) == (1, f"python -m trainer.task: error: {two.name(failing)}: {text}")


@pytest.mark.full
def test_a_device_without_memory_is_named(group, tmp_path):
    pause = Pause(
        folder=tmp_path / "pause",
        after_step=(1, 2),
        worker=1,
        error="tf.errors.ResourceExhaustedError(None, None, 'OOM when allocating tensor')",
    )
    pause.go()
    two = group(2).start(*EAGER, hooks=[pause])
    for index, name in enumerate((f"{two.name(1)}: ", "")):
        code, _, stderr = two.end(index)
        assert code == 78
        assert stderr == (
            f"python -m trainer.task: error: {name}Expected the training to fit into the memory of "
            "the device. Received: ResourceExhaustedError: OOM when allocating tensor. Use a "
            "smaller batch_size, or precision='mixed_bfloat16'. (--batch-size, --precision) "
            f"{ADVICE}\n"
        )


@pytest.mark.full
def test_a_worker_that_is_late_is_waited_for(group, tmp_path):
    pause = Pause(folder=tmp_path / "pause", calling="trainer.distributed.worker:Link.meet")
    two = group(2).start(*RUN, only=[0], hooks=[pause])
    two.reach(pause)
    pause.go()
    two.start(*RUN, only=[1])
    assert [two.end(index)[0] for index in (0, 1)] == [0, 0]


@pytest.mark.full
def test_a_worker_that_never_comes_is_named(group):
    two = group(2).start(*RUN, "--startup-timeout", 12, only=[0])
    code, _, stderr = two.end(0)
    assert code == 75
    assert stderr.endswith(
        f"{two.name(1)} did not join within 12 s. Start the same command there too, or "
        "use a longer startup_timeout. (--startup-timeout)\n"
    )


@pytest.mark.full
def test_a_worker_lost_at_the_very_end_costs_nothing(group, command, tmp_path):
    pause = Pause(folder=tmp_path / "pause", calling="trainer.training.artifacts:save")
    two = group(2).start(*EAGER, hooks=[pause])
    two.reach(pause)
    wait_for(lambda: is_idle(two.processes[0].pid))  # The parent knows that all is computed.
    two.send(signal.SIGKILL, 1, child=True)
    two.end(1)
    pause.go()
    two.start(*EAGER, only=[1])
    code, stdout, _ = two.end(1)
    assert (code, stdout) == (0, "")
    code, _, stderr = two.end(0)
    assert code == 0
    assert stderr.startswith("Worker 0 is done. Waiting up to 300 s to tell worker 1 ")
    assert (command.folder / "out" / "mnist.h5").exists()


def is_idle(pid):
    """Tells whether a process waits for something, and so has handled all that it was sent."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "S"


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
    two = group(2).start(*small, only=[0])
    notice = two.processes[0].stderr.readline()
    assert notice.startswith("Worker 0 is done. Waiting up to 300 s to tell worker 1 ")
    two.send(signal.SIGTERM, 0)
    assert two.end(0)[0] == 0

    # Another Job trains.
    command.env["TRAINER_JOB_UID"] = "another"
    assert "epoch 1/1" in command.run(*small, "--output-dir", "out").stdout
    assert model.stat() != before


@pytest.mark.full
def test_strangers_at_worker_0s_port_change_nothing(group, command, undisturbed):
    two = group(2).start(*RUN, only=[0])
    host, port = two.workers[0].split(":")

    def connected():
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection((host, int(port)), timeout=300)

    for content in (b'{"hello": 1}', b'{"hello": 1}\n', b"[" * 60_000 + b"\n", b'{"go": []}\n'):
        wait_for(lambda: (found := connected()) and not found.close(), *two.processes.values())
        with connected() as stranger, contextlib.suppress(ConnectionError):
            stranger.sendall(content)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
    two.start(*RUN, only=[1])
    for index in (0, 1):
        code, _, stderr = two.end(index)
        assert (code, stderr) == (0, "")
    assert outcome(command.folder / "out") == undisturbed(2)


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
