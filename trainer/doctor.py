"""The command: tells what would stop a run on this machine, and what to do about it.

    python -m trainer.doctor --output-dir out --gpus 2

It takes the flags of the run, starts nothing that stays, and leaves no file behind.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer import cli
from trainer.config import TrainConfig
from trainer.distributed import cluster
from trainer.errors import ConfigurationError
from trainer.log_lines import Severity, json_line
from trainer.signals import Signals

if TYPE_CHECKING:
    from trainer.diagnosis.finding import Finding, Status

PROG = cli.DOCTOR

_SEVERITIES: "dict[Status, Severity]" = {"ok": "INFO", "warning": "WARNING", "error": "ERROR"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig(TrainConfig):
    """Tells what would stop a run with these flags on this machine; the exit code is 78 then.

    Raises:
        UsageError: A value is outside its range.
    """

    json: bool = False
    """Print a JSON object for each check, as with
    --log-format json."""

    def run(self) -> TrainConfig:
        """Returns the configuration of the run."""
        names = [field.name for field in dataclasses.fields(TrainConfig)]
        return TrainConfig(**{name: getattr(self, name) for name in names})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (``trainer.errors`` lists them)."""
    with Signals(until_exit=argv is None):
        return cli.run(PROG, DoctorConfig, diagnose, argv, worker=_worker_index)


def diagnose(config: DoctorConfig) -> None:
    """Prints a line for each check.

    Raises:
        ConfigurationError: A run would fail.
    """
    from trainer.diagnosis.examination import examine, failures

    findings = []
    for finding in examine(config.run(), os.environ, job=os.environ.get(cli.JOB)):
        findings.append(finding)
        if config.json or config.log_format == "json":
            print(_json(finding), flush=True)
        else:
            print(f"{finding.status:8} {finding.check:15}  {finding.seen}", flush=True)
            if finding.remedy:
                print(f"{'':26}{finding.remedy}", flush=True)
    if failed := failures(findings):
        raise ConfigurationError(
            "Expected a machine on which this run can train. Received: errors of "
            f"{', '.join(failed)}. Do what the lines above say."
        )


def _json(finding: "Finding") -> str:
    return json_line(
        "check",
        f"{finding.check}: {finding.seen}" + (f". {finding.remedy}" if finding.remedy else ""),
        severity=_SEVERITIES[finding.status],
        worker=_worker_index(),
        **dataclasses.asdict(finding),
    )


def _worker_index() -> int:
    return cluster.worker_index(os.environ)


if __name__ == "__main__":
    sys.exit(main())
