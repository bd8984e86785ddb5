"""Several workers on this machine, trained together: what torchrun is to PyTorch.

    python -m trainer.launch --workers 2 -- --epochs 2 --output-dir out

Each worker is ``python -m trainer.task`` with the flags after ``--``. They meet at free ports of
this machine, and share its CPUs and GPUs; each line they write comes out with the worker's number
in front.
"""

import contextlib
import dataclasses
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from trainer import cli
from trainer.config import TrainConfig
from trainer.distributed import worker as child
from trainer.distributed.cluster import Cluster
from trainer.errors import ConfigurationError, StoppedError, TrainerError, UsageError
from trainer.machine import available_cpus

PROG = "python -m trainer.launch"
TASK = "python -m trainer.task"

GRACE = 20.0  # Seconds in which the others end by themselves when one has failed: their limit.
KILL = 10.0  # Seconds in which they end when asked to.

# What starting again does not change: how the command was given, what it reads and writes.
_FINAL = {error.exit_code for error in TrainerError.__subclasses__()} - {StoppedError.exit_code}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Trains with several workers on this machine; the flags of python -m trainer.task follow --.

    Raises:
        UsageError: A value is outside its range.
    """

    workers: int = 2
    """How many processes train together. Each has its
    share of the CPUs and GPUs, unless --threads or
    CUDA_VISIBLE_DEVICES says otherwise."""

    max_restarts: int = 0
    """How often all are started again, from the last
    checkpoint, when one was lost."""

    def __post_init__(self) -> None:
        for name, least in (("workers", 1), ("max_restarts", 0)):
            if getattr(self, name) < least:
                raise UsageError(
                    f"{name} must be at least {least}. Received: {name}={getattr(self, name)}. "
                    f"Use {getattr(LaunchConfig, name)}, the default."
                )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    own, flags = cli.split(argv)

    def command(config: LaunchConfig) -> None:
        launch(config, flags)

    try:
        return cli.run(PROG, LaunchConfig, command, own)
    except _Ended as ended:  # The workers have said why.
        return ended.code


def launch(config: LaunchConfig, flags: Sequence[str]) -> None:
    """Starts the workers, passes on what they write, and waits for their end.

    Args:
        config: How many, and how often again.
        flags: Those of ``python -m trainer.task``.

    Raises:
        UsageError: A flag is wrong; then nothing is started.
        ConfigurationError: There are fewer GPUs than workers.
    """
    task = cli.parse(TASK, TrainConfig, flags)
    shares = _shares(config.workers, task, flags)
    for attempt in range(config.max_restarts + 1):
        # A run that was begun anew goes on where it is when it is started again.
        again = ["--resume", "auto"] if attempt else []
        with _Group([*flags, *again], shares, prefix=task.log_format != "json") as group:
            code = group.wait()
        if code == 0:
            return
        if code in _FINAL or group.signals or attempt == config.max_restarts:
            raise _Ended(code)
        print(
            f"{PROG}: ended with {code}; starting all {config.workers} workers again "
            f"({attempt + 1} of {config.max_restarts})",
            file=sys.stderr,
            flush=True,
        )


class _Ended(Exception):  # noqa: N818
    def __init__(self, code: int) -> None:
        self.code = code


class _Group:
    """The workers of one attempt."""

    def __init__(
        self, flags: Sequence[str], shares: Sequence[tuple[list[str], dict]], *, prefix: bool
    ) -> None:
        self.flags = flags
        self.shares = shares
        self.prefix = prefix
        self.signals: list[int] = []
        self.events: queue.SimpleQueue = queue.SimpleQueue()

    def __enter__(self) -> "_Group":
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self._receive) for number in numbers}
        workers = tuple(f"127.0.0.1:{port}" for port in free_ports(len(self.shares)))
        self.processes, self.readers = [], []
        for index, (flags, variables) in enumerate(self.shares):
            process = subprocess.Popen(
                [sys.executable, "-m", "trainer.task", *self.flags, *flags],
                env={**os.environ, **variables, "TF_CONFIG": Cluster(workers, index).tf_config},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # The terminal's Ctrl-C is for this process only.
                preexec_fn=child.die_with_parent,
            )
            self.processes.append(process)
        for index, process in enumerate(self.processes):  # Threads only when all are forked.
            plain = f"[{index}] "
            self._copy(process.stdout, sys.stdout, plain if self.prefix else "")
            self._copy(process.stderr, sys.stderr, plain)
            threading.Thread(target=self._wait, args=[index], daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for reader in self.readers:
            reader.join(KILL)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def wait(self) -> int:
        """Returns 0 when worker 0 has written its files; else the code of what went wrong first,
        or of being stopped.
        """
        codes: dict[int, int] = {}
        asks = [signal.SIGTERM, signal.SIGKILL]  # of the others, when one has failed
        until = None  # when the next of them is due
        while len(codes) < len(self.processes):
            try:
                kind, value = self.events.get(
                    timeout=None if until is None else max(0.0, until - time.monotonic())
                )
            except queue.Empty:
                self._send(asks.pop(0))
                until = time.monotonic() + KILL if asks else None
                continue
            if kind == "signal":
                self.signals.append(value)
                self._send(value)
            else:
                code = self.processes[value].returncode
                codes[value] = code if code >= 0 else 128 - code
                if code and len(asks) == 2 and until is None:
                    until = time.monotonic() + GRACE
        bad = [code for code in codes.values() if code]
        if codes[0] == 0 or not bad:
            return 0
        return next((code for code in bad if code != StoppedError.exit_code), bad[0])

    def _receive(self, number: int, frame: object) -> None:
        self.events.put(("signal", number))

    def _send(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)  # Not to one that has ended: Python looks first.

    def _wait(self, index: int) -> None:
        self.processes[index].wait()
        self.events.put(("end", index))

    def _copy(self, source: TextIO, target: TextIO, prefix: str) -> None:
        def copy() -> None:
            for line in source:
                with contextlib.suppress(BrokenPipeError):
                    target.write(prefix + line)
                    target.flush()

        reader = threading.Thread(target=copy, daemon=True)
        reader.start()
        self.readers.append(reader)


def _shares(
    workers: int, task: TrainConfig, flags: Sequence[str]
) -> list[tuple[list[str], dict[str, str]]]:
    """Returns each worker's flags and variables that give it its part of the machine."""
    threads: list[str] = []
    if not any(flag.split("=")[0] == "--threads" for flag in flags):
        threads = ["--threads", str(max(1, available_cpus() // workers))]
    gpus = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if not gpus or task.gpus == 0 or "CUDA_VISIBLE_DEVICES" in os.environ:
        return [(threads, {})] * workers
    each = len(gpus) // workers
    if not each:
        raise ConfigurationError(
            f"Expected a GPU for each of the {workers} workers. Received: {len(gpus)} GPUs. Use "
            f"--workers {len(gpus)}, or --gpus 0 after -- to train on the CPU."
        )
    return [
        (
            threads,
            {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(n * each, n * each + each)))},
        )
        for n in range(workers)
    ]


def free_ports(count: int) -> list[int]:
    """Returns ports that nothing listens at.

    None of those that the system gives to outgoing connections (on Linux from 32768 on), lest one
    take a port before its worker does.
    """
    with contextlib.ExitStack() as held:  # All are held until all are found, to be different.
        ports = []
        while len(ports) < count:
            port = random.randrange(10_000, 30_000)  # noqa: S311
            with contextlib.suppress(OSError):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
        return ports


if __name__ == "__main__":
    sys.exit(main())
