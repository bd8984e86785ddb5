"""What the manifests say must be what the program means; ``tests/cluster`` runs them."""

import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT

import trainer
from trainer.errors import StoppedError, TrainerError

K8S = ROOT / "k8s"


def render(folder):
    """Returns a kustomization's objects, by kind and name."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not on the PATH")
    text = subprocess.run(
        ["kubectl", "kustomize", K8S / folder], capture_output=True, text=True, check=True
    ).stdout
    return {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text)}


def trainer_of(job):
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


@pytest.fixture
def job():
    _, job = yaml.safe_load_all((K8S / "job.yaml").read_text())
    return job


def test_the_job_ends_at_once_for_users_errors_and_goes_on_when_it_was_stopped(job):
    disruption, stopped, wrong = job["spec"]["podFailurePolicy"]["rules"]
    assert disruption["onPodConditions"] == [{"type": "DisruptionTarget"}]
    assert (stopped["action"], stopped["onExitCodes"]["values"]) == (
        "Ignore",
        [StoppedError.exit_code],
    )
    codes = {error.exit_code for error in TrainerError.__subclasses__()}
    assert wrong["action"] == "FailJob"
    assert set(wrong["onExitCodes"]["values"]) == codes - {StoppedError.exit_code}


def test_the_image_is_of_this_version(job):
    assert trainer_of(job)["image"] == f"digits-trainer:{trainer.__version__}"


def test_the_job_alone_is_the_base():
    objects = list(yaml.safe_load_all((K8S / "job.yaml").read_text()))
    assert objects == list(render("base").values())


def test_the_number_of_workers_stands_in_one_place():
    objects = render("multiworker")
    chief, workers = (objects["Job", name] for name in ("digits", "digits-workers"))
    others = workers["spec"]["completions"]
    assert workers["spec"]["parallelism"] == others
    for one in (chief, workers):
        environ = {entry["name"]: entry["value"] for entry in trainer_of(one)["env"]}
        assert environ["TRAINER_WORKERS"] == f"1+{others}"
    assert chief["spec"]["completions"] == 1
    # The chief alone has the claim.
    for one, mounted in ((chief, True), (workers, False)):
        mounts = {mount["mountPath"] for mount in trainer_of(one)["volumeMounts"]}
        assert ("/output" in mounts) == mounted


def test_a_job_for_gpus_demands_as_many_as_it_is_given():
    container = trainer_of(render("gpu")["Job", "digits"])
    count = container["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--gpus={count}" in container["args"]
