"""Workers on this machine, and python -m trainer.launch as a user runs it."""

import itertools
import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from support import TIMEOUT, Command, Constant, Pause, children, outcome, wait_for, with_hooks

from trainer.distributed import local
from trainer.distributed.local import LocalWorkers, free_ports, share_gpus
from trainer.distributed.private_network import open_private_network
from trainer.errors import ConfigurationError

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
# A signal must reach the workers, and be obeyed, on a machine that is busy otherwise, too.
PATIENT = Constant("trainer.distributed.parent:STOP_TIMEOUT", 300)


def launched(command, *own):
    command.program = ["-m", "trainer.launch", *map(str, own), "--"]
    return command


def has_private_network():
    try:
        open_private_network().close()
    except OSError:
        return False
    return True


needs_private_network = pytest.mark.skipif(
    not has_private_network(), reason="the system has no network namespaces for this user"
)


@pytest.fixture
def launch(command):
    return lambda *own: launched(command, *own)


class Launched:
    """A run of two workers, both of which pause after the second step."""

    def __init__(self, command, tmp_path):
        self.pauses = [
            Pause(folder=tmp_path / f"pause-{index}", worker=index, after_step=(1, 2))
            for index in (0, 1)
        ]
        self.process = command.start(*EAGER, hooks=[*self.pauses, PATIENT])
        for pause in self.pauses:
            pause.wait(self.process)
        self.workers = children(self.process.pid)
        self.pids = [*self.workers, *(pid for worker in self.workers for pid in children(worker))]
        assert len(self.pids) == 4

    def kill(self, index):
        """Kills a worker, both processes of it."""
        for pid in (*children(self.workers[index]), self.workers[index]):
            os.kill(pid, signal.SIGKILL)

    def go(self):
        for pause in self.pauses:
            pause.go()

    def end(self):
        stdout, stderr = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode, stdout, stderr


def has_ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    home = tmp_path_factory.mktemp("home")
    command = launched(Command(folder, home), "--workers", 2)
    # However late a worker is on a machine that is busy otherwise.
    unhurried = Constant("trainer.distributed.parent:WAITING_NOTICE", 3600)
    command.env = with_hooks(command.env, [unhurried])
    done = command.run(*RUN)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" or not has_private_network()
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


def test_workers_share_a_secret(capfd):
    show = "import os, sys; print(os.environ['TRAINER_TOKEN'], sys.argv[1:])"
    seen = []
    for _ in range(2):
        with LocalWorkers([sys.executable, "-c", show], [{}, {}], prefix=False) as workers:
            assert workers.wait() == 0
        first, second = (line[4:] for line in capfd.readouterr().out.splitlines())
        assert first == second
        secret, arguments = first.split()
        assert len(secret) == 64
        assert arguments == "[]"  # Other users can read them.
        seen.append(secret)
    assert seen[0] != seen[1]


@needs_private_network
def test_the_ports_of_workers_are_closed_to_others(launch, tmp_path):
    run = Launched(launch(), tmp_path)
    environ = Path(f"/proc/{run.workers[0]}/environ").read_text()
    (config,) = (line[10:] for line in environ.split("\0") if line.startswith("TF_CONFIG="))
    for worker, address in zip(run.workers, json.loads(config)["cluster"]["worker"], strict=True):
        host, port = address.split(":")
        # TensorFlow's server listens there, on all interfaces of the network that it is in.
        assert int(port) in listening(worker)
        assert int(port) not in listening("self")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, int(port)))
    run.go()
    assert run.end()[0] == 0


def listening(process):
    """Returns the ports at which somebody listens on all interfaces of a process' network."""
    ports = set()
    for family in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{family}").read_text().splitlines()[1:]:
            local, _, state = line.split()[1:4]
            host, port = local.split(":")
            if state == "0A" and not int(host, 16):
                ports.add(int(port, 16))
    return ports


@pytest.mark.full
def test_workers_are_started_again_from_the_last_checkpoint(launch, command, tmp_path, undisturbed):
    run = Launched(launch("--workers", 2, "--max-restarts", 1), tmp_path)
    run.kill(1)
    run.go()  # Those that are started again.
    code, stdout, stderr = run.end()
    assert code == 0, stderr
    assert "[0] python -m trainer.task: worker 1 (127.0.0.1:" in stderr
    assert "ended with 137; starting all 2 workers again (1 of 1)" in stderr
    assert "[0] Resuming the unfinished run in out/checkpoints at epoch 1, step 2" in stdout
    assert outcome(command.folder / "out") == undisturbed


def test_without_a_restart_it_ends_as_the_worker_did(launch, tmp_path):
    run = Launched(launch(), tmp_path)
    run.kill(0)
    code, _, stderr = run.end()
    assert code == 137
    assert "[1] python -m trainer.task: worker 0 (127.0.0.1:" in stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.full
