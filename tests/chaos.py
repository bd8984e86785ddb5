"""Runs with one fault each, at a random moment, and what became of them.

    python tests/chaos.py --minutes 10 --seed 1
    python tests/chaos.py --runs 20 --faults kill,disk-full --workers 2

A run is a small one of ``python -m trainer.task``, or of ``trainer.launch`` with two workers, in a
folder with files that are none of its business. It must end with the bits of the undisturbed run,
or with an exit code that is right for the fault; the same command then must end with those bits.
Whatever else happens, a file lost, a traceback, a run that hangs, is unexplained: it is shown with
the command that repeats it, its folder is kept, and the exit code is 1.

Most faults need root and Linux; those that this machine cannot have are left out, with the reason.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import disks

ROOT = Path(__file__).parents[1]
FLAGS = (
    *("--epochs", "3", "--train-limit", "2560", "--test-limit", "100", "--threads", "1"),
    *("--checkpoint-every", "5", "--steps-per-execution", "5", "--no-report"),
)
BYSTANDERS = ("notes.txt", "checkpoints/resnet50/epoch_90.pt", ".mnist.h5.tmp")
HANG_SECONDS = 400.0  # The longest that a run may wait for anything is startup_timeout, 300 s.
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
MEMORY = Path("/sys/fs/cgroup/memory")  # control groups v1


@dataclasses.dataclass
class Run:
    """One run: its processes, and what a fault may do something to."""

    scratch: Path
    out: Path
    workers: int
    env: dict
    namespaces: Sequence[str] = ()
    processes: list[subprocess.Popen] = dataclasses.field(default_factory=list)

    def start(self) -> None:
        """Starts the command; with network namespaces, a worker in each."""
        command = [sys.executable, "-P", "-m"]
        task = ["trainer.task", *FLAGS, "--output-dir", str(self.out)]
        if self.namespaces:
            hosts = [f"10.77.0.{number + 1}:2222" for number in range(self.workers)]
            for index, namespace in enumerate(self.namespaces):
                config = {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}}
                self._popen(
                    ["ip", "netns", "exec", namespace, *command, *task],
                    TF_CONFIG=json.dumps(config),
                )
        elif self.workers > 1:
            self._popen(
                [*command, "trainer.launch", "--workers", str(self.workers), "--", *task[1:]]
            )
        else:
            self._popen([*command, *task])

    def _popen(self, command: Sequence[str], **env: str) -> None:
        log = (self.scratch / f"log-{len(self.processes)}").open("a")
        self.processes.append(
            subprocess.Popen(
                command,
                cwd=self.scratch,
                env={**self.env, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
        log.close()

    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def wait(self, seconds: float) -> bool:
        """Waits until the run ends, or the time is up; returns whether it has ended."""
        end = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < end:
            time.sleep(0.01)
        return self.ended()

    def tree(self) -> list[int]:
        """Returns the processes of the run, those that others have started included."""
        found = [process.pid for process in self.processes if process.poll() is None]
        for pid in found:
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
                found.extend(map(int, children.split()))
        return found

    def kill(self) -> None:
        """Ends what is left of the run."""
        for pid in reversed(self.tree()):
            send(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.scratch.glob("log-*")))


class Fault:
    """Something that happens to a run.

    Attributes:
        codes: Exit codes that are right for it, besides 0.
        workers: Numbers of workers that it can happen to.
    """

    codes: frozenset[int] = frozenset()
    workers = (1, 2)

    def missing(self) -> str:
        """Returns what this machine lacks for it; empty where nothing is."""
        return ""

    @contextlib.contextmanager
    def prepared(self, run: Run) -> Iterator[None]:
        """Sets up what the fault needs, before the run starts and until its last check."""
        yield

    def strike(self, run: Run, noise: random.Random) -> None:
        """Happens."""
        raise NotImplementedError

    def mend(self, run: Run) -> None:
        """Is over, after the run has ended: what somebody does before the same command again."""


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Kill(Fault):
    """SIGKILL to one of the run's processes."""

    codes = frozenset({-9, 75, 137})

    def strike(self, run, noise):
        for pid in noise.sample(tree := run.tree(), min(1, len(tree))):
            send(pid, signal.SIGKILL)


