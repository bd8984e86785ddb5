"""A run from its objects to its files, in a cluster that is simulated; ``tests/cluster`` has a real
one.
"""

import hashlib
import json
import threading

import pytest

from trainer.errors import ConfigurationError, DataError, InputError, StoppedError
from trainer.files import HISTORY_FILE, MANIFEST_FILE, MODEL_FILE
from trainer.k8s import manifests
from trainer.k8s.api import Change
from trainer.k8s.objects import build
from trainer.k8s.run import ClusterRun
from trainer.k8s.settings import PodSettings
from trainer.log_lines import json_line

MODEL = b"a model"
FILES = {
    MODEL_FILE: MODEL,
    HISTORY_FILE: b"{}",
    MANIFEST_FILE: json.dumps(
        {"model": {"bytes": len(MODEL), "sha256": hashlib.sha256(MODEL).hexdigest()}}
    ).encode(),
}
COMPLETE = [{"type": "Complete", "status": "True"}]
FAILED = [{"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": "policy"}]
WORKERS = ("Job", "mine-workers")
CLAIM = ("PersistentVolumeClaim", "mine")
SECRET = ("Secret", "mine-token")
SHARED = "0f" * 32


class Server:
    """A namespace in which a Job ends as soon as it is created.

    Args:
        conditions: Those of the Job; none: it does not end.
        code: Exit code of its pod.
        log: Lines that the pod has written.
        refused: Kind of the objects that cannot be created.
    """

    namespace = "research"
    flags = "--namespace research --context north"

    def __init__(self, conditions=COMPLETE, *, code=0, log=(), refused=None):
        self.conditions = conditions
        self.code = code
        self.log = log
        self.refused = refused
        self.objects = {}
        self.created, self.deleted = [], []
        self.closed = threading.Event()

    def apply(self, manifest):
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if kind == self.refused:
            raise ConfigurationError("exceeded quota")
        if (kind, name) in self.objects:
            self.objects[kind, name]["metadata"] |= manifest["metadata"]
            return
        self.created.append((kind, name))
        self.add(kind, name, manifest)
        if kind == "Job":
            self.add("Pod", f"{name}-0", manifest["spec"]["template"], job=name)

    def add(self, kind, name, manifest, job=None):
        terminated = {"exitCode": self.code, "message": "python -m trainer.task: error: why"}
        status = {"phase": "Running", "conditions": []}
        if kind == "Job":
            status = {"conditions": self.conditions}
        elif job and self.conditions:
            status["containerStatuses"] = [{"state": {"terminated": terminated}}]
        labels = {**manifest["metadata"].get("labels", {}), "job-name": job}
        metadata = {"name": name, "uid": name, "labels": labels, "creationTimestamp": "2026"}
        self.objects[kind, name] = {**manifest, "metadata": metadata, "status": status}

    def get(self, kind, name):
        return self.objects.get((kind, name))

    def list(self, kind, selector):
        assert selector == manifests.selector("mine")
        return [one for (of, _), one in self.objects.items() if of == kind]

    def delete(self, kind, name):
        if gone := self.objects.pop((kind, name), None):
            self.deleted.append((kind, name))
            for key, one in list(self.objects.items()):  # as the garbage collector does
                owners = one["metadata"].get("ownerReferences", [])
                if gone["metadata"]["uid"] in [owner["uid"] for owner in owners]:
                    self.delete(*key)

    def changes(self, kind, **selectors):
        listed = []
        if kind != "Event":
            (selector,) = selectors.values()
            assert selector in (
                *(manifests.selector("mine"), "metadata.name=mine"),
                "jobset.sigs.k8s.io/jobset-name=mine",
            )
            listed = self.list(kind, manifests.selector("mine"))
        yield Change("LISTED", listed)
        self.closed.wait()

    def log_lines(self, pod):
        return iter(self.log)

    def read_file(self, pod, path):
        try:
            return FILES[path.removeprefix("/output/")]
        except KeyError:
            raise ConfigurationError(f"{path}: No such file or directory") from None

    def close(self, threads):
        self.closed.set()
        for thread in threads:
            thread.join()


class Screen:
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    def set_status(self, text):
        pass


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.k8s.follow.DRAIN_SECONDS", 120)  # The log ends by itself.

    def make(server, *, stop=None, **options):
        return ClusterRun(
            server,
            "mine",
            output_dir=tmp_path,
            screen=Screen(),
            stop=lambda: stop,
            attach_command="submit --attach mine",
            **options,
        )

    return make


def objects(workers=1):
    return build("mine", PodSettings(workers=workers), token=SHARED)


def run_objects(keys):
    return [key for key in keys if key[0] != "Pod"]


def test_a_complete_run_leaves_its_files_here_and_nothing_in_the_cluster(run, tmp_path):
    server = Server()
    run(server).start(objects(workers=2))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == FILES
    created = run_objects(server.created)
    assert sorted(created) == sorted(
        [
            *(CLAIM, WORKERS, SECRET),
            *((kind, "mine") for kind in ("Job", "NetworkPolicy", "Service")),
        ]
    )
    assert {kind for kind, _ in created[-2:]} == {"Job"}
    deleted = run_objects(server.deleted)
    assert sorted(deleted) == sorted(created)
    assert deleted[-1] == CLAIM


