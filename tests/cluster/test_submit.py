"""python -m trainer.submit against a real cluster, as a user runs it."""

import contextlib
import json
import selectors
import signal
import socket
import threading
from urllib.parse import urlsplit

import pytest
import yaml
from namespaces import ROOT, SMALL

# Long enough to do something to it meanwhile.
SLOW = ("--epochs=2", "--train-limit=20000", "--test-limit=200", "--checkpoint-every=1s")
OBJECTS = "jobs,pods,services,networkpolicies,secrets,persistentvolumeclaims"


def left(namespace):
    """Waits until all deletions are finished; returns the names of what is left."""
    found = []

    def settled():
        found[:] = namespace.get(OBJECTS)["items"]
        uids = {one["metadata"]["uid"] for one in found}
        # What belongs to a Job that is gone is deleted in the background.
        orphans = [
            one
            for one in found
            for owner in one["metadata"].get("ownerReferences", [])
            if owner["uid"] not in uids
        ]
        return not orphans and not any("deletionTimestamp" in one["metadata"] for one in found)

    namespace.wait(settled)
    return [f"{one['kind']}/{one['metadata']['name']}" for one in found]


def assert_fetched(folder, model="mnist.h5", manifest="mnist.json"):
    manifest = json.loads((folder / manifest).read_text())
    model = (folder / model).read_bytes()
    assert len(model) == manifest["model"]["bytes"]
    history = json.loads((folder / "history.json").read_text())
    assert history["val_accuracy"][-1] == manifest["metrics"]["val_accuracy"]
    assert manifest["model"]["sha256"] in (folder / "report.html").read_text()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_two_workers_from_start_to_finish(namespace, submit, tmp_path):
    run = submit("--workers", 2, "--", *SMALL)
    assert run.end() == 0, run.text
    assert "MultiWorkerMirroredStrategy over 2 workers" in run.text
    assert "epoch 2/2  loss" in run.text
    assert "mnist.h5  9.6 MB  SHA-256" in run.lines[-1]
    assert_fetched(tmp_path)
    assert left(namespace) == []


def test_another_network_is_trained_by_two_workers(namespace, submit, tmp_path):
    flags = "--model=resnet", "--epochs=1", "--train-limit=256", "--test-limit=100"
    run = submit("--workers", 2, "--", *flags, "--optimizer", "adamw", "weight_decay=0.01")
    assert run.end() == 0, run.text
    assert "model.keras  " in run.lines[-1]
    assert_fetched(tmp_path, "model.keras", "model.json")
    assert left(namespace) == []


def test_it_detaches_and_attaches_again_and_survives_lost_connections(
    namespace, submit, tmp_path, proxy
):
    run = submit("--", *SLOW)
    name = run.until("Starting").split()[1]
    run.until("training and")
    run.process.send_signal(signal.SIGINT)
    assert run.end(seconds=20) == 75, run.text
    assert f"detached; {name} continues. python -m trainer.submit --attach {name}" in run.lines[-1]

    again = submit("--attach", name, kubeconfig=proxy.kubeconfig)
    again.until("training and")  # the log is shown from its beginning
    proxy.cut()
    again.until("The connection was lost, trying again")
    again.until("epoch 1/2")
    proxy.cut()
    assert again.end() == 0, again.text
    # No line of the log is lost or comes twice.
    epochs = [line.split("  ")[0] for line in again.lines if "val_loss" in line]
    assert epochs == ["epoch 1/2", "epoch 2/2"]
    steps = [line for line in again.lines if "  step " in line]
    assert len(set(steps)) == len(steps)
    assert_fetched(tmp_path)
    assert left(namespace) == []

    gone = submit("--attach", name)
    assert gone.end() == 66
    assert "no Job, JobSet or TrainJob and no PersistentVolumeClaim" in gone.lines[-1]


def test_a_lost_pod_is_reported_and_replaced(namespace, submit, tmp_path):
    run = submit("--keep", "--", *SLOW)
    name = run.until("Starting").split()[1]
    namespace.wait(lambda: run.process.poll() is not None or "training and" in run.text)
    (pod,) = namespace.pods(name)
    namespace.wait(lambda: ".index" in listing(namespace, pod))
    namespace.kubectl("delete", "pod", pod["metadata"]["name"])
    run.until(pod["metadata"]["name"], "has ended with 75: stopped by SIGTERM at epoch")
    run.until("Resuming the unfinished run")
    assert run.end() == 0, run.text
    assert_fetched(tmp_path)
    assert left(namespace) == [
        f"Job/{name}",
        *pods_of(namespace, name),
        f"PersistentVolumeClaim/{name}",
    ]
    assert "All objects are kept. kubectl delete" in run.lines[-1]


