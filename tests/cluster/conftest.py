"""The manifests on a real cluster: the one that KUBECONFIG names, in a namespace of their own.

The image is the manifests' own, ``digits-trainer:VERSION``: load it into the cluster first.
"""

import json
import os
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items):
    reason = None
    if not shutil.which("kubectl"):
        reason = "kubectl is not on the PATH"
    elif not os.environ.get("KUBECONFIG"):
        reason = "KUBECONFIG names no cluster"
    for item in items:
        if reason and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


class Namespace:
    """A namespace in which Pod Security "restricted" is enforced."""

    def __init__(self):
        self.name = f"digits-{uuid.uuid4().hex[:8]}"

    def kubectl(self, *arguments, check=True, **options):
        done = subprocess.run(
            ["kubectl", "--namespace", self.name, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
            **options,
        )
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    def get(self, *arguments):
        return json.loads(self.kubectl("get", *arguments, "--output=json"))

    def apply(self, manifest, *flags):
        """Applies a kustomization, or a file, of ``k8s/`` with more flags of the command."""
        path = ROOT / "k8s" / manifest
        text = path.read_text() if path.is_file() else self.kubectl("kustomize", path)
        objects = [one for one in yaml.safe_load_all(text) if one]
        for one in objects:
            if one["kind"] == "Job":
                container = one["spec"]["template"]["spec"]["containers"][0]
                container["args"] += map(str, flags)
        self.kubectl("apply", "--filename=-", input=yaml.safe_dump_all(objects))

    def wait(self, condition, *, seconds=300):
        """Waits until a function of the namespace gives something, and returns that."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, self.kubectl("describe", "jobs,pods")
            time.sleep(0.5)
        return value

    def ended(self, job):
        """Waits until a Job is complete or failed; returns which."""

        def condition():
            for one in self.get("job", job)["status"].get("conditions", []):
                if one["type"] in ("Complete", "Failed") and one["status"] == "True":
                    return one["type"]
            return None

        return self.wait(condition, seconds=600)

    def pods(self, job):
        return self.get("pods", f"--selector=job-name={job}")["items"]

    def messages(self, job):
        """Returns the exit code and the termination message of every pod that has ended."""
        states = [
            status["state"].get("terminated")
            for pod in self.pods(job)
            for status in pod["status"].get("containerStatuses", [])
        ]
        return [(state["exitCode"], state.get("message", "")) for state in states if state]

    def events(self, job):
        """Returns what a Job's newest pod has logged."""
        lines = self.kubectl("logs", f"job/{job}").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def fetch(self, folder):
        """Copies the files from the claim, through a short-lived pod."""
        job = yaml.safe_load_all(self.kubectl("kustomize", ROOT / "k8s" / "base"))
        pod = next(one for one in job if one["kind"] == "Job")["spec"]["template"]["spec"]
        container = pod["containers"][0]
        container["command"], container["args"] = ["sleep"], ["600"]
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "fetch"}, "spec": pod}
        self.kubectl("apply", "--filename=-", input=yaml.safe_dump(manifest))
        self.kubectl("wait", "--for=condition=Ready", "pod/fetch", "--timeout=120s")
        self.kubectl("cp", "fetch:/output", folder)
        self.kubectl("delete", "pod/fetch", "--grace-period=0", "--force")


@pytest.fixture
def namespace():
    one = Namespace()
    one.kubectl("create", "namespace", one.name)
    label = "pod-security.kubernetes.io/enforce=restricted"
    one.kubectl("label", "namespace", one.name, label)
    yield one
    one.kubectl("delete", "namespace", one.name, "--wait=false")
