"""All checks, in an order in which a cause comes before what follows from it.

for finding in examine(config, os.environ): ...
"""

from collections.abc import Iterable, Iterator, Mapping

from trainer.config import TrainConfig
from trainer.diagnosis import probe
from trainer.diagnosis.connections import check_cluster
from trainer.diagnosis.devices import check_driver, describe
from trainer.diagnosis.environment import check_environment
from trainer.diagnosis.finding import Finding
from trainer.diagnosis.folder import check_folder
from trainer.diagnosis.packages import check_packages
from trainer.diagnosis.resources import check_resources
from trainer.distributed import cluster
from trainer.errors import ConfigurationError


def examine(
    config: TrainConfig, environ: Mapping[str, str], *, job: str | None = None
) -> Iterator[Finding]:
    """Yields what each check finds, as soon as it has.

    Args:
        config: The configuration of the run.
        environ: The environment of this process.
        job: UID of the Kubernetes Job whose pod this is; None outside one.
    """
    reported: set[str] = set()
    for finding in _all(config, environ, job):
        # One error may end several checks: a wrong TF_CONFIG, a TensorFlow that is missing.
        if finding.status != "error" or finding.seen not in reported:
            yield finding
        reported.add(finding.seen)


def failures(findings: Iterable[Finding]) -> list[str]:
    """Names the checks that have found what would make a run fail, each once."""
    errors = (finding.check for finding in findings if finding.status == "error")
    return list(dict.fromkeys(errors))


def _all(config: TrainConfig, environ: Mapping[str, str], job: str | None) -> Iterator[Finding]:
    yield from check_packages()
    workers, known = None, True
    try:
        workers = cluster.resolve(environ)
    except ConfigurationError as error:
        known = False
        yield Finding("workers", "error", str(error))
    writes = workers is None or workers.is_chief
    yield from check_resources(config, len(workers.workers) if workers else 1)
    yield from check_environment(config, environ)
    if writes:
        yield from check_folder(config, waits=job is not None)
    else:
        yield Finding("output folder", "ok", "worker 0 alone writes")
    yield check_driver()
    yield from describe(probe.start(config, job=job), config, writes=writes)
    if known:
        yield from check_cluster(workers, in_pod="KUBERNETES_SERVICE_HOST" in environ)