RULES = (  # what a user of this command needs
    ("", ("persistentvolumeclaims", "services", "secrets", "configmaps"), ("get", "list", "patch")),
    ("", ("pods", "events"), ("get", "list", "watch", "patch")),
    ("", ("persistentvolumeclaims", "services", "secrets", "pods"), ("create", "delete")),
    ("", ("pods/log",), ("get",)),
    ("", ("pods/portforward",), ("create", "get")),  # and no pods/exec
    ("batch", ("jobs",), ("get", "list", "watch", "patch", "create", "delete")),
    ("networking.k8s.io", ("networkpolicies",), ("get", "list", "patch", "create", "delete")),
)
POLICY = """
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: NAME}
spec:
  matchConstraints:
    resourceRules:
    - {apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [pods]}
  validations:
  - expression: object.spec.containers.all(one, one.securityContext.readOnlyRootFilesystem)
  - expression: object.spec.securityContext.runAsUser >= 1000000000
  - expression: "!has(object.spec.securityContext.fsGroup)"
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: NAME}
spec:
  policyName: NAME
  validationActions: [Deny]
  matchResources:
    namespaceSelector:
      matchLabels: {kubernetes.io/metadata.name: NAME}
"""
QUOTA = """
apiVersion: v1
kind: ResourceQuota
metadata: {name: quota}
spec:
  hard:
    pods: "3"
    persistentvolumeclaims: "1"
    requests.cpu: "2"
    limits.cpu: "4"
    limits.memory: 6Gi
    requests.ephemeral-storage: 4Gi
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: default-deny}
spec:
  podSelector: {}
  policyTypes: [Ingress, Egress]
"""


@pytest.fixture
def strict(namespace):
    """A namespace with a quota and default-deny, whose pods run as a user of the platform."""
    policy = POLICY.replace("NAME", namespace.name)
    namespace.kubectl("apply", "--filename=-", input=policy)
    namespace.kubectl("apply", "--filename=-", input=QUOTA)
    yield namespace
    namespace.kubectl("delete", "--filename=-", input=policy)  # before other pods clean up


def test_a_namespace_as_platforms_set_it_up(strict, submit, tmp_path):
    strict.kubectl("create", "serviceaccount", "runner")
    rules = [
        {"apiGroups": [group], "resources": list(kinds), "verbs": list(verbs)}
        for group, kinds, verbs in RULES
    ]
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "rules": rules}
    text = yaml.safe_dump(role | {"metadata": {"name": "runner"}})
    strict.kubectl("apply", "--filename=-", input=text)
    account = f"--serviceaccount={strict.name}:runner"
    strict.kubectl("create", "rolebinding", "runner", "--role=runner", account)
    config = yaml.safe_load(strict.kubectl("config", "view", "--raw", "--minify", "--flatten"))
    config["users"][0]["user"] = {"token": strict.kubectl("create", "token", "runner").strip()}
    # As the platform would do.
    user = {"template": {"spec": {"securityContext": {"runAsUser": 1000650000}}}}
    (tmp_path / "user.yaml").write_text(yaml.safe_dump({"kind": "Job", "spec": user}))

    flags = ("--platform-user", "--patch", "user.yaml", "--workers", 2)
    flags += ("--service-account", "runner", "--", "--epochs=1", "--train-limit=256")
    run = submit(*flags, kubeconfig=save(tmp_path / "runner", config))
    assert run.end(seconds=600) == 0, run.text
    assert "will serve the files to a port-forward" in run.text
    assert "cannot be shown" not in run.text
    assert_fetched(tmp_path)


def test_objects_of_others_are_not_deleted(namespace, submit, tmp_path):
    claim = (ROOT / "k8s" / "base" / "claim.yaml").read_text().replace("1Gi", "2Gi")
    namespace.kubectl("apply", "--filename=-", input=claim)
    run = submit("--name", "digits", "--", *SMALL, "--epochs=1")
    assert run.end() == 0, run.text
    assert_fetched(tmp_path)
    assert left(namespace) == ["PersistentVolumeClaim/digits"]

    namespace.kubectl("create", "service", "externalname", "mine", "--external-name=example.org")
    refused = submit("--name", "mine", "--workers", 2)
    assert refused.end() == 78
    assert "Expected no Service mine" in refused.lines[-1]

    # The Job was deleted: the files are fetched from the claim.
    (tmp_path / "mnist.h5").unlink()
    assert submit("--attach", "digits").end() == 0
    assert_fetched(tmp_path)
    assert left(namespace) == ["Service/mine", "PersistentVolumeClaim/digits"]


def listing(namespace, pod):
    name = pod["metadata"]["name"]
    return namespace.kubectl("exec", name, "--", "ls", "/output/checkpoints", check=False)


def pods_of(namespace, name):
    return [f"Pod/{pod['metadata']['name']}" for pod in namespace.pods(name)]