def test_the_secret_of_a_run_is_its_jobs(run):
    server = Server(conditions=[])
    with pytest.raises(StoppedError):
        run(server, stop="SIGINT").start(objects(workers=2))
    assert server.objects[SECRET]["metadata"]["ownerReferences"] == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": "mine", "uid": "mine"}
    ]


def test_keep_deletes_nothing(run):
    server = Server()
    kept = run(server, keep=True)
    kept.start(objects())
    assert run_objects(server.deleted) == []
    assert kept.screen.lines[-1] == f"All objects are kept. {kept.delete_command} deletes them."


def test_an_object_that_is_refused_takes_the_others_with_it(run):
    server = Server(refused="Job")
    with pytest.raises(ConfigurationError, match="exceeded quota"):
        run(server).start(objects())
    assert server.created == server.deleted == [CLAIM]


def test_an_existing_claim_is_used_and_stays(run):
    server = Server()
    server.add(*CLAIM, objects()[0])
    again = run(server)
    again.start(objects())
    assert server.created[0] == ("Job", "mine")
    assert run_objects(server.deleted) == [("Job", "mine")]
    assert again.screen.lines[-1].startswith("Kept: PersistentVolumeClaim mine (not app.kube")


def test_another_existing_object_is_refused_and_untouched(run):
    server = Server()
    server.add("Job", "mine", objects()[-1])
    with pytest.raises(ConfigurationError, match="Expected no Job mine in the namespace research"):
        run(server).start(objects())
    assert server.created == server.deleted == []


@pytest.mark.parametrize("started", [False, True])
def test_a_failed_run_keeps_its_checkpoints_if_training_had_started(run, started, tmp_path):
    log = [json_line("start", "60,000 images")] if started else []
    server = Server(FAILED, code=65, log=log)
    with pytest.raises(DataError, match=r"^why$"):
        run(server).start(objects())
    assert (CLAIM in server.deleted) != started
    assert ("Job", "mine") in server.deleted
    assert list(tmp_path.iterdir()) == []


def test_a_signal_detaches_and_says_how_to_attach_and_delete(run):
    server = Server(conditions=[])
    detached = run(server, stop="SIGINT")
    with pytest.raises(StoppedError) as caught:
        detached.start(objects())
    assert str(caught.value) == (
        "detached; mine continues. submit --attach mine attaches to it again; "
        "kubectl delete jobs,services,networkpolicies,pvc --namespace research --context north "
        f"-l {manifests.selector('mine')} deletes it."
    )
    assert server.deleted == []


def test_attach_follows_a_job_and_deletes_what_an_earlier_call_created(run, tmp_path):
    server = Server()
    with pytest.raises(StoppedError):
        run(server, stop="SIGINT").start(objects())
    run(server).attach()
    assert (tmp_path / MODEL_FILE).read_bytes() == MODEL
    assert CLAIM in server.deleted


def test_attach_fetches_the_files_of_a_job_that_was_deleted(run, tmp_path):
    server = Server()
    server.add(*CLAIM, objects()[0])
    run(server).attach()
    assert (tmp_path / MODEL_FILE).read_bytes() == MODEL


def test_attach_to_no_run_is_an_input_error(run):
    with pytest.raises(
        InputError, match="no Job, JobSet or TrainJob and no PersistentVolumeClaim of this name"
    ):
        run(Server()).attach()


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_a_trainjob_is_one_of_the_version_that_is_there(run, tmp_path, version):
    class Trainer(Server):
        def serves(self, kind):
            return True

        def apply(self, manifest):
            old = "podTemplateOverrides" in manifest.get("spec", {})
            if manifest["kind"] == "TrainJob" and old and version == "2.2":
                raise ConfigurationError(".spec.podTemplateOverrides: field not declared in schema")
            super().apply(manifest)

        def add(self, kind, name, manifest, job=None):
            super().add(kind, name, manifest, job)
            if kind == "TrainJob":
                self.objects[kind, name]["status"] = {"conditions": self.conditions}

    server = Trainer()
    started = build("mine", PodSettings(toleration=("a",)), kind="trainjob")
    run(server, keep=True).start(started, "trainjob")
    assert (tmp_path / MODEL_FILE).read_bytes() == MODEL
    spec = server.objects["TrainJob", "mine"]["spec"]
    assert ("runtimePatches" in spec) == (version == "2.2")
    assert ("podTemplateOverrides" in spec) == (version == "2.1")
    # What the fetching pod needs of it.
    pod = manifests.pod_spec(server.objects["TrainJob", "mine"])
    assert pod["tolerations"] == [{"key": "a", "operator": "Exists"}]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "mine"}
    if version == "2.2":
        (patch,) = spec["runtimePatches"]
        (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        assert job["name"] == "node"
        labels = job["template"]["spec"]["template"]["metadata"]["labels"]
        assert labels == {"app.kubernetes.io/instance": "mine"}


def test_an_operator_that_is_missing_is_named_before_anything_is_created(run):
    class Plain(Server):
        def serves(self, kind):
            return False

    server = Plain()
    started = build("mine", kind="jobset")
    with pytest.raises(ConfigurationError, match="Expected the operator of JobSets"):
        run(server).start(started, "jobset")
    assert server.created == []
