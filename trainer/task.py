"""The command: trains the CNN and writes mnist.h5.

    python -m trainer.task --epochs 2 --output-dir out

Where TF_CONFIG or an Indexed Job's environment names several workers, the same command on each of
them trains one model together.
"""

import os
import sys
from collections.abc import Sequence

from trainer import cli
from trainer.config import TrainConfig
from trainer.distributed import cluster
from trainer.signals import Signals

PROG = cli.TASK


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (``trainer.errors`` lists them)."""
    flags = list(sys.argv[1:] if argv is None else argv)
    with Signals(until_exit=argv is None) as signals:

        def command(config: TrainConfig) -> None:
            try:
                train(config, flags, signals)
            finally:
                signals.ignore()

        return cli.run(
            PROG,
            TrainConfig,
            command,
            flags,
            worker=lambda: cluster.worker_index(os.environ),
            resumable=True,
            advice=cli.ADVICE,
        )


def train(config: TrainConfig, flags: Sequence[str], signals: Signals) -> None:
    """Trains in this process; or as one of several workers, in a child that this one watches.

    Args:
        config: The configuration of the run.
        flags: The flags it was parsed from, for the child.
        signals: Entered; they stop the run.

    Raises:
        TrainerError: Any error that a user can cause or meet; ``trainer.errors`` lists them.
    """
    from trainer.training import run

    job = os.environ.get(cli.JOB)
    workers = cluster.resolve(os.environ)
    if workers is None:
        run.train(config, job=job, signals=signals)
        return
    from trainer.distributed import supervisor
    from trainer.distributed.worker import Link
    from trainer.log_lines import DroppingStream, json_line

    if link := Link.find(os.environ):
        link.run(lambda: run.train(config, cluster=workers, link=link, job=job, signals=signals))
    else:

        def notify(text: str) -> None:
            if config.log_format == "json":
                text = json_line("notice", text, severity="WARNING", worker=workers.index)
            print(text, file=DroppingStream(sys.stderr), flush=True)

        supervisor.run(
            [*cli.module_command("trainer.task"), *flags],
            workers,
            startup_timeout=config.startup_timeout,
            step_timeout=config.step_timeout,
            notify=notify,
        )


if __name__ == "__main__":
    sys.exit(main())
