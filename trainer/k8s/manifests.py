"""The Kubernetes objects of a run, from the YAML of ``k8s/`` that the package carries.

    load_asset("multiworker", "digits-a1b2c")
    fetch_pod("digits-a1b2c", image="digits-trainer:0.1.0")
    print(dump(objects))

The YAML in ``assets`` is the output of kustomize for ``k8s/`` (``make manifests``).
``trainer.k8s.objects`` changes in it what a user says.
"""

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from types import ModuleType
from typing import Any, Literal, NamedTuple

from trainer.errors import ConfigurationError, UsageError

MISSING = (
    "Expected the Kubernetes client for Python. Received: {error}. "
    "pip install 'digits-trainer[k8s]'."
)

Kind = Literal["job", "jobset", "trainjob"]
_LIKE = (
    "imagePullSecrets",
    "nodeSelector",
    "securityContext",
    "serviceAccountName",
    "tolerations",
)
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_MANAGER = "digits-trainer/submit"  # of the patches in a TrainJob


class Root(NamedTuple):
    """The object that trains: by its end a run ends.

    Attributes:
        kind: Its kind in the API.
        chief: Name of the Job whose first pod is the chief.
        jobs: Label selector of the Jobs of the run.
        queued: Whether a queue of Kueue's admits it.
    """

    kind: Literal["Job", "JobSet", "TrainJob"]
    chief: str
    jobs: str
    queued: bool = False

    @classmethod
    def of(cls, kind: Kind, name: str, *, queued: bool = False) -> "Root":
        """Returns that of a run of this name."""
        if kind == "job":
            return cls("Job", name, selector(name), queued)
        jobs = f"jobset.sigs.k8s.io/jobset-name={name}"  # A TrainJob's JobSet has its name.
        if kind == "jobset":
            return cls("JobSet", f"{name}-chief-0", jobs, queued)
        return cls("TrainJob", f"{name}-node-0", jobs, queued)

    @classmethod
    def found(cls, kind: Kind, name: str, one: dict) -> "Root":
        """Returns that of a run from one of its objects that train."""
        return cls.of(kind, name, queued=QUEUE_LABEL in one["metadata"].get("labels", {}))


def fetch_pod(name: str, *, image: str, like: Mapping | None = None) -> dict:
    """Returns a Pod that mounts the PersistentVolumeClaim of a run for ten minutes.

    Args:
        name: Name of the run.
        image: An image that the cluster can pull and that has ``cat`` and ``sleep``.
        like: Specification of a pod of the run, whose user, node labels, tolerations, pull secrets
            and ServiceAccount this one needs, too; None: those of the manifests.
    """
    (pod,) = load_asset("fetch", name)
    pod["spec"]["containers"][0]["image"] = image
    like = like or {}
    pod["spec"] |= {field: like[field] for field in _LIKE if field in like}
    return pod


def pod_spec(root: dict) -> dict:
    """Returns the specification of the pods of a Job or a JobSet; of a TrainJob what it overrides
    in that of its runtime.
    """
    spec = root["spec"]
    if "runtimeRef" in spec:
        if "runtimePatches" in spec:
            spec = _patched_job(spec["runtimePatches"][0])["template"]["spec"]["template"]
        else:
            (spec,) = spec["podTemplateOverrides"]
        return spec.get("spec", {})
    if "replicatedJobs" in spec:
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    return spec["template"]["spec"]


def with_runtime_patches(trainjob: Mapping) -> dict:
    """Returns a TrainJob as Kubeflow Trainer takes it from version 2.2 on: with ``runtimePatches``
    in place of ``podTemplateOverrides``.
    """
    spec = dict(trainjob["spec"])
    (override,) = spec.pop("podTemplateOverrides")
    template = {key: override[key] for key in ("metadata", "spec")}
    jobs = [
        {"name": one["name"], "template": {"spec": {"template": template}}}
        for one in override["targetJobs"]
    ]
    runtime = {"template": {"spec": {"replicatedJobs": jobs}}}
    spec["runtimePatches"] = [{"manager": _MANAGER, "trainingRuntimeSpec": runtime}]
    return {**trainjob, "spec": spec}


def _patched_job(patch: Mapping) -> dict:
    return patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]


def image_of(root: dict) -> str:
    """Returns the image of the pods of a Job, JobSet or TrainJob."""
    if "runtimeRef" in root["spec"]:
        return root["spec"].get("trainer", {}).get("image") or image()
    return pod_spec(root)["containers"][0]["image"]


def image() -> str:
    """Returns the image of the manifests, ``digits-trainer:VERSION``."""
    (pod,) = load_asset("fetch", "any")
    return pod["spec"]["containers"][0]["image"]


def selector(name: str) -> str:
    """Returns the label selector of the objects and pods of a run."""
    return f"app.kubernetes.io/name=digits-trainer,app.kubernetes.io/instance={name}"


def workers_job(name: str) -> str:
    """Returns the name of the Job whose pods are the workers after the chief."""
    return f"{name}-workers"


def secret_name(name: str) -> str:
    """Returns the name of the Secret of a run of several workers."""
    return f"{name}-token"


def config_map_name(name: str) -> str:
    """Returns the name of the ConfigMap of a run with files of the user's."""
    return f"{name}-modules"


def dump(objects: Sequence[dict]) -> str:
    """Returns objects as YAML for ``kubectl apply -f -``."""
    yaml = _yaml()

    class Dumper(yaml.SafeDumper):  # type: ignore[name-defined]
        """Quotes what kubectl's reader takes for something else and PyYAML's does not: y, 1e3."""

    def represent(dumper: Any, text: str) -> Any:
        style = "'" if re.match(r"[ynYN]$|[\d.+]", text) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represent)
    return yaml.dump_all(objects, Dumper=Dumper, sort_keys=False)


def parse_yaml(text: str, what: str) -> list:
    """Returns the documents of a YAML text of the user's.

    Raises:
        UsageError: It is not YAML; the message calls it ``what``.
        ConfigurationError: The package is installed without its extra ``k8s``.
    """
    yaml = _yaml()
    try:
        return [one for one in yaml.safe_load_all(text) if one is not None]
    except yaml.YAMLError as error:
        raise UsageError(
            f"Expected {what} to be YAML. Received: {' '.join(str(error).split())}. Correct it."
        ) from None


def load_asset(kind: str, name: str) -> list[dict]:
    """Returns the objects of a file in ``assets``, with names of a run's in place of ``digits``.

    Raises:
        ConfigurationError: The package is installed without its extra ``k8s``.
    """
    text = (resources.files("trainer.k8s") / "assets" / f"{kind}.yaml").read_text("utf-8")
    # The run in the manifests is called "digits": in names, selectors and host names.
    objects = list(_yaml().safe_load_all(text))
    return _renamed(objects, re.compile(r"\bdigits\b(?!-trainer)"), name)


def _renamed(part: Any, word: re.Pattern, name: str) -> Any:
    if isinstance(part, dict):
        return {key: _renamed(value, word, name) for key, value in part.items()}
    if isinstance(part, list):
        return [_renamed(value, word, name) for value in part]
    return word.sub(name, part) if isinstance(part, str) else part


def _yaml() -> ModuleType:
    try:
        import yaml
    except ImportError as error:
        raise ConfigurationError(MISSING.format(error=error)) from None
    return yaml
