"""Trains with several workers on this machine, as torchrun does for PyTorch.

    python -m trainer.launch --workers 2 -- --epochs 2 --output-dir out
    python -m trainer.launch --workers 2 -- train.py --flags-of-its-own

Each worker is ``python -m trainer.task`` with the flags after ``--``, or where a script follows,
``python -m trainer.script`` with that. The workers connect through a network that nobody else can
reach, where the system allows one, and share the machine's CPUs and GPUs; each line of their output
is shown with the worker's number in front.
"""

import contextlib
import dataclasses
import os
import sys
import uuid
from collections.abc import Sequence
from typing import Literal

from trainer import cli
from trainer.cli import TASK
from trainer.config import ScriptConfig, TrainConfig
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
    """Trains with several workers on this machine; what follows -- are flags of python -m
    trainer.task, or a script that calls trainer.fit, and its arguments.

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
    own, arguments = cli.split(argv)

    def command(config: LaunchConfig) -> None:
        launch(config, arguments)

    try:
        with Signals(until_exit=argv is None):
            return cli.run(PROG, LaunchConfig, command, own, resumable=True, advice=cli.ADVICE)
    except _WorkersFailed as failure:  # They have printed their errors.
        return failure.code


@dataclasses.dataclass(frozen=True)
class _Program:
    """What each worker runs.

    Attributes:
        command: The command, whole.
        gpus: Number of GPUs that it must have; None: its share.
        downloads: Why it needs a network that others can reach; empty: it does not.
        json: Whether it writes its lines as JSON.
        is_script: Whether it is a script of the user's.
    """

    command: list[str]
    gpus: int | None
    downloads: str
    json: bool
    is_script: bool


def launch(config: LaunchConfig, arguments: Sequence[str]) -> None:
    """Starts the workers, shows what they write, and waits for their end.

    Args:
        config: Number of workers and of restarts.
        arguments: Flags of ``python -m trainer.task``, or those of ``python -m trainer.script``.

    Raises:
        UsageError: A flag is wrong; nothing was started.
        InputError: There is no such script.
        ConfigurationError: There are fewer GPUs than workers, or there is no private network.
    """
    threads = max(1, available_cpus() // config.workers)
    is_script = "--" in arguments or (arguments and not arguments[0].startswith("-"))
    program = (_script if is_script else _task)(arguments, threads)
    variables = share_gpus(config.workers, program.gpus)
    # Restarted workers go on with the run, even where it was to begin anew (resume='never').
    job = {cli.JOB: os.environ.get(cli.JOB) or uuid.uuid4().hex} if program.is_script else {}
    with _private_network(config, program) as network:
        command = program.command
        for attempt in range(config.max_restarts + 1):
            # Even a run with --resume never resumes after a restart.
            if attempt == 1 and not program.is_script:
                command += ["--resume", "auto"]
            with LocalWorkers(
                command,
                [{**own, **job} for own in variables],
                prefix=not program.json,
                network=network,
            ) as workers:
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


def _task(flags: Sequence[str], threads: int) -> _Program:
    """Returns the training command with some flags."""
    from trainer.data.sources import downloads  # Here, for --help: it takes NumPy's time.

    task = cli.parse(TASK, TrainConfig, flags)
    command = [*cli.module_command("trainer.task"), *flags]
    if not _has_threads(flags):
        command += ["--threads", str(threads)]
    return _Program(
        command,
        task.gpus,
        f"data={task.data!r} may have to be downloaded" if downloads(task.data) else "",
        task.log_format == "json",
        is_script=False,
    )


def _script(arguments: Sequence[str], threads: int) -> _Program:
    """Returns the command that runs a script of the user's."""
    own, script = cli.split_script(arguments)
    cli.find_script(script)
    config = cli.parse(cli.SCRIPT, ScriptConfig, own)
    if not _has_threads(own):
        own += ["--threads", str(threads)]
    command = [*cli.module_command("trainer.script"), *own, "--", *script]
    return _Program(command, config.gpus, "", json=False, is_script=True)


def _has_threads(flags: Sequence[str]) -> bool:
    return any(flag.split("=")[0] == "--threads" for flag in flags)


def _private_network(
    config: LaunchConfig, program: _Program
) -> contextlib.AbstractContextManager[PrivateNetwork | None]:
    """Returns a network that only the workers can reach; None for that of this machine.

    Raises:
        ConfigurationError: There is none, and no other would do.
    """
    if config.workers == 1 or config.network == "host":  # One alone listens at no port.
        return contextlib.nullcontext()
    try:
        if program.downloads:
            raise OSError(program.downloads)
        network = open_private_network()
        if program.is_script and config.network == "auto":
            _notify(
                "The workers have a network of their own, from which the script reaches no other: "
                "use --network host if it downloads anything.",
                json=False,
            )
        return contextlib.closing(network)
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
    _notify(text, json=program.json)
    return contextlib.nullcontext()


def _notify(text: str, *, json: bool) -> None:
    line = json_line("notice", text, severity="WARNING") if json else text
    print(line, file=DroppingStream(sys.stderr), flush=True)


class _WorkersFailed(Exception):  # noqa: N818
    def __init__(self, code: int) -> None:
        self.code = code


if __name__ == "__main__":
    sys.exit(main())
