"""The Kubernetes objects of a run, from the YAML of ``k8s/`` that the package carries.

    objects = build("digits-a1b2c", workers=3, flags=["--epochs", "2"])
    print(dump(objects))

Nothing is described here a second time: kustomize has written the files in ``assets`` from the
kustomizations of ``k8s/``, and what is done to them here is what a person would edit.
"""

import re
from collections.abc import Sequence
from importlib import resources
from types import ModuleType
from typing import Any

from trainer.errors import ConfigurationError

MISSING = (
    "Expected the Kubernetes client for Python. Received: {error}. "
    "pip install 'digits-trainer[k8s]'."
)


def build(
    name: str,
    *,
    image: str | None = None,
    workers: int = 1,
    gpus: int = 0,
    flags: Sequence[str] = (),
) -> list[dict]:
    """Makes the objects of a run: a claim, its Jobs, and for several workers their network.

    Args:
        name: Of the run, which begins the name of each object.
        image: Of the trainer; None: the manifests' own, ``digits-trainer:VERSION``.
        workers: How many pods train together.
        gpus: GPUs of each pod.
        flags: More flags of ``python -m trainer.task``.

    Returns:
        Manifests as the API server takes them, in the order to apply them in.

    Raises:
        ConfigurationError: The package is installed without its extra ``k8s``.
    """
    kind = "multiworker" if workers > 1 else "job"
    if gpus:
        kind = "multiworker-gpu" if workers > 1 else "gpu"
    objects = _load(kind, name)
    for job in (one for one in objects if one["kind"] == "Job"):
        container = job["spec"]["template"]["spec"]["containers"][0]
        if image:
            container["image"] = image
        if gpus:
            container["resources"]["limits"]["nvidia.com/gpu"] = gpus
            container["args"] = [
                f"--gpus={gpus}" if arg.startswith("--gpus=") else arg for arg in container["args"]
            ]
        container["args"] += flags
        if workers > 1:
            for variable in container["env"]:
                if variable["name"] == "TRAINER_WORKERS":
                    variable["value"] = f"1+{workers - 1}"
            if job["metadata"]["name"] == workers_job(name):
                job["spec"] |= {"completions": workers - 1, "parallelism": workers - 1}
    # What a pod needs comes before it.
    return sorted(objects, key=lambda one: one["kind"] == "Job")


def fetch_pod(name: str, *, image: str) -> dict:
    """Makes a pod that lives for some minutes, to read what a run has left in its claim.

    Args:
        name: Of the run.
        image: One that the cluster has; it needs ``cat``.
    """
    (pod,) = _load("fetch", name)
    pod["spec"]["containers"][0]["image"] = image
    return pod


def image() -> str:
    """Returns the manifests' own image, ``digits-trainer:VERSION``."""
    (pod,) = _load("fetch", "any")
    return pod["spec"]["containers"][0]["image"]


def selector(name: str) -> str:
    """Returns the label selector of all objects and pods of a run, and of nothing else."""
    return f"app.kubernetes.io/name=digits-trainer,app.kubernetes.io/instance={name}"


def workers_job(name: str) -> str:
    """Names the Job of a run's workers after the first."""
    return f"{name}-workers"


def dump(objects: Sequence[dict]) -> str:
    """Writes objects as YAML that ``kubectl apply -f -`` takes."""
    return _yaml().safe_dump_all(objects, sort_keys=False)


def _load(kind: str, name: str) -> list[dict]:
    text = (resources.files("trainer.k8s") / "assets" / f"{kind}.yaml").read_text("utf-8")
    # The manifests' run is called "digits", wherever its name stands.
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
