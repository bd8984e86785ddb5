"""What kubectl apply ends with, on a real API server, scheduler and kubelet."""

import json
import subprocess
import sys

import pytest

SMALL = ("--epochs=2", "--train-limit=1024", "--test-limit=200")
EAGER = (*SMALL, "--steps-per-execution=1", "--checkpoint-every=1")


def test_the_job_ends_with_a_model_that_stock_keras_loads(namespace, tmp_path):
    namespace.apply("job.yaml", *SMALL)
    assert namespace.ended("digits") == "Complete"
    ((code, message),) = namespace.messages("digits")
    assert code == 0
    namespace.fetch(tmp_path)
    manifest = json.loads((tmp_path / "mnist.json").read_text())
    assert f"test accuracy {manifest['metrics']['val_accuracy']:.2%}" in message
    assert f"SHA-256 {manifest['model']['sha256']}" in message

    from trainer import data
    from trainer.runtime import keras

    digits = data.load("bundled").first(None, 200)
    model = keras.models.load_model(tmp_path / "mnist.h5")
    right = model.predict(digits.x_test[..., None] / 255, verbose=0).argmax(axis=1) == digits.y_test
    assert right.mean() == pytest.approx(manifest["metrics"]["val_accuracy"])


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--epoch=3"], 2, "Perhaps you meant --epochs"),
        (["--data=/nowhere"], 66, "/nowhere"),
        ([*SMALL, "--optimizer=sgd", "--learning-rate=1e30"], 70, "Expected a finite loss"),
        (["--gpus=1"], 78, "Expected 1 GPUs"),
    ],
)
def test_an_error_of_the_users_fails_the_job_at_once_and_says_why(namespace, flags, code, says):
    namespace.apply("job.yaml", *flags)
    assert namespace.ended("digits") == "Failed"
    ((ended, message),) = namespace.messages("digits")
    assert ended == code
    assert says in message
    (condition,) = (
        one
        for one in namespace.get("job", "digits")["status"]["conditions"]
        if one["type"] == "Failed"
    )
    assert condition["reason"] == "PodFailurePolicy"


def steps(namespace):
    """Returns how many steps of the whole run are saved, by what the chief's pod holds."""
    running = [
        pod["metadata"]["name"]
        for pod in namespace.pods("digits")
        if pod["status"]["phase"] == "Running"
    ]
    if not running:
        return 0
    listed = namespace.kubectl(
        "exec", running[0], "--", "ls", "/output/checkpoints", check=False
    ).split()
    return max(
        (int(name.split("-")[1].split(".")[0]) for name in listed if "index" in name), default=0
    )


def digests(namespace):
    """Waits for the end of both Jobs; returns the weights' digest that each of them logged."""
    found = []
    for job in ("digits", "digits-workers"):
        assert namespace.ended(job) == "Complete"
        (event,) = (one for one in namespace.events(job) if one["event"] == "weights")
        assert event["same"]
        found.append(event["weights_sha256"])
    return found


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The weights' digest of the same run with two workers on this machine."""
    folder = tmp_path_factory.mktemp("local")
    done = subprocess.run(
        [sys.executable, "-m", "trainer.launch", "--", *SMALL, "--threads=2"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "mnist.json").read_text())["model"]["weights_sha256"]


def test_two_workers_end_with_the_weights_of_two_on_one_machine(namespace, local):
    namespace.apply("multiworker", *SMALL)
    assert digests(namespace) == [local, local]


def test_a_worker_that_is_deleted_costs_nothing(namespace, local):
    namespace.apply("multiworker", *EAGER)
    namespace.wait(lambda: steps(namespace) >= 2)
    (pod,) = namespace.pods("digits-workers")
    namespace.kubectl("delete", "pod", pod["metadata"]["name"], "--grace-period=0", "--force")
    assert digests(namespace) == [local, local]


def test_a_run_that_is_suspended_goes_on(namespace, local):
    namespace.apply("multiworker", *EAGER)
    namespace.wait(lambda: steps(namespace) >= 2)
    for suspend in ("true", "false"):
        for job in ("digits", "digits-workers"):
            namespace.kubectl("patch", "job", job, f"--patch={{spec: {{suspend: {suspend}}}}}")
        if suspend == "true":
            namespace.wait(lambda: not namespace.pods("digits") + namespace.pods("digits-workers"))
    assert digests(namespace) == [local, local]
