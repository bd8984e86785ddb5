"""The workers of a run, and which of them this process is, from environment variables.

    cluster = resolve(os.environ)        # None: this process trains alone
    cluster.workers, cluster.index       # ("host0:2222", "host1:2222"), 1

Worker 0 is the chief, the only one that writes files. ``TF_CONFIG`` describes the workers as
TensorFlow does (https://www.tensorflow.org/guide/distributed_training#tf_config). Without it, these
variables do, which a Kubernetes Indexed Job can set to the same values in all its pods:

    TRAINER_WORKERS        number of workers: 3; or of the pods of two Jobs: 1+2
    TRAINER_HOSTS          pattern of the host names, {index} being a pod's completion index. Two
                           patterns, separated by a comma, where the workers are pods of two Jobs:
                           that of the chief, and that of the others
    TRAINER_INDEX_OFFSET   added to this pod's completion index to get its worker number: 1 in the
                           Job of the others; default 0
    TRAINER_PORT           port of every worker; default 2222
    JOB_COMPLETION_INDEX   set by Kubernetes
"""

import dataclasses
import json
from collections.abc import Mapping

from trainer.errors import ConfigurationError

DEFAULT_PORT = 2222  # as in TensorFlow's examples


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of one run.

    Attributes:
        workers: Their addresses, "host:port", the chief's first.
        index: Number of this worker, counted from 0.
    """

    workers: tuple[str, ...]
    index: int

    @property
    def is_chief(self) -> bool:
        """Whether this is worker 0, the only one that writes files."""
        return self.index == 0

    @property
    def tf_config(self) -> str:
        """The value of the environment variable TF_CONFIG for this worker."""
        task = {"type": "worker", "index": self.index}
        return json.dumps({"cluster": {"worker": list(self.workers)}, "task": task})

    def name(self, index: int) -> str:
        """Returns how messages name a worker."""
        return f"worker {index} ({self.workers[index]})"


def split_address(address: str) -> tuple[str, int]:
    """Splits an address into host and port, as Python's sockets take them.

    >>> split_address("digits-0.digits:2222"), split_address("[::1]:80")
    (('digits-0.digits', 2222), ('::1', 80))
    """
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def resolve(environ: Mapping[str, str]) -> Cluster | None:
    """Returns the workers that the environment describes; None for fewer than two.

    Raises:
        ConfigurationError: The description is malformed; the message names the variable.
    """
    if "TF_CONFIG" in environ:
        cluster = _from_tf_config(environ["TF_CONFIG"])
    elif "TRAINER_WORKERS" in environ:
        cluster = _from_indexed_job(environ)
    else:
        return None
    return cluster if len(cluster.workers) > 1 else None


def _from_tf_config(text: str) -> Cluster:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise _malformed("JSON", f"{text[:80]!r} ({error})") from None
    if not isinstance(config, dict):
        raise _malformed("an object with cluster and task", text[:80])
    jobs = config.get("cluster")
    if not isinstance(jobs, dict) or not jobs:
        raise _malformed('cluster to be an object like {"worker": ["host:port"]}', f"{jobs!r}")
    for job, addresses in jobs.items():
        if job not in ("chief", "worker"):
            remedy = {
                "ps": "There are no parameter servers here: name them as workers.",
                "evaluator": "All workers evaluate: leave it out, or name it as a worker.",
            }.get(job)
            raise _malformed("the jobs chief and worker", f"{job!r}", remedy)
        if not isinstance(addresses, list) or not addresses:
            raise _malformed(f"cluster.{job} to be a list of addresses", f"{addresses!r}")
    chiefs, others = jobs.get("chief", []), jobs.get("worker", [])
    if len(chiefs) > 1:
        raise _malformed("one chief", f"{len(chiefs)}", "Name the others as workers.")
    workers = _checked([*chiefs, *others])

    task = config.get("task")
    if not isinstance(task, dict) or task.get("type") not in jobs:
        raise _malformed(
            'task to be an object like {"type": "worker", "index": 0}, '
            f"of one of the jobs {', '.join(jobs)}",
            f"{task!r}",
        )
    job, index = task["type"], task.get("index")
    if isinstance(index, str) and index.isdecimal():  # TensorFlow accepts it, too.
        index = int(index)
    last = len(jobs[job]) - 1
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= last:
        raise _malformed(f"task.index from 0 to {last}, for {job}", f"{index!r}")
    return Cluster(workers, index + (len(chiefs) if job == "worker" else 0))


def _from_indexed_job(environ: Mapping[str, str]) -> Cluster:
    jobs = environ["TRAINER_WORKERS"].split("+")
    count = sum(_whole({"TRAINER_WORKERS": pods}, "TRAINER_WORKERS", 1) for pods in jobs)
    port = _whole(environ, "TRAINER_PORT", 1, 65535, default=DEFAULT_PORT)
    offset = _whole(environ, "TRAINER_INDEX_OFFSET", 0, default=0)
    index = offset + _whole(environ, "JOB_COMPLETION_INDEX", 0, default=0 if count == 1 else None)
    if index >= count:
        raise ConfigurationError(
            f"Expected a worker's number from 0 to {count - 1}. Received: {index}, of "
            f"JOB_COMPLETION_INDEX and TRAINER_INDEX_OFFSET={offset}. TRAINER_WORKERS={count} "
            "must be the completions of all Jobs together."
        )
    hosts = environ.get("TRAINER_HOSTS", "")
    patterns = [pattern.strip() for pattern in hosts.split(",")]
    rest = range(count)
    names = []
    if len(patterns) == 2:
        names.append(patterns[0].replace("{index}", "0"))
        rest = range(count - 1)
    if len(patterns) > 2 or not all(patterns) or (len(rest) > 1 and "{index}" not in patterns[-1]):
        raise ConfigurationError(
            "Expected TRAINER_HOSTS to be one pattern or two like digits-chief-0.digits,"
            f"digits-worker-{{index}}.digits. Received: {hosts!r}."
        )
    names += [patterns[-1].replace("{index}", str(number)) for number in rest]
    return Cluster(_checked([f"{name}:{port}" for name in names]), index)


def _checked(addresses: list) -> tuple[str, ...]:
    for address in addresses:
        host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
        if not host or "/" in host or not port.isdecimal() or not 1 <= int(port) <= 65535:
            raise _malformed("addresses like host:2222", f"{address!r}")
        if addresses.count(address) > 1:
            raise _malformed("an address of its own for every worker", f"{address!r} twice")
    return tuple(addresses)


def _whole(
    environ: Mapping[str, str],
    name: str,
    least: int,
    most: int | None = None,
    default: int | None = None,
) -> int:
    value = environ.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.isdecimal() or not least <= int(value) <= (most or int(value)):
        span = f"from {least} to {most}" if most else f"of at least {least}"
        raise ConfigurationError(
            f"Expected {name} to be a whole number {span}. "
            f"Received: {'nothing' if value is None else repr(value)}. "
            + (
                "Kubernetes sets it in a Job with completionMode: Indexed."
                if name == "JOB_COMPLETION_INDEX"
                else "Correct it, or unset TRAINER_WORKERS to train alone."
            )
        )
    return int(value)


def _malformed(expected: str, received: str, remedy: str | None = None) -> ConfigurationError:
    return ConfigurationError(
        f"TF_CONFIG: expected {expected}. Received: {received}. "
        f"{remedy or 'Correct it, or unset it to train alone.'}"
    )
