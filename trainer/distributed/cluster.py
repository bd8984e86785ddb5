"""The workers of a run, and which of them this process is, from environment variables.

    cluster = resolve(os.environ)        # None: this process trains alone
    cluster.workers, cluster.index       # ("host0:2222", "host1:2222"), 1

Worker 0 is the chief, the only one that writes files. ``TF_CONFIG`` describes the workers as
TensorFlow does (https://www.tensorflow.org/guide/distributed_training#tf_config): ``{}`` describes
none, and ``master`` is an older name of ``chief``. Without it, these variables do, which an Indexed
Job of Kubernetes can set to the same values in all its pods:

    TRAINER_WORKERS        number of workers: 3; or of the pods of two Jobs: 1+2. With 1 this
                           process trains alone
    TRAINER_HOSTS          pattern of the host names, {index} being a pod's completion index. Two
                           patterns, separated by a comma, where the workers are pods of two Jobs:
                           that of the chief, and that of the others
    TRAINER_INDEX_OFFSET   added to this pod's completion index to get its worker number: 1 in the
                           Job of the others; default 0
    TRAINER_PORT           port of every worker; default 2222
    JOB_COMPLETION_INDEX   set by Kubernetes

Without those, the tasks that Slurm's ``srun`` has started together are the workers
(``trainer.distributed.slurm``).

With any of them, TRAINER_TOKEN_FILE names the file with the secret that all workers share
(``trainer.distributed.authentication``).
"""

import dataclasses
import ipaddress
import json
import re
from collections.abc import Mapping, Sequence

from trainer.distributed import slurm
from trainer.distributed.authentication import NO_SECRET, Secret, read_secret
from trainer.errors import ConfigurationError

DEFAULT_PORT = 2222  # as in TensorFlow's examples

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_NO_EVALUATOR = "All workers evaluate: leave the evaluator out, or name it as a worker."


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of one run.

    Attributes:
        workers: Their addresses, "host:port", the chief's first.
        index: Number of this worker, counted from 0.
        secret: What all of them know, and nobody else does.
    """

    workers: tuple[str, ...]
    index: int
    secret: Secret = NO_SECRET

    @property
    def is_chief(self) -> bool:
        """Whether this is worker 0, the only one that writes files."""
        return self.index == 0

    @property
    def is_local(self) -> bool:
        """Whether all workers are processes of this machine, by their addresses."""
        return all(split_address(one)[0] in _LOOPBACK for one in self.workers)

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
        ConfigurationError: The description is malformed, or the secret is missing; the message
            names the variable.
    """
    cluster = described(environ)
    return cluster and dataclasses.replace(cluster, secret=read_secret(environ))


def described(environ: Mapping[str, str]) -> Cluster | None:
    """Returns the workers as ``resolve`` does, without the secret that they share.

    Raises:
        ConfigurationError: The description is malformed.
    """
    if "TF_CONFIG" in environ:
        cluster = _from_tf_config(environ["TF_CONFIG"])
    elif "TRAINER_WORKERS" in environ:
        cluster = _from_indexed_job(environ)
    elif slurm.is_step(environ):
        addresses, index = slurm.step_tasks(environ)
        cluster = Cluster(_checked(addresses, "SLURM_STEP_NODELIST"), index)
    else:
        return None
    if cluster is None or len(cluster.workers) < 2:
        return None
    return cluster


def worker_index(environ: Mapping[str, str]) -> int:
    """Returns the number of this worker; 0 where it is alone, or the description is malformed."""
    try:
        cluster = described(environ)
    except ConfigurationError:
        return 0
    return cluster.index if cluster else 0


