"""What a user says about the pods of a run, in kubectl's notation, and how it reads as objects.

    settings = PodSettings(workers=3, env=("SEED=1",), toleration=("gpu=yes:NoSchedule",))
    settings.tolerations()        # [{"key": "gpu", "operator": "Equal", "value": "yes", ...}]

``trainer.k8s.manifests`` puts it into the manifests; the fields are flags of ``trainer.submit``.
"""

import dataclasses
import re
from pathlib import PurePosixPath
from typing import Any

from trainer.errors import UsageError

# Marks the flags that may be repeated, as those of kubectl.
REPEATABLE = {"repeatable": True}

_QUANTITY = re.compile(r"\d+(\.\d+)?([mkMGTPE]|[KMGTPE]i)?")  # of Kubernetes, without exponents
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
# A DNS subdomain, which the names of most objects are, and a label's key or value.
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_KEY = re.compile(
    r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
)
_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_TPU = re.compile(r"(?P<accelerator>[a-z0-9-]+):(?P<topology>[1-9]\d*(x[1-9]\d*){1,2})")
_OWN = ("/output", "/tmp", "/modules", "/dev/shm", "/run/secrets/digits")  # noqa: S108


@dataclasses.dataclass(frozen=True, kw_only=True)
class PodSettings:
    """How many pods train, on what, and what the platform has to know about them.

    Raises:
        UsageError: A value is outside its range, or malformed.
    """

    image: str | None = None
    """The trainer's image, which the cluster's nodes can
    pull. None: digits-trainer of this version, loaded
    into the nodes beforehand."""

    image_pull_secret: tuple[str, ...] = dataclasses.field(default=(), metadata=REPEATABLE)
    """Secrets of the namespace with which the image is
    pulled."""

    workers: int = 1
    """Number of pods that train together."""

    gpus: int = 0
    """GPUs per pod."""

    tpu: str | None = None
    """A TPU slice of one host on GKE, accelerator and
    topology: tpu-v5-lite-podslice:2x2."""

    cpu: str | None = None
    """CPUs per pod, such as 4 or 500m: request and limit.
    None: those of the manifests. The threads follow
    the limit, and with them the last bits."""

    memory: str | None = None
    """Memory per pod, such as 4Gi: request and limit.
    None: that of the manifests."""

    storage: str | None = None
    """Size of the PersistentVolumeClaim, such as 10Gi.
    None: that of the manifests."""

    storage_class: str | None = None
    """StorageClass of the PersistentVolumeClaim. None: the
    cluster's default."""

    mount_claim: tuple[str, ...] = dataclasses.field(default=(), metadata=REPEATABLE)
    """PersistentVolumeClaims that exist to mount in each
    pod, read-only, such as a data set: images:/data,
    and --data /data among the training's flags."""

    env: tuple[str, ...] = dataclasses.field(default=(), metadata=REPEATABLE)
    """Environment variables: NAME=VALUE."""

    env_from_secret: tuple[str, ...] = dataclasses.field(default=(), metadata=REPEATABLE)
    """Secrets whose keys become environment variables."""

    queue: str | None = None
    """LocalQueue of Kueue that admits the run, which is
    suspended until then."""

    priority_class: str | None = None
    """PriorityClass of the pods."""

    node_selector: tuple[str, ...] = dataclasses.field(default=(), metadata=REPEATABLE)
    """Labels that a node must have: KEY=VALUE."""

    toleration: tuple[str, ...] = dataclasses.field(default=(), metadata=REPEATABLE)
    """Taints of nodes that the pods tolerate, as kubectl
    taint writes them: KEY=VALUE:EFFECT, KEY:EFFECT or
    KEY."""

    service_account: str | None = None
    """ServiceAccount of the pods. They get no token of
    its. None: the namespace's default."""

    active_deadline: int | None = None
    """Seconds after which a run that has not ended fails.
    None: those of the manifests, a day."""

    ttl: int | None = None
    """Seconds after which a run that has ended is deleted
    in the cluster, but for its claim. None: those of the
    manifests, two days."""

    platform_user: bool = False
    """Name no user and group: the platform gives them, as
    OpenShift does."""

    def __post_init__(self) -> None:
        for field, least in (("workers", 1), ("gpus", 0)):
            if getattr(self, field) < least:
                raise UsageError(
                    f"{field} must be at least {least}. Received: {field}={getattr(self, field)}. "
                    f"Use {getattr(PodSettings, field)}, the default."
                )
        for field, least in (("active_deadline", 1), ("ttl", 0)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise UsageError(
                    f"{field} must be at least {least} seconds. Received: {field}={value}. Leave "
                    "it out for that of the manifests."
                )
        for field in ("cpu", "memory", "storage"):
            self._check(field, _QUANTITY, "a quantity of Kubernetes, such as 4, 500m or 2Gi")
        for field in ("image_pull_secret", "env_from_secret", "storage_class", "queue"):
            self._check(field, _NAME, "the name of an object: lower-case letters, digits, - and .")
        for field in ("priority_class", "service_account"):
            self._check(field, _NAME, "the name of an object: lower-case letters, digits, - and .")
        self._check("tpu", _TPU, "accelerator and topology, such as tpu-v5-lite-podslice:2x2")
        if self.tpu and (self.gpus or self.workers > 1):
            raise UsageError(
                f"tpu must be alone: a slice of one host, and one pod. Received: tpu={self.tpu!r}, "
                f"gpus={self.gpus} and workers={self.workers}. Leave the others out."
            )
        self.variables()
        self.node_labels()
        self.tolerations()
        self.mounts()

    def variables(self) -> list[dict]:
        """Returns ``env`` as a container has it."""
        found = []
        for text in self.env:
            name, equals, value = text.partition("=")
            if not equals or not _ENVIRONMENT_NAME.fullmatch(name):
                raise _malformed("env", "NAME=VALUE", text)
            found.append({"name": name, "value": value})
        return found

    def node_labels(self) -> dict[str, str]:
        """Returns ``node_selector`` as a pod has it."""
        found = {}
        for text in self.node_selector:
            key, equals, value = text.partition("=")
            if not equals or not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
                raise _malformed("node_selector", "KEY=VALUE", text)
            found[key] = value
        return found

    def tolerations(self) -> list[dict]:
        """Returns ``toleration`` as a pod has it."""
        found = []
        for text in self.toleration:
            taint, colon, effect = text.rpartition(":")
            if not colon:
                taint, effect = text, ""
            key, equals, value = taint.partition("=")
            if (
                not _KEY.fullmatch(key)
                or not _VALUE.fullmatch(value)
                or (effect or "NoSchedule") not in _EFFECTS
            ):
                expected = f"KEY=VALUE:EFFECT, KEY:EFFECT or KEY, of the effects {_EFFECTS}"
                raise _malformed("toleration", expected, text)
            one = {"key": key, "operator": "Equal" if equals else "Exists"}
            if equals:
                one["value"] = value
            found.append(one | ({"effect": effect} if effect else {}))
        return found

    def mounts(self) -> list[tuple[str, str]]:
        """Returns claim and path of each of ``mount_claim``."""
        found: list[tuple[str, str]] = []
        for text in self.mount_claim:
            claim, _, path = text.partition(":")
            plain = PurePosixPath(path)
            if (
                not _NAME.fullmatch(claim)
                or not plain.is_absolute()
                or ".." in plain.parts
                or ":" in path
                or path.rstrip("/") in ("", *_OWN, *(used for _, used in found))
            ):
                expected = "CLAIM:PATH with an absolute path of its own"
                raise _malformed("mount_claim", expected, text)
            found.append((claim, path.rstrip("/")))
        return found

    def tpu_slice(self) -> tuple[str, str, int] | None:
        """Returns accelerator, topology and number of chips of ``tpu``."""
        if self.tpu is None:
            return None
        accelerator, _, topology = self.tpu.partition(":")
        chips = 1
        for side in topology.split("x"):
            chips *= int(side)
        return accelerator, topology, chips

    def _check(self, field: str, pattern: re.Pattern, expected: str) -> None:
        """Checks a field that has one text, several, or None."""
        value: Any = getattr(self, field)
        for text in (value,) if isinstance(value, str) else value or ():
            if not pattern.fullmatch(text):
                raise _malformed(field, expected, text)


def _malformed(field: str, expected: str, received: str) -> UsageError:
    return UsageError(
        f"{field} must be {expected}. Received: {field}={received!r}. Correct it, or leave it out."
    )


def config_arguments(values: object) -> tuple[list[str], list[str]]:
    """Returns a configuration file's content as a command line has it: the flags of
    ``trainer.submit``, and those of the training.

    Args:
        values: A mapping of flags, without ``--``, to their values; of the key ``training`` to a
            mapping of the training's flags.

    Raises:
        UsageError: It is not such a mapping.

    >>> config_arguments({"workers": 2, "env": {"A": 1}, "keep": True, "training": {"epochs": 3}})
    (['--workers', '2', '--env', 'A=1', '--keep'], ['--epochs', '3'])
    """
    if not isinstance(values, dict):
        raise UsageError(
            "config must be a YAML file of flags and their values. Received: "
            f"{type(values).__name__}. Write workers: 2, for example."
        )
    values = dict(values)
    return _arguments(values, but="training"), _arguments(values.get("training") or {})


def _arguments(values: object, *, but: str = "") -> list[str]:
    if not isinstance(values, dict):
        raise UsageError(
            f"config must map each flag to its value. Received: {values!r}. Write epochs: 2, for "
            "example."
        )
    found = []
    for name, value in values.items():
        if name == but or value is None or value is False:
            continue
        found.append(f"--{name}")
        if isinstance(value, dict):
            found += [f"{key}={one}" for key, one in value.items()]
        elif isinstance(value, list):
            found += map(str, value)
        elif value is not True:
            found.append(str(value))
    return found
