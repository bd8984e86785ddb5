"""Trains with several workers on this machine, as torchrun does for PyTorch.

    python -m trainer.launch --workers 2 -- --epochs 2 --output-dir out

Each worker is ``python -m trainer.task`` with the flags after ``--``. The workers connect through
a network that nobody else can reach, where the system allows one, and share the machine's CPUs and
GPUs; each line of their output is shown with the worker's number in front.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from typing import Literal

from trainer import cli
from trainer.cli import TASK
from trainer.config import TrainConfig
from trainer.distributed.local import LocalWorkers, share_gpus
from trainer.distributed.private_network import PrivateNetwork, open_private_network
from trainer.errors import ConfigurationError, StoppedError, TrainerError, UsageError
from trainer.log_lines import DroppingStream, json_line
from trainer.machine import available_cpus
from trainer.signals import Signals

PROG = "python -m trainer.launch"

Network = Literal["auto", "private", "host"]

# A restart cannot help against these: wrong flags, inputs, outputs, configurations.
_FINAL = {error.exit_code for error in TrainerError.__subclasses__()} - {StoppedError.exit_code}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Trains with several workers on this machine; the flags of python -m trainer.task follow --.

    Raises:
        UsageError: A value is outside its range.
    """

    workers: int = 2
    """Number of worker processes. Each has an equal
    share of the CPUs and GPUs, unless --threads or
    CUDA_VISIBLE_DEVICES is set."""

    max_restarts: int = 0
    """Number of times that all workers are restarted,
    from the last checkpoint, after one was lost."""

    network: Network = "auto"
    """private: one of the workers' own, which nobody
    else can reach; host: this machine's; auto: private
    where that is possible, else host and a warning."""

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
        with Signals(until_exit=argv is None):
            return cli.run(PROG, LaunchConfig, command, own, resumable=True, advice=cli.ADVICE)
    except _WorkersFailed as failure:  # They have printed their errors.
        return failure.code


def launch(config: LaunchConfig, flags: Sequence[str]) -> None:
    """Starts the workers, shows what they write, and waits for their end.

    Args:
        config: Number of workers and of restarts.
        flags: Flags of ``python -m trainer.task``.

    Raises:
        UsageError: A flag is wrong; nothing was started.
        ConfigurationError: There are fewer GPUs than workers, or there is no private network.
    """
    task = cli.parse(TASK, TrainConfig, flags)
    command = [*cli.module_command("trainer.task"), *flags]
    if not any(flag.split("=")[0] == "--threads" for flag in flags):
        command += ["--threads", str(max(1, available_cpus() // config.workers))]
    variables = share_gpus(config.workers, task.gpus)
    with _private_network(config, task) as network:
        for attempt in range(config.max_restarts + 1):
            if attempt == 1:  # Even a run with --resume never resumes after a restart.
                command += ["--resume", "auto"]
            prefix = task.log_format != "json"
            with LocalWorkers(command, variables, prefix=prefix, network=network) as workers:
                code = workers.wait()
            if code == 0:
                return
            if code in _FINAL or workers.signals or attempt == config.max_restarts:
                raise _WorkersFailed(code)
            print(
                f"{PROG}: ended with {code}; starting all {config.workers} workers again "
                f"({attempt + 1} of {config.max_restarts})",
                file=DroppingStream(sys.stderr),
                flush=True,
            )


def _private_network(
    config: LaunchConfig, task: TrainConfig
) -> contextlib.AbstractContextManager[PrivateNetwork | None]:
    """Returns a network that only the workers can reach; None for that of this machine.

    Raises:
        ConfigurationError: There is none, and no other would do.
    """
    from trainer.data.sources import downloads  # Here, for --help: it takes NumPy's time.

    if config.workers == 1 or config.network == "host":  # One alone listens at no port.
        return contextlib.nullcontext()
    try:
        if downloads(task.data):
            raise OSError(f"data={task.data!r} may have to be downloaded")
        return contextlib.closing(open_private_network())
    except OSError as error:
        reason = error.strerror or error
    if config.network == "private":
        raise ConfigurationError(
            f"Expected a network of the workers' own for network='private'. Received: {reason}. "
            "Use network='host' on a machine that only you use, or whose firewall protects it."
        )
    text = (
        "TensorFlow listens on all network interfaces of this machine, and authenticates "
        "nobody: whoever reaches a worker's port has the rights of this process (SECURITY.md). "
        f"The workers have no network of their own: {reason}."
    )
    if task.log_format == "json":
        text = json_line("notice", text, severity="WARNING")
    print(text, file=DroppingStream(sys.stderr), flush=True)
    return contextlib.nullcontext()


class _WorkersFailed(Exception):  # noqa: N818
    def __init__(self, code: int) -> None:
        self.code = code


if __name__ == "__main__":
    sys.exit(main())
