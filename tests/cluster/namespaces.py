"""A namespace of the cluster, and what a user does in it with kubectl."""

import contextlib
import json
import subprocess
import time
import uuid
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
SMALL = ("--epochs=2", "--train-limit=1024", "--test-limit=200")
EAGER = (*SMALL, "--steps-per-execution=1", "--checkpoint-every=1")
KILLED = ("--grace-period=0", "--force")  # flags of kubectl delete


class Namespace:
    """A namespace in which Pod Security "restricted" is enforced."""

    def __init__(self):
        self.name = f"digits-{uuid.uuid4().hex[:8]}"

    @classmethod
    @contextlib.contextmanager
    def make(cls):
        one = cls()
        one.kubectl("create", "namespace", one.name)
        label = "pod-security.kubernetes.io/enforce=restricted"
        one.kubectl("label", "namespace", one.name, label)
        try:
            yield one
        finally:
            one.close()

    def kubectl(self, *arguments, check=True, **options):
        done = subprocess.run(
            ["kubectl", "--namespace", self.name, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
            **options,
        )
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    def get(self, *arguments):
        return json.loads(self.kubectl("get", *arguments, "--output=json"))

    def apply(self, manifest, *flags, image=None, gpus=None):
        """Applies a kustomization or a file of ``k8s/``, with further flags of the command."""
        path = ROOT / "k8s" / manifest
        text = path.read_text() if path.is_file() else self.kubectl("kustomize", path)
        objects = [one for one in yaml.safe_load_all(text) if one]
        for one in objects:
            if one["kind"] == "Job":
                pod = one["spec"]["template"]["spec"]
                container = pod["containers"][0]
                container["args"] += map(str, flags)
                for doctor in pod.get("initContainers", []):
                    doctor["args"] += map(str, flags)
                if image:
                    container["image"] = image
                if gpus:
                    container["args"].append(f"--gpus={gpus}")
                    container["resources"]["limits"]["nvidia.com/gpu"] = gpus
        self.kubectl("apply", "--filename=-", input=yaml.safe_dump_all(objects))

    def wait(self, condition, *, seconds=300):
        """Waits until a function returns something true, and returns that.

        ``seconds`` only turns a hang into a failure.
        """
        end = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < end, self.kubectl("describe", "jobs,pods")
            time.sleep(0.5)
        return value

    def ended(self, job):
        """Waits until a Job is Complete or Failed; returns which."""

        def condition():
            for one in self.get("job", job)["status"].get("conditions", []):
                if one["type"] in ("Complete", "Failed") and one["status"] == "True":
                    return one["type"]
            return None

        return self.wait(condition, seconds=600)

    def pods(self, job):
        return self.get("pods", f"--selector=job-name={job}")["items"]

    def messages(self, job):
        """Returns exit code and termination message of every terminated pod."""
        states = [
            status["state"].get("terminated")
            for pod in self.pods(job)
            for status in pod["status"].get("containerStatuses", [])
        ]
        return [(state["exitCode"], state.get("message", "")) for state in states if state]

    def events(self, job):
        """Returns the log of the pod that completed a Job, as JSON objects."""
        (pod,) = (one for one in self.pods(job) if one["status"]["phase"] == "Succeeded")
        lines = self.kubectl("logs", pod["metadata"]["name"]).splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def steps(self, job="digits"):
        """Returns the step of the newest checkpoint, as the chief's pod lists it.

        Args:
            job: Name of the Job whose first pod is the chief.
        """
        running = [
            pod["metadata"]["name"]
            for pod in self.pods(job)
            if pod["status"]["phase"] == "Running"
            and pod["metadata"]
            .get("annotations", {})
            .get("batch.kubernetes.io/job-completion-index", "0")
            == "0"
        ]
        if not running:
            return 0
        listed = self.kubectl("exec", running[0], "--", "ls", "/output/checkpoints", check=False)
        return max(
            (int(name.split("-")[1].split(".")[0]) for name in listed.split() if "index" in name),
            default=0,
        )

    def suspend(self, *jobs, to=True):
        """Suspends Jobs, or resumes them."""
        patch = json.dumps({"spec": {"suspend": to}})
        for job in jobs:
            self.kubectl("patch", "job", job, "--patch", patch)
        if to:
            self.wait(lambda: not any(self.pods(job) for job in jobs))

    def fetch(self, folder):
        """Copies the files from the claim, as the documentation does."""
        with self.pod() as pod:
            self.kubectl("cp", f"{pod}:/output", folder)

    @contextlib.contextmanager
    def pod(self, *, writable=False):
        """Runs the fetching pod, which mounts the claim, read-only or ``writable``."""
        pod = fetch_pod(writable=writable)
        self.kubectl("apply", "--filename=-", input=yaml.safe_dump(pod))
        name = pod["metadata"]["name"]
        self.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=600s")
        yield name
        self.kubectl("delete", "pod", name)

    def close(self):
        """Deletes everything, and empties and releases volumes that are retained."""
        self.kubectl("delete", "jobs,pods,persistentvolumeclaims", "--all")
        for volume in self.get("persistentvolumes")["items"]:
            owner = volume["spec"].get("claimRef", {}).get("namespace")
            if owner == self.name and volume["spec"]["persistentVolumeReclaimPolicy"] == "Retain":
                self.free(volume["metadata"]["name"])
                self.empty(volume)
                self.free(volume["metadata"]["name"])
        self.kubectl("delete", "namespace", self.name, "--wait=false")

    def free(self, volume):
        patch = json.dumps({"spec": {"claimRef": None}})
        self.kubectl("patch", "persistentvolume", volume, "--patch", patch)

    def empty(self, volume):
        """Deletes the files in a volume, through the fetching pod."""
        claim = yaml.safe_load((ROOT / "k8s" / "base" / "claim.yaml").read_text())
        claim["spec"]["volumeName"] = volume["metadata"]["name"]
        claim["spec"]["storageClassName"] = volume["spec"].get("storageClassName", "")
        claim["spec"]["accessModes"] = volume["spec"]["accessModes"]
        pod = fetch_pod(writable=True)
        find = ["find", "/output", "-mindepth", "1", "-delete"]
        pod["spec"]["containers"][0]["command"] = find
        self.kubectl("apply", "--filename=-", input=yaml.safe_dump_all([claim, pod]))
        name = pod["metadata"]["name"]
        ended = "--for=jsonpath={.status.phase}=Succeeded"
        self.kubectl("wait", ended, f"pod/{name}", "--timeout=600s")
        self.kubectl("delete", "pods,persistentvolumeclaims", "--all")


def fetch_pod(*, writable=False):
    pod = yaml.safe_load((ROOT / "k8s" / "fetch.yaml").read_text())
    for mount in pod["spec"]["containers"][0]["volumeMounts"]:
        if writable:
            mount.pop("readOnly", None)
    return pod