class Stop(Fault):
    """The first SIGTERM, SIGINT or SIGHUP."""

    codes = frozenset({75, 130})
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def strike(self, run, noise):
        for process in run.processes:
            send(process.pid, noise.choice(self.numbers))


class Storm(Stop):
    """Fifty of those in a fifth of a second."""

    def strike(self, run, noise):
        for _ in range(50):
            super().strike(run, noise)
            time.sleep(0.004)


class Freeze(Fault):
    """SIGSTOP to one of the processes, and SIGCONT later."""

    codes = frozenset({75})

    def strike(self, run, noise):
        for pid in noise.sample(tree := run.tree(), min(1, len(tree))):
            send(pid, signal.SIGSTOP)
            run.wait(noise.choice((0.2, 2, 20)))
            send(pid, signal.SIGCONT)


class OnDisk(Fault):
    """Happens to a disk of the run's own."""

    codes = frozenset({73})

    def missing(self):
        return "" if disks.available() else "root, mkfs.ext4 and loop devices"

    @contextlib.contextmanager
    def prepared(self, run):
        disks.make(run.scratch / "disk.img", 160)
        with disks.mounted(run.scratch / "disk.img", run.scratch / "disk") as disk:
            run.out = disk / "out"
            run.out.mkdir()
            yield


class DiskFull(OnDisk):
    """The disk fills up."""

    def strike(self, run, noise):
        with contextlib.suppress(OSError), (run.out.parent / "filler").open("wb") as file:
            while True:
                file.write(bytes(2**20))

    def mend(self, run):
        (run.out.parent / "filler").unlink()


class ReadOnly(OnDisk):
    """The disk becomes read-only, as after an error of the device."""

    def strike(self, run, noise):
        # Refused while a file is open for writing.
        while not run.ended() and self._remount(run, "ro"):
            pass

    def mend(self, run):
        self._remount(run, "rw")

    def _remount(self, run, how):
        command = ["mount", "-o", f"remount,{how}", run.out.parent]
        return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode


class PowerCut(OnDisk):
    """The machine is gone; the disk has what had been written to it."""

    codes = frozenset({-9})

    @contextlib.contextmanager
    def prepared(self, run):
        with contextlib.ExitStack() as self.mounts, super().prepared(run):
            yield

    def strike(self, run, noise):
        if noise.random() < 0.1:
            os.sync()
        disks.cut(run.scratch / "disk.img", run.scratch / "cut.img")
        run.kill()

    def mend(self, run):
        disk = disks.mounted(run.scratch / "cut.img", run.scratch / "after")
        run.out = self.mounts.enter_context(disk) / "out"
        run.out.mkdir(exist_ok=True)


class Damage(Kill):
    """After a kill, a bit is flipped in one of the run's files, or a file is cut short."""

    codes = frozenset({-9, 65, 73, 75, 137})

    def strike(self, run, noise):
        super().strike(run, noise)
        run.wait(HANG_SECONDS)
        files = [
            path for path in run.out.rglob("*") if path.is_file() and not is_bystander(path, run)
        ]
        if files:
            path = noise.choice(sorted(files))
            content = bytearray(path.read_bytes())
            where = noise.randrange(len(content) + 1)
            if noise.random() < 0.5 or where == len(content):
                del content[where:]
            else:
                content[where] ^= 1 << noise.randrange(8)
            path.write_bytes(content)


