"""A user's changes to the objects of a run: strategic merge patches, made by kubectl itself.

    objects = apply_patches(objects, Path("patch.yaml").read_text())

A patch for each Job of a run, also those that a JobSet is made of::

    kind: Job
    spec:
      template:
        metadata:
          annotations:
            sidecar.istio.io/inject: "false"
"""

import json
import subprocess
from collections.abc import Sequence

from trainer.errors import ConfigurationError, UsageError
from trainer.k8s.manifests import parse_yaml

SECONDS = 60.0  # for kubectl, which asks no cluster


def apply_patches(objects: Sequence[dict], text: str) -> list[dict]:
    """Returns objects with patches applied.

    Args:
        objects: As ``trainer.k8s.objects.build`` returns them.
        text: YAML documents, each a part of an object. One without ``metadata.name`` is for all
            objects of its ``kind``. Lists are merged as ``kubectl patch --type=strategic`` does;
            those of a JobSet or a TrainJob are replaced (``--type=merge``).

    Raises:
        UsageError: It is not YAML, names no kind of the run, or kubectl refuses it.
        ConfigurationError: There is no kubectl.
    """
    patched = list(objects)
    for patch in parse_yaml(text, "patch"):
        if not isinstance(patch, dict) or not isinstance(patch.get("kind"), str):
            raise _refused("a part of an object with its kind", repr(patch)[:80])
        found = False
        for number, one in enumerate(patched):
            if _is_for(patch, one):
                patched[number] = _patch(one, patch)
                found = True
            elif patch["kind"] == "Job" and "replicatedJobs" in one.get("spec", {}):
                patched[number] = _patch_jobs_of(one, patch)
                found = True
        if not found:
            kinds = ", ".join(dict.fromkeys(one["kind"] for one in objects))
            name = (patch.get("metadata") or {}).get("name", "any name")
            raise _refused(f"of kind {kinds}", f"{patch['kind']} of {name}")
    return patched


def _is_for(patch: dict, one: dict) -> bool:
    name = (patch.get("metadata") or {}).get("name")
    return patch["kind"] == one["kind"] and name in (None, one["metadata"]["name"])


def _patch_jobs_of(jobset: dict, patch: dict) -> dict:
    jobset = json.loads(json.dumps(jobset))
    name = (patch.get("metadata") or {}).get("name")
    for replicated in jobset["spec"]["replicatedJobs"]:
        if name not in (None, replicated["name"]):
            continue
        metadata = {"name": replicated["name"]}
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata}
        replicated["template"]["spec"] = _patch(job | replicated["template"], patch)["spec"]
    return jobset


def _patch(one: dict, patch: dict) -> dict:
    kind = "merge" if one["kind"] in ("JobSet", "TrainJob") else "strategic"
    command = ["kubectl", "patch", "--local", "--filename=-", f"--type={kind}"]
    command += [f"--patch={json.dumps(patch)}", "--output=json"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(one),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise ConfigurationError(
            "Expected kubectl, which merges a patch as it does everywhere else. Received: none on "
            "the PATH. Install kubectl, or leave out patch."
        ) from None
    if done.returncode:
        raise _refused(f"one that kubectl applies to {one['kind']}", " ".join(done.stderr.split()))
    return json.loads(done.stdout)


def _refused(expected: str, received: str) -> UsageError:
    return UsageError(f"Expected each patch to be {expected}. Received: {received}. Correct it.")