@pytest.mark.parametrize(
    ("flags", "code", "says", "stays"),
    [
        (["--data=nowhere.npz"], 66, "nowhere.npz", False),
        ([*SMALL, "--optimizer=sgd", "--learning-rate=1e30"], 70, "Expected a finite loss", True),
    ],
)
def test_a_failed_run_reports_its_error_and_keeps_its_checkpoints(
    namespace, submit, flags, code, says, stays
):
    run = submit("--name", "mine", "--", *flags)
    assert run.end() == code, run.text
    assert run.lines[-1].startswith("python -m trainer.submit: error: ")
    assert says in run.lines[-1]
    assert left(namespace) == ["PersistentVolumeClaim/mine"] * stays


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--image", "registry.invalid/digits-trainer:0"], ["is pending: ", "ImagePull"]),
        (["--gpus", 100], ["is pending: ", "Insufficient nvidia.com/gpu"]),
    ],
)
def test_the_reason_why_a_pod_is_pending_is_shown(namespace, submit, flags, reason):
    run = submit(*flags)
    run.until(*reason)
    run.process.send_signal(signal.SIGINT)
    assert run.end(seconds=20) == 75, run.text


def test_an_unbound_claim_is_reported(namespace, submit):
    claim = yaml.safe_load((ROOT / "k8s" / "base" / "claim.yaml").read_text())
    claim["metadata"]["name"] = "mine"
    claim["spec"]["storageClassName"] = "no-such-class"
    namespace.kubectl("apply", "--filename=-", input=yaml.safe_dump(claim))
    run = submit("--name", "mine")
    line = run.until("is pending: ", "PersistentVolumeClaim")
    assert "unbound" in line


def test_an_exceeded_quota_is_reported(namespace, submit):
    namespace.kubectl("create", "quota", "few", "--hard=pods=0")
    run = submit("--name", "mine")
    run.until("Job mine: FailedCreate: ", "exceeded quota: few")
    run.process.kill()

    namespace.kubectl("delete", "jobs", "--all")
    namespace.kubectl("create", "quota", "none", "--hard=count/jobs.batch=0")
    refused = submit("--name", "other")
    assert refused.end() == 78
    assert "exceeded quota: none" in refused.lines[-1]
    assert left(namespace) == ["PersistentVolumeClaim/mine"]  # and nothing of the other run


def test_an_unreachable_or_refusing_cluster_is_a_one_line_error(namespace, submit, tmp_path):
    config = yaml.safe_load(namespace.kubectl("config", "view", "--raw", "--minify", "--flatten"))

    absent = submit("--namespace", "no-such-namespace")
    assert absent.end() == 78
    assert 'namespaces "no-such-namespace" not found' in absent.lines[-1]

    # A service account without any role.
    token = namespace.kubectl("create", "token", "default").strip()
    config["users"][0]["user"] = {"token": token}
    forbidden = submit(kubeconfig=save(tmp_path / "forbidden", config))
    assert forbidden.end() == 78
    assert "403" in forbidden.lines[-1]
    assert "cannot get resource" in forbidden.lines[-1]

    with socket.create_server(("127.0.0.1", 0)) as closed:
        config["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{closed.getsockname()[1]}"
    unreachable = submit(kubeconfig=save(tmp_path / "unreachable", config))
    assert unreachable.end(seconds=60) == 78
    assert "Expected a Kubernetes API server at https://127.0.0.1" in unreachable.lines[-1]

    for one in (absent, forbidden, unreachable):
        assert len(one.lines) == 2  # the first names the run
    assert left(namespace) == []


def save(path, config):
    path.write_text(yaml.safe_dump(config))
    return path


class Proxy:
    """A TCP proxy for the API server that can cut its connections."""

    def __init__(self, upstream):
        self.upstream = upstream
        self.open = set()
        self.server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self.server.accept()
                threading.Thread(target=self._join, args=[client], daemon=True).start()

    def _join(self, client):
        with client, socket.create_connection(self.upstream) as server:
            self.open |= {client, server}
            with selectors.DefaultSelector() as ready, contextlib.suppress(OSError):
                ready.register(client, selectors.EVENT_READ, server)
                ready.register(server, selectors.EVENT_READ, client)
                while True:
                    for key, _ in ready.select():
                        data = key.fileobj.recv(65536)
                        if not data:
                            return
                        key.data.sendall(data)

    def cut(self):
        while self.open:
            with contextlib.suppress(OSError):
                self.open.pop().shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy(namespace, tmp_path):
    config = yaml.safe_load(namespace.kubectl("config", "view", "--raw", "--minify", "--flatten"))
    cluster = config["clusters"][0]["cluster"]
    server = urlsplit(cluster["server"])
    one = Proxy((server.hostname, server.port or 443))
    cluster["server"] = f"https://127.0.0.1:{one.server.getsockname()[1]}"
    cluster.setdefault("tls-server-name", server.hostname)
    one.kubeconfig = save(tmp_path / "proxied", config)
    yield one
    one.server.close()
    one.cut()
