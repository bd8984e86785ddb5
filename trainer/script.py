"""Runs a script that calls trainer.fit, as one worker of several where there are others.

    python -m trainer.script train.py --its-own-flags
    python -m trainer.script --threads 4 -- train.py --its-own-flags

Where TF_CONFIG or an Indexed Job's environment names several workers, the same command on each of
them trains one model together. ``python -m trainer.launch -- train.py`` starts them on one machine.
"""

import hashlib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import cli
from trainer.config import ScriptConfig
from trainer.distributed import cluster
from trainer.distributed.cluster import Cluster
from trainer.errors import StoppedError, UsageError, from_exit_code
from trainer.signals import TERMINATING, Signals

if TYPE_CHECKING:
    from trainer.distributed.worker import Link

PROG = cli.SCRIPT


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    own, script = cli.split_script(list(sys.argv[1:] if argv is None else argv))
    with Signals(until_exit=argv is None) as signals:

        def command(config: ScriptConfig) -> None:
            try:
                run(config, own, script, signals)
            finally:
                signals.ignore()

        return cli.run(
            PROG,
            ScriptConfig,
            command,
            own,
            worker=lambda: cluster.worker_index(os.environ),
            resumable=True,
        )


def run(
    config: ScriptConfig, flags: Sequence[str], script: Sequence[str], signals: Signals
) -> None:
    """Runs the script in this process; or as one of several workers, in a child that this one
    watches.

    Args:
        config: The configuration.
        flags: The flags it was parsed from, for the child.
        script: The script, and its arguments.
        signals: Entered.

    Raises:
        TrainerError: Any error that a user can cause or meet.
    """
    path = cli.find_script(script)
    workers = cluster.resolve(os.environ)
    if workers is None:
        _configure(config)
        _execute(path, script[1:])
        return
    from trainer.distributed import supervisor
    from trainer.distributed.worker import Link

    if link := Link.find(os.environ):
        link.run(lambda: _work(config, workers, link, path, script[1:], signals))
    else:
        supervisor.run(
            [*cli.module_command("trainer.script"), *flags, "--", *script],
            workers,
            startup_timeout=config.startup_timeout,
            step_timeout=config.step_timeout,
        )


def _configure(config: ScriptConfig) -> None:
    """Sets what the script is to find of TensorFlow where it trains alone.

    Raises:
        UsageError: A flag is for several workers.
        ConfigurationError: Another one is; or there are fewer GPUs.
    """
    if config.step_timeout is not None:
        raise UsageError(
            "step_timeout is for several workers, each of which has a parent process that watches "
            f"it. Received: step_timeout={config.step_timeout} and one process. Leave it out."
        )
    from trainer import runtime
    from trainer.distributed import strategy

    runtime.set_threads(config.threads)
    strategy.check("auto", cluster=None, gpus=config.gpus, collectives=config.collectives)


def _work(
    config: ScriptConfig,
    workers: Cluster,
    link: "Link",
    path: Path,
    arguments: Sequence[str],
    signals: Signals,
) -> None:
    """Connects this process to the other workers, and runs the script."""
    from trainer import runtime
    from trainer.distributed import strategy as strategies
    from trainer.distributed import worker_context
    from trainer.training.manifest import package_versions

    runtime.set_threads(config.threads)
    link.meet(
        {
            **package_versions(),
            "script": hashlib.sha256(path.read_bytes()).hexdigest(),
            "arguments": list(arguments),
            "gpus": strategies.count_gpus(config.gpus),
            "collectives": config.collectives,
        }
    )
    choice = strategies.create(
        "multiworker",
        cluster=workers,
        gpus=config.gpus,
        collectives=config.collectives,
        startup_timeout=config.startup_timeout,
    )
    link.tell("connected")
    link.tell("idle")
    signals.handle_again()
    if workers.is_chief:
        print(choice.notice or choice.reason, file=sys.stderr, flush=True)
    context = worker_context.WorkerContext(workers, choice, link, os.environ.get(cli.JOB))
    with worker_context.entered(context):
        try:
            _execute(path, arguments)
        except KeyboardInterrupt as interrupt:
            if str(interrupt) in TERMINATING:
                raise StoppedError(f"stopped by {interrupt} while nothing was trained.") from None
            raise
        except SystemExit as exit:
            if isinstance(exit.code, str):
                print(exit.code, file=sys.stderr)
            if exit.code not in (None, 0):
                code = exit.code if isinstance(exit.code, int) else 1
                raise from_exit_code(code, f"the script has ended with exit code {code}.") from None
    link.tell("trained")


def _execute(path: Path, arguments: Sequence[str]) -> None:
    """Runs a script as ``python train.py`` does."""
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    runpy.run_path(str(path), run_name="__main__")


if __name__ == "__main__":
    sys.exit(main())