def _from_tf_config(text: str) -> Cluster | None:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _malformed("JSON", f"{text[:80]!r} ({error})") from None
    if config in ({}, {"cluster": {}}):  # As if it were not set, for TensorFlow too.
        return None
    if not isinstance(config, dict):
        raise _malformed("an object with cluster and task", json.dumps(config))
    jobs = config.get("cluster")
    if not isinstance(jobs, dict):
        raise _malformed('cluster to be an object like {"worker": ["host:port"]}', f"{jobs!r}")
    jobs = {job: addresses for job, addresses in jobs.items() if addresses != []}
    for job, addresses in jobs.items():
        if job not in ("chief", "master", "worker"):
            remedy = {
                "ps": "There are no parameter servers here: name them as workers.",
                "evaluator": _NO_EVALUATOR,
            }.get(job)
            raise _malformed("the jobs chief and worker", f"{job!r}", remedy)
        if not isinstance(addresses, list):
            raise _malformed(f"cluster.{job} to be a list of addresses", f"{addresses!r}")
    chiefs = [*jobs.get("chief", []), *jobs.get("master", [])]
    if len(chiefs) > 1:
        raise _malformed("one chief", f"{len(chiefs)}", "Name the others as workers.")
    workers = _checked([*chiefs, *jobs.get("worker", [])], "TF_CONFIG")

    task = config.get("task")
    task = task if isinstance(task, dict) else {}
    job = task.get("type")
    if not isinstance(job, str) or job not in jobs:
        raise _malformed(
            'task to be an object like {"type": "worker", "index": 0}, '
            f"of one of the jobs {', '.join(jobs)}",
            f"{config.get('task')!r}",
            # Kubeflow's TFJob leaves the evaluator out of the cluster that it describes to it.
            _NO_EVALUATOR if job == "evaluator" else None,
        )
    index = task.get("index")
    if isinstance(index, str) and _is_whole(index):  # TensorFlow accepts it, too.
        index = int(index)
    last = len(jobs[job]) - 1
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index <= last:
        raise _malformed(f"task.index from 0 to {last}, for {job}", f"{index!r}")
    return Cluster(workers, index + (len(chiefs) if job == "worker" else 0))


def _from_indexed_job(environ: Mapping[str, str]) -> Cluster | None:
    jobs = environ["TRAINER_WORKERS"].split("+")
    count = sum(_whole({"TRAINER_WORKERS": pods}, "TRAINER_WORKERS", 1) for pods in jobs)
    if count == 1:
        return None
    port = _whole(environ, "TRAINER_PORT", 1, 65535, default=DEFAULT_PORT)
    offset = _whole(environ, "TRAINER_INDEX_OFFSET", 0, default=0)
    index = offset + _whole(environ, "JOB_COMPLETION_INDEX", 0)
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
            f"digits-worker-{{index}}.digits. Received: {hosts[:200]!r}."
        )
    names += [patterns[-1].replace("{index}", str(number)) for number in rest]
    return Cluster(_checked([f"{name}:{port}" for name in names], "TRAINER_HOSTS"), index)


def _checked(addresses: Sequence, variable: str) -> tuple[str, ...]:
    for address in addresses:
        if not isinstance(address, str) or not _is_address(address):
            raise _malformed(
                "addresses like host:2222, or [2001:db8::1]:2222", f"{address!r}", name=variable
            )
        if addresses.count(address) > 1:
            expected = "an address of its own for every worker"
            raise _malformed(expected, f"{address!r} twice", name=variable)
    return tuple(addresses)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    if not _is_whole(port) or not 1 <= int(port) <= 65535:
        return False
    if host.startswith("[") and host.endswith("]"):
        try:
            return bool(ipaddress.IPv6Address(host[1:-1]))
        except ValueError:
            return False
    return re.fullmatch(r"[\w.-]+", host, re.ASCII) is not None


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", text) is not None


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
    if value is None or not _is_whole(value) or not least <= int(value) <= (most or int(value)):
        span = f"from {least} to {most}" if most else f"of at least {least}"
        raise ConfigurationError(
            f"Expected {name} to be a whole number {span}. "
            f"Received: {'nothing' if value is None else repr(value[:80])}. "
            + (
                "Kubernetes sets it in a Job with completionMode: Indexed."
                if name == "JOB_COMPLETION_INDEX"
                else "Correct it, or unset TRAINER_WORKERS to train alone."
            )
        )
    return int(value)


def _malformed(
    expected: str, received: str, remedy: str | None = None, *, name: str = "TF_CONFIG"
) -> ConfigurationError:
    return ConfigurationError(
        f"{name}: expected {expected}. Received: {received[:200]}. "
        f"{remedy or 'Correct it, or unset it to train alone.'}"
    )