class ClockJump(Fault):
    """The wall clock jumps by hours."""

    def missing(self):
        return "" if FAKETIME.exists() else "libfaketime"

    @contextlib.contextmanager
    def prepared(self, run):
        (run.scratch / "clock").write_text("+0\n")
        run.env |= {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(run.scratch / "clock"),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        yield

    def strike(self, run, noise):
        (run.scratch / "clock").write_text(f"{noise.choice(('+', '-'))}{noise.randrange(1, 90)}h\n")


class OutOfMemory(Fault):
    """The memory of the run's control group is no longer enough: the kernel kills a process."""

    codes = frozenset({-9, 1, 75, 78, 137})

    def missing(self):
        return "" if os.access(MEMORY, os.W_OK) else "a memory control group (v1)"

    @contextlib.contextmanager
    def prepared(self, run):
        self.group = MEMORY / f"chaos-{os.getpid()}"
        self.group.mkdir(exist_ok=True)
        try:
            yield
        finally:
            self.group.rmdir()

    def strike(self, run, noise):
        for pid in run.tree():
            with contextlib.suppress(OSError):
                (self.group / "cgroup.procs").write_text(str(pid))
        # What is mapped is not moved along: what the run needs from now on counts.
        limit = noise.choice((8, 32, 128)) * 2**20
        (self.group / "memory.limit_in_bytes").write_text(str(limit))

    def mend(self, run):
        (self.group / "memory.limit_in_bytes").write_text("-1")


class Network(Fault):
    """Happens to the network between two workers, each in a network namespace."""

    codes = frozenset({75})
    workers = (2,)

    def missing(self):
        return (
            ""
            if os.geteuid() == 0 and shutil.which("ip") and shutil.which("nft")
            else "root, ip, nft"
        )

    @contextlib.contextmanager
    def prepared(self, run):
        names = [f"chaos-{os.getpid()}-{index}" for index in range(run.workers)]
        try:
            for name in names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0",
               "netns", names[1])  # fmt: skip
            for index, name in enumerate(names):
                ip("-n", name, "addr", "add", f"10.77.0.{index + 1}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
            run.namespaces = names
            yield
        finally:
            for name in names:
                subprocess.run(["ip", "netns", "del", name], check=False)


class Partition(Network):
    """The link between the workers is gone, for a while or for ever."""

    def strike(self, run, noise):
        ip("-n", run.namespaces[1], "link", "set", "eth0", "down")
        if not run.wait(noise.choice((1, 5, HANG_SECONDS))):
            self.mend(run)

    def mend(self, run):
        ip("-n", run.namespaces[1], "link", "set", "eth0", "up")


class Lossy(Network):
    """One packet in ten is lost."""

    def strike(self, run, noise):
        rules = """
            table inet chaos {
                chain in {
                    type filter hook input priority 0
                    iif eth0 numgen random mod 100 < 10 drop
                }
            }
        """
        subprocess.run(
            ["ip", "netns", "exec", run.namespaces[1], "nft", "-f", "-"],
            input=rules,
            text=True,
            check=True,
        )

    def mend(self, run):
        subprocess.run(
            ["ip", "netns", "exec", run.namespaces[1], "nft", "flush", "ruleset"], check=True
        )


class Stranger(Network):
    """Somebody sends bytes to the workers' port."""

    def missing(self):
        return super().missing() or ("" if shutil.which("nsenter") else "nsenter")

    def strike(self, run, noise):
        messages = (
            b'{"hello": 1}',
            b"[" * 60_000,
            b"GET / HTTP/1.1\r\n\r\n",
            noise.randbytes(999),
            b"",
        )
        program = (
            "import socket, sys\n"
            "for host in ('10.77.0.1', '10.77.0.2'):\n"
            "    for message in map(bytes.fromhex, sys.argv[1:]):\n"
            "        try:\n"
            "            with socket.create_connection((host, 2222), 1) as s:\n"
            "                s.sendall(message + b'\\n'); s.settimeout(0.2); s.recv(99)\n"
            "        except OSError: pass\n"
        )
        subprocess.run(
            ["ip", "netns", "exec", run.namespaces[1], sys.executable, "-c", program,
             *(message.hex() for message in messages)],
            check=True,
        )  # fmt: skip


FAULTS = {
    "kill": Kill(),
    "stop": Stop(),
    "storm": Storm(),
    "freeze": Freeze(),
    "disk-full": DiskFull(),
    "read-only": ReadOnly(),
    "power-cut": PowerCut(),
    "damage": Damage(),
    "clock-jump": ClockJump(),
    "out-of-memory": OutOfMemory(),
    "partition": Partition(),
    "lossy": Lossy(),
    "stranger": Stranger(),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="time after which no run begins"
    )
    parser.add_argument("--runs", type=int, default=10**9, help="number of runs at most")
    parser.add_argument("--seed", type=int, default=0, help="decides faults, workers and moments")
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--faults", default=",".join(FAULTS), help="which, separated by commas")
    parser.add_argument("--workers", default="1,2", help="numbers of workers")
    parser.add_argument(
        "--json", type=Path, help="file for a line per run; the table is of all in it"
    )
    options = parser.parse_args(argv)
    counts = tuple(map(int, options.workers.split(",")))
    names = []
    for name in options.faults.split(","):
        if missing := FAULTS[name].missing():
            print(f"Without {name}: it needs {missing}", flush=True)
        elif set(counts) & set(FAULTS[name].workers):
            names.append(name)
    scratch = Path(tempfile.mkdtemp(prefix="chaos-"))
    reference = {count: undisturbed(scratch, count) for count in counts}
    end = time.monotonic() + 60 * options.minutes
    results = []
    number = options.first
    while time.monotonic() < end and number < options.first + options.runs:
        noise = random.Random(f"{options.seed}/{number}")
        # In turn, so that every fault has its share.
        name = names[number % len(names)]
        count = noise.choice([count for count in counts if count in FAULTS[name].workers])
        folder = scratch / f"run-{number}"
        result = {"run": number, "fault": name, "workers": count}
        result |= disturbed(folder, FAULTS[name], count, noise, reference[count])
        if is_unexplained(result):
            print(
                f"kept: {folder}; again: --seed {options.seed} --first {number} --runs 1",
                flush=True,
            )
        else:
            shutil.rmtree(folder, ignore_errors=True)
        results.append(result)
        print(json.dumps(result), flush=True)
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps(result) + "\n")
        number += 1
    if not any(map(is_unexplained, results)):
        shutil.rmtree(scratch)
    if options.json and options.json.exists():
        print("\n" + markdown([json.loads(line) for line in options.json.read_text().splitlines()]))
    else:
        print("\n" + markdown(results))
    return int(any(map(is_unexplained, results)))


