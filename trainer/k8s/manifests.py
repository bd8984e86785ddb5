"""The Kubernetes objects of a run, from the YAML of ``k8s/`` that the package carries.

    objects = build("digits-a1b2c", workers=3, flags=["--epochs", "2"])
    print(dump(objects))

The YAML in ``assets`` is the output of kustomize for ``k8s/`` (``make manifests``). What is changed
here is what a user would change in an editor: name, image, numbers and arguments.
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
    token: str | None = None,
    downloads: bool = False,
) -> list[dict]:
    """Returns the objects of a run: a PersistentVolumeClaim, a Job, and for several workers a
    second Job, a headless Service, a NetworkPolicy and a Secret.

    Args:
        name: Name of the run, a prefix of the name of each object.
        image: The trainer's image; None: that of the manifests, ``digits-trainer:VERSION``.
        workers: Number of pods that train together.
        gpus: GPUs per pod.
        flags: Further flags of ``python -m trainer.task``.
        token: The secret by which several workers know one another; None: that of the Secret
            NAME-token, if there is one.
        downloads: Whether the pods need the internet, for their data.

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
    if workers > 1 and token:
        objects.append(_own_secret(objects, name, token))
    for one in objects:
        if one["kind"] == "NetworkPolicy" and downloads:
            one["spec"]["egress"].append({"ports": [{"port": port} for port in (80, 443)]})
    # Jobs last: a pod needs its volume, its network and its secret.
    return sorted(objects, key=lambda one: one["kind"] == "Job")


def fetch_pod(name: str, *, image: str) -> dict:
    """Returns a Pod that mounts the PersistentVolumeClaim of a run for ten minutes.

    Args:
        name: Name of the run.
        image: An image that the cluster can pull and that has ``cat`` and ``sleep``.
    """
    (pod,) = _load("fetch", name)
    pod["spec"]["containers"][0]["image"] = image
    return pod


def image() -> str:
    """Returns the image of the manifests, ``digits-trainer:VERSION``."""
    (pod,) = _load("fetch", "any")
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


def dump(objects: Sequence[dict]) -> str:
    """Returns objects as YAML for ``kubectl apply -f -``."""
    return _yaml().safe_dump_all(objects, sort_keys=False)


def _own_secret(objects: Sequence[dict], name: str, token: str) -> dict:
    """Returns the Secret of a run, and has its pods require it."""
    for job in (one for one in objects if one["kind"] == "Job"):
        pod = job["spec"]["template"]["spec"]
        for volume in pod["volumes"]:
            volume.get("secret", {}).pop("optional", None)
        for variable in pod["containers"][0]["env"]:
            if variable["name"] == "TRAINER_TOKEN_FILE":
                variable["value"] = variable["value"].removeprefix("-")
    (claim,) = (one for one in objects if one["kind"] == "PersistentVolumeClaim")
    labels = dict(claim["metadata"]["labels"])
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": secret_name(name), "labels": labels},
        "stringData": {"token": token},
    }


def _load(kind: str, name: str) -> list[dict]:
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
