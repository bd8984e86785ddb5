"""python -m trainer.launch as a user runs it."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
from support import Command, outcome

from trainer.distributed.local import free_ports

RUN = (
    "--epochs",
    1,
    "--train-limit",
    1024,
    "--test-limit",
    200,
    "--no-report",
    "--output-dir",
    "out",
)
EAGER = (*RUN, "--steps-per-execution", 1, "--checkpoint-every", 1)


def launched(command, *own):
    command.program = ["-m", "trainer.launch", *map(str, own), "--"]
    return command


@pytest.fixture
def launch(command):
    return lambda *own: launched(command, *own)


def children(pid):
    with contextlib.suppress(FileNotFoundError):
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def wait_for(condition, *, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def has_checkpoint(folder):
    return any((folder / "out" / "checkpoints").glob("*.index"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    home = tmp_path_factory.mktemp("home")
    done = launched(Command(folder, home), "--workers", 2).run(*RUN)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    (other,) = (line for line in lines if not line.startswith("[0] "))
    same = "has the same weights as the others, bit for bit: SHA-256 "
    assert other.startswith(f"[1] worker 1 of 2 {same}")
    assert sum(same in line for line in lines) == 2
    assert lines[1].startswith(
        "[0] MultiWorkerMirroredStrategy over 2 workers of one CPU each: 127.0.0.1:"
    )
    assert lines[-1].startswith("[0] out/mnist.h5")
    assert [path.name for path in folder.iterdir()] == ["out"]
    return outcome(folder / "out")


@pytest.mark.full
def test_workers_are_started_again_from_the_last_checkpoint(launch, command, undisturbed):
    run = launch("--workers", 2, "--max-restarts", 1).start(*EAGER)
    wait_for(lambda: has_checkpoint(command.folder) or run.poll() is not None)
    workers = children(run.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    stdout, stderr = run.communicate(timeout=120)
    assert run.returncode == 0, stderr
    assert "[0] python -m trainer.task: worker 1 (127.0.0.1:" in stderr
    assert "ended with 137; starting all 2 workers again (1 of 1)" in stderr
    assert "[0] Resuming the unfinished run in out/checkpoints at epoch 1, step" in stdout
    assert outcome(command.folder / "out") == undisturbed


@pytest.mark.full
def test_without_a_restart_it_ends_as_the_worker_did(launch, command):
    run = launch().start(*EAGER)
    wait_for(lambda: has_checkpoint(command.folder) or run.poll() is not None)
    chief, _ = children(run.pid)
    os.kill(chief, signal.SIGKILL)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 137
    assert "[1] python -m trainer.task: worker 0 (127.0.0.1:" in stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.full
def test_a_signal_stops_all_at_a_checkpoint(launch, command, number):
    run = launch().start(*EAGER)
    wait_for(lambda: has_checkpoint(command.folder) or run.poll() is not None)
    workers = children(run.pid)
    pids = [*workers, *(child for one in workers for child in children(one))]
    assert len(pids) == 4
    start = time.monotonic()
    run.send_signal(number)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 75
    assert time.monotonic() - start < 10
    assert f"[0] python -m trainer.task: stopped by {number.name} at epoch 1, step" in stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.full
def test_nothing_is_left_of_one_that_is_killed(launch, command):
    run = launch().start(*EAGER)
    wait_for(lambda: has_checkpoint(command.folder) or run.poll() is not None)
    workers = children(run.pid)
    pids = [*workers, *(child for one in workers for child in children(one))]
    run.kill()
    run.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), seconds=10)


@pytest.mark.full
@pytest.mark.parametrize(("count", "batch_size"), [(2, 128), (3, 126)])
def test_after_an_epoch_all_workers_hold_the_same_weights(launch, command, count, batch_size):
    flags = ("--train-limit", 5120, "--batch-size", batch_size, "--no-report")
    done = launch("--workers", count).run(*RUN, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    for index in range(count):
        same = f"[{index}] worker {index} of {count} has the same weights as the others, bit for"
        assert same in done.stdout


@pytest.mark.parametrize(
    ("own", "flags", "part"),
    [
        (["--workers", "0"], [], "workers must be at least 1. Received: workers=0. Use 2"),
        (["--max-restarts", "-1"], [], "max_restarts must be at least 0. Received"),
        (["--worker", "2"], [], "Perhaps you meant --workers"),
        ([], ["--epochs", "0"], "epochs must be a whole number of at least 1"),
        ([], ["--epoch", "1"], "Perhaps you meant --epochs"),
    ],
)
def test_a_wrong_flag_is_2_and_starts_nothing(launch, command, own, flags, part):
    done = launch(*own).run(*flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert part in done.stderr
    assert done.stderr.startswith("python -m trainer.launch: error: ")
    assert done.stderr.count("\n") == 1
    assert list(command.folder.iterdir()) == []


def test_free_ports_are_free_and_different():
    ports = free_ports(50)
    assert len(set(ports)) == 50


def test_a_folder_that_cannot_be_written_ends_all_workers(launch, command):
    (command.folder / "out").write_text("")
    done = launch().run(*RUN)
    assert done.returncode == 73
    assert "[0] python -m trainer.task: error: " in done.stderr
    assert "File exists" in done.stderr