def is_unexplained(result: dict) -> bool:
    return result["outcome"].startswith("unexplained")


def markdown(results: Sequence[dict]) -> str:
    """Returns a table of fault, workers, outcome and number of runs."""
    table = collections.Counter(
        (result["fault"], result["workers"], result["outcome"]) for result in results
    )
    lines = ["| fault | workers | outcome | runs |", "|---|---|---|---|"]
    order = list(FAULTS)
    for (fault, workers, outcome), runs in sorted(
        table.items(), key=lambda item: (order.index(item[0][0]), *item[0][1:])
    ):
        lines.append(f"| {fault} | {workers} | {outcome} | {runs} |")
    return "\n".join(lines)


def undisturbed(scratch: Path, workers: int) -> tuple[object, float]:
    """Returns what a run ends with that nothing happens to, and its seconds."""
    run = new_run(scratch / f"undisturbed-{workers}", workers)
    start = time.monotonic()
    run.start()
    assert run.wait(HANG_SECONDS), run.log()
    assert {process.returncode for process in run.processes} == {0}, run.log()
    return outcome(run.out), time.monotonic() - start


def new_run(scratch: Path, workers: int) -> Run:
    scratch.mkdir(parents=True)
    out = scratch / "out"
    out.mkdir()
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TF_", "KERAS_", "XLA_", "TRAINER_"))
    }
    return Run(scratch, out, workers, env | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"})


def disturbed(
    scratch: Path,
    fault: Fault,
    workers: int,
    noise: random.Random,
    reference: tuple[object, float],
) -> dict:
    """Has the fault happen to a run; returns what became of it."""
    expected, seconds = reference
    run = new_run(scratch, workers)
    with fault.prepared(run):
        for name in BYSTANDERS:
            path = run.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("the user's")
        if isinstance(fault, PowerCut):
            os.sync()
        run.start()
        begun = time.monotonic()
        if noise.random() < 0.75:  # While it trains, or saves what it has trained.
            while not run.ended() and not list(run.out.glob("checkpoints/steps-*.index")):
                time.sleep(0.005)
            run.wait(noise.uniform(0, seconds / 3))
        else:
            run.wait(noise.uniform(0, seconds))
        moment = round(time.monotonic() - begun, 2)
        checkpoints = len(list(run.out.glob("checkpoints/steps-*.index")))
        fault.strike(run, noise)
        if not run.wait(HANG_SECONDS):
            run.kill()
            return {"moment": moment, "outcome": "unexplained: it hangs", "log": run.log()[-2000:]}
        codes = sorted({process.returncode for process in run.processes})
        result = {"moment": moment, "checkpoints": checkpoints, "codes": codes}
        fault.mend(run)
        if problem := judge(run, fault, codes, expected, workers):
            return {**result, "outcome": f"unexplained: {problem}", "log": run.log()[-3000:]}
        ended = (
            "the same bits"
            if codes == [0] and not isinstance(fault, PowerCut)
            else "code " + ", ".join(map(str, codes))
        )
        if codes != [0] or isinstance(fault, PowerCut | Damage):
            run.processes.clear()
            for log in run.scratch.glob("log-*"):
                log.rename(run.scratch / f"first-{log.name}")
            run.start()
            if not run.wait(HANG_SECONDS):
                run.kill()
                return {**result, "outcome": "unexplained: the same command hangs"}
            again = sorted({process.returncode for process in run.processes})
            result["again"] = again
            if problem := judge(run, fault, again, expected, workers, again=True):
                return {**result, "outcome": f"unexplained: {problem}", "log": run.log()[-3000:]}
            ended += ", then " + ("the same bits" if again == [0] else f"code {again[0]}")
    return {**result, "outcome": ended}


def judge(
    run: Run,
    fault: Fault,
    codes: Sequence[int],
    expected: object,
    workers: int,
    *,
    again: bool = False,
) -> str:
    """Returns what is wrong with the end of a run; empty where it is as it should be."""
    allowed = {0} | (fault.codes if not again else {65, 73} if isinstance(fault, Damage) else set())
    if not set(codes) <= allowed:
        return f"code {codes}{' of the same command' if again else ''}"
    if "Traceback" in run.log() and 1 not in codes:
        return "a traceback"
    if codes == [0] and not (isinstance(fault, Damage | PowerCut) and not again):
        if (received := outcome(run.out)) != expected:
            return f"other bits: {received}"
        left = {str(path.relative_to(run.out)) for path in run.out.rglob("*") if path.is_file()}
        if left != {"mnist.h5", "mnist.json", "history.json", *BYSTANDERS}:
            return f"other files: {sorted(left)}"
    for name in BYSTANDERS:
        path = run.out / name
        if not path.is_file() or path.read_text() != "the user's":
            return f"{name} is lost"
    return ""


def is_bystander(path: Path, run: Run) -> bool:
    return str(path.relative_to(run.out)) in BYSTANDERS


def outcome(folder: Path) -> object:
    """Returns what two runs must have in common that end with the same bits."""
    history = json.loads((folder / "history.json").read_text())
    history.pop("seconds")
    manifest = json.loads((folder / "mnist.json").read_text())
    return [manifest["model"]["sha256"], manifest["model"]["weights_sha256"], history]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
