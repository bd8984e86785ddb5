"""The workers of a run, each a process on this machine.

    with LocalWorkers([sys.executable, "-m", "trainer.task", *flags], share_gpus(2)) as workers:
        code = workers.wait()

``trainer.launch`` is built on it.
"""

import contextlib
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO, cast

from trainer.distributed.authentication import TOKEN, make_secret
from trainer.distributed.cluster import Cluster
from trainer.distributed.private_network import PrivateNetwork
from trainer.distributed.worker import die_with_parent
from trainer.errors import ConfigurationError, StoppedError
from trainer.log_lines import DroppingStream
from trainer.signals import stop_signals

FAILURE_TIMEOUT = 20.0  # Seconds that the others have to end by themselves after a failure.
STOP_TIMEOUT = 10.0  # Seconds from SIGTERM to SIGKILL.


class LocalWorkers:
    """Starts workers on this machine, and kills them at the end of the context. Each line that they
    write is copied to this process' output. SIGINT, SIGTERM and SIGHUP are forwarded to all. They
    share a secret that was made for them.

    Args:
        command: The command of each worker, which reads the cluster from TF_CONFIG.
        variables: For each worker, environment variables to set for it alone.
        prefix: Put the worker's number in front of each line that it writes; False: only in front
            of those that are not JSON objects, which name the worker themselves.
        network: Where they listen and connect; None: the network of this machine.

    Attributes:
        signals: The numbers of the signals received so far.
    """

    def __init__(
        self,
        command: Sequence[str],
        variables: Sequence[Mapping[str, str]],
        *,
        prefix: bool = True,
        network: PrivateNetwork | None = None,
    ) -> None:
        self.command = command
        self.variables = variables
        self.prefix = prefix
        self.network = network
        self.signals: list[int] = []
        self._events: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen] = []
        self._copies: list[threading.Thread] = []

    def __enter__(self) -> "LocalWorkers":
        self._handlers = {number: signal.signal(number, self._receive) for number in stop_signals()}
        secret = make_secret()
        addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(len(self.variables)))
        for index, variables in enumerate(self.variables):
            process = subprocess.Popen(
                self.command,
                env={
                    **os.environ,
                    **variables,
                    "TF_CONFIG": Cluster(addresses, index).tf_config,
                    # Of a process' environment other users can read nothing.
                    TOKEN: secret,
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C in a terminal is for this process alone.
                preexec_fn=self._prepare,
            )
            self._processes.append(process)
        outputs = DroppingStream(sys.stdout, "stdout"), DroppingStream(sys.stderr)
        for index, process in enumerate(self._processes):  # No thread may run during a fork.
            stdout, stderr = cast("TextIO", process.stdout), cast("TextIO", process.stderr)
            self._copy(stdout, outputs[0], f"[{index}] ")
            self._copy(stderr, outputs[1], f"[{index}] ")
            threading.Thread(target=self._await_end, args=[index], daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        for copy in self._copies:
            copy.join(STOP_TIMEOUT)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def wait(self) -> int:
        """Waits for the end of all workers. When one has failed, the others have FAILURE_TIMEOUT
        seconds to end by themselves; then they are stopped.

        Returns:
            0 where worker 0 has succeeded; else the first exit code of a worker that is neither 0
            nor 75; else 75.
        """
        codes: dict[int, int] = {}
        stops = [signal.SIGTERM, signal.SIGKILL]
        deadline = None  # of the next of them
        while len(codes) < len(self._processes):
            try:
                kind, value = self._events.get(
                    timeout=None if deadline is None else max(0.0, deadline - time.monotonic())
                )
            except queue.Empty:
                self._send(stops.pop(0))
                deadline = time.monotonic() + STOP_TIMEOUT if stops else None
                continue
            if kind == "signal":
                self.signals.append(value)
                self._send(value)
            else:
                code = self._processes[value].returncode
                codes[value] = code if code >= 0 else 128 - code
                if code and len(stops) == 2 and deadline is None:
                    deadline = time.monotonic() + FAILURE_TIMEOUT
        failures = [code for code in codes.values() if code]
        if codes[0] == 0 or not failures:
            return 0
        return next((code for code in failures if code != StoppedError.exit_code), failures[0])

    def _prepare(self) -> None:
        if self.network:
            self.network.enter()
        die_with_parent()

    def _receive(self, number: int, frame: object) -> None:
        self._events.put(("signal", number))

    def _send(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)  # Python checks first that it has not ended.

    def _await_end(self, index: int) -> None:
        self._processes[index].wait()
        self._events.put(("end", index))

    def _copy(self, source: TextIO, target: DroppingStream, prefix: str) -> None:
        def copy() -> None:
            with source:
                for line in source:
                    bare = not self.prefix and line.startswith("{")
                    target.write(line if bare else prefix + line)
                    target.flush()

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        self._copies.append(thread)


def share_gpus(
    workers: int, gpus: int | None = None, *, devices: Path = Path("/dev")
) -> list[dict[str, str]]:
    """Divides the GPUs of this machine among workers.

    Args:
        workers: Number of workers.
        gpus: Number of GPUs that each must have; None: its equal share; 0: none.
        devices: Folder of the device files.

    Returns:
        For each worker its CUDA_VISIBLE_DEVICES; nothing where there is nothing to divide, or where
        that variable is set already.

    Raises:
        ConfigurationError: There are fewer GPUs than workers.
    """
    count = len(list(devices.glob("nvidia[0-9]*")))
    if not count or gpus == 0 or "CUDA_VISIBLE_DEVICES" in os.environ:
        return [{}] * workers
    each = count // workers
    if not each:
        raise ConfigurationError(
            f"Expected a GPU for each of the {workers} workers. Received: {count} GPUs. Use "
            f"--workers {count}, or --gpus 0 after -- to train on the CPU."
        )
    shares = [range(worker * each, worker * each + each) for worker in range(workers)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(map(str, share))} for share in shares]


def free_ports(count: int) -> list[int]:
    """Returns ports of this machine that nothing listens on.

    They are below those that the system gives to outgoing connections (on Linux 32768 and above),
    lest such a connection take a port before its worker does.
    """
    with contextlib.ExitStack() as bound:  # All stay bound until all are found: they differ.
        ports: list[int] = []
        while len(ports) < count:
            port = random.randrange(10_000, 30_000)  # noqa: S311
            with contextlib.suppress(OSError):
                bound.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
        return ports