def test_a_signal_stops_all_at_a_checkpoint(launch, tmp_path, number):
    run = Launched(launch(), tmp_path)
    run.process.send_signal(number)
    for pause in run.pauses:
        pause.wait(run.process, seen=number.name)
    run.go()
    code, _, stderr = run.end()
    assert code == 75
    assert f"[0] python -m trainer.task: stopped by {number.name} at epoch 1, step 3." in stderr
    assert all(map(has_ended, run.pids))


@pytest.mark.full
def test_nothing_is_left_of_one_that_is_killed(launch, tmp_path):
    run = Launched(launch(), tmp_path)
    run.process.kill()
    run.process.communicate()
    wait_for(lambda: all(map(has_ended, run.pids)))


@pytest.mark.full
@pytest.mark.parametrize(("count", "batch_size"), [(2, 128), (3, 126)])
def test_after_an_epoch_all_workers_hold_the_same_weights(launch, command, count, batch_size):
    flags = ("--train-limit", 5120, "--batch-size", batch_size, "--no-report")
    done = launch("--workers", count).run(*RUN, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    for index in range(count):
        same = f"[{index}] worker {index} of {count} has the same weights as the others, bit for"
        assert same in done.stdout


@pytest.mark.full
@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy", "all_proxy"])
def test_workers_reach_one_another_past_a_proxy(launch, command, variable):
    command.env |= {variable: "http://127.0.0.1:9", "no_proxy": "example.com"}
    flags = ("--train-limit", 256, "--test-limit", 100)
    done = launch("--workers", 2).run(*RUN, *flags)
    assert (done.returncode, done.stderr) == (0, "")


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


def local_workers(*programs):
    """Returns workers that each run a program of Python."""
    choose = (
        "import json, os, sys\n"
        "exec(sys.argv[1 + json.loads(os.environ['TF_CONFIG'])['task']['index']])"
    )
    return LocalWorkers([sys.executable, "-c", choose, *programs], [{}] * len(programs))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux' /dev/full")
def test_a_full_disk_under_stdout_costs_the_workers_lines_alone(monkeypatch, capsys):
    lines = "print('a line\\n' * 100_000, flush=True); os._exit(0)"  # more than a pipe holds
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with local_workers(lines, lines) as workers:
            assert workers.wait() == 0
    assert capsys.readouterr().err == (
        "stdout cannot be written (No space left on device): what it cannot take is dropped\n"
    )


@pytest.mark.parametrize(
    ("codes", "code"),
    [((0, 0), 0), ((0, 1), 0), ((75, 75), 75), ((75, 1), 1), ((78, 75), 78), ((-9, 75), 137)],
)
def test_the_exit_code_is_that_of_what_went_wrong(codes, code):
    programs = [
        f"os._exit({code})" if code >= 0 else f"os.kill(os.getpid(), {-code})" for code in codes
    ]
    with local_workers(*programs) as workers:
        assert workers.wait() == code


def test_a_worker_that_blocks_is_killed_when_another_has_failed(monkeypatch, tmp_path):
    monkeypatch.setattr(local, "FAILURE_TIMEOUT", 0.1)
    monkeypatch.setattr(local, "STOP_TIMEOUT", 0.1)
    ready = str(tmp_path / "ready")
    os.mkfifo(ready)
    deaf = (
        "import signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"open({ready!r}, 'w').close()\n"
        "while True: signal.pause()"
    )
    with local_workers(deaf, f"open({ready!r}).close()\nos._exit(1)") as workers:
        assert workers.wait() == 1


def test_lines_are_shown_with_the_number_of_their_worker(capsys):
    programs = ("print('a'); print('b', file=sys.stderr)", "print('c')")
    with local_workers(*programs) as workers:
        assert workers.wait() == 0
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == ["[0] a", "[1] c"]
    assert err == "[0] b\n"


def test_gpus_are_shared_evenly(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl"):
        (tmp_path / name).touch()
    visible = [share["CUDA_VISIBLE_DEVICES"] for share in share_gpus(2, devices=tmp_path)]
    assert visible == ["0,1", "2,3"]
    assert share_gpus(2, 0, devices=tmp_path) == [{}, {}]
    with pytest.raises(ConfigurationError, match=r"each of the 5 workers. Received: 4 GPUs"):
        share_gpus(5, devices=tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert share_gpus(2, devices=tmp_path) == [{}, {}]


def test_free_ports_are_free_and_different(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        used = server.getsockname()[1]
        free = itertools.count(used + 1)
        # The random numbers are first a port in use, then each port twice.
        numbers = itertools.chain([used], (port for port in free for _ in range(2)))
        monkeypatch.setattr(local.random, "randrange", lambda *_: next(numbers))
        ports = free_ports(3)
    assert used not in ports
    assert len(set(ports)) == 3
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_a_folder_that_cannot_be_written_ends_all_workers(launch, command):
    (command.folder / "out").write_text("")
    done = launch().run(*RUN)
    assert done.returncode == 73
    assert "[0] python -m trainer.task: error: " in done.stderr
    assert "File exists" in done.stderr
