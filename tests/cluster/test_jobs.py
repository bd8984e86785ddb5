"""Runs started with kubectl apply, on a real API server, scheduler and kubelet."""

import json

import pytest
from namespaces import EAGER, KILLED, ROOT, SMALL, Namespace, fetch_pod

JOBS = ("digits", "digits-workers")
GPU = "nvidia.com/gpu"
SOUND, DAMAGED = "/output/sound.npz", "/output/damaged.npz"
IMAGE = fetch_pod()["spec"]["containers"][0]["image"]  # the only one that is needed


def test_the_job_ends_with_a_model_that_stock_keras_loads(namespace, tmp_path):
    namespace.apply("job.yaml", *SMALL)
    assert namespace.ended("digits") == "Complete"
    ((code, message),) = namespace.messages("digits")
    assert code == 0
    namespace.fetch(tmp_path)
    manifest = json.loads((tmp_path / "mnist.json").read_text())
    assert f"test accuracy {manifest['metrics']['val_accuracy']:.2%}" in message
    assert f"SHA-256 {manifest['model']['sha256']}" in message

    from trainer.data import sources
    from trainer.runtime import keras

    digits = sources.load("bundled").first(None, 200)
    model = keras.models.load_model(tmp_path / "mnist.h5")
    right = model.predict(digits.x_test[..., None] / 255, verbose=0).argmax(axis=1) == digits.y_test
    assert right.mean() == pytest.approx(manifest["metrics"]["val_accuracy"])


def assert_failed_at_once(namespace, code, says, *, job="digits"):
    """Asserts that a Job failed by the exit code of its one pod, whose message says why."""
    assert namespace.ended(job) == "Failed"
    ((ended, message),) = namespace.messages(job)
    assert ended == code
    assert says in message
    (condition,) = (
        one for one in namespace.get("job", job)["status"]["conditions"] if one["type"] == "Failed"
    )
    assert condition["reason"] == "PodFailurePolicy"


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--epoch=3"], 2, "Perhaps you meant --epochs"),
        ([f"--data={DAMAGED}"], 65, DAMAGED),
        (["--data=/nowhere"], 66, "/nowhere"),
        ([*SMALL, "--optimizer=sgd", "--learning-rate=1e30"], 70, "Expected a finite loss"),
        (["--gpus=1"], 78, "Expected 1 GPUs"),
    ],
)
def test_a_user_error_fails_the_job_at_once_with_a_message(volume, flags, code, says):
    volume.kubectl("delete", "jobs", "--all")
    volume.apply("job.yaml", *flags)
    assert_failed_at_once(volume, code, says)


def test_a_pod_is_examined_before_it_trains(namespace):
    namespace.apply("doctor", *SMALL)
    assert namespace.ended("digits") == "Complete"
    lines = namespace.kubectl("logs", "job/digits", "--container=doctor").splitlines()
    checks = [json.loads(line) for line in lines]
    assert {"output folder", "training step", "disk"} <= {check["check"] for check in checks}
    assert not [check for check in checks if check["status"] == "error"]


def test_what_would_stop_a_run_fails_the_job_before_it_trains(namespace):
    namespace.apply("doctor", "--gpus=1")
    assert namespace.ended("digits") == "Failed"
    (pod,) = namespace.pods("digits")
    (doctor,) = pod["status"]["initContainerStatuses"]
    assert doctor["state"]["terminated"]["exitCode"] == 78
    assert "errors of devices" in doctor["state"]["terminated"]["message"]
    (trainer,) = pod["status"]["containerStatuses"]
    assert not trainer["started"]
    conditions = namespace.get("job", "digits")["status"]["conditions"]
    (failed,) = (one for one in conditions if one["type"] == "Failed")
    assert failed["reason"] == "PodFailurePolicy"


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    """A namespace whose claim has a data set, intact and with a changed byte."""
    path = tmp_path_factory.mktemp("data") / "mnist.npz"
    content = bytearray((ROOT / "trainer" / "data" / "assets" / "mnist.npz").read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with Namespace.make() as namespace:
        namespace.kubectl("apply", "--filename", ROOT / "k8s" / "base" / "claim.yaml")
        with namespace.pod(writable=True) as pod:
            namespace.kubectl("cp", path, f"{pod}:{DAMAGED}")
            namespace.kubectl(
                "cp", ROOT / "trainer" / "data" / "assets" / "mnist.npz", f"{pod}:{SOUND}"
            )
        yield namespace


def test_a_user_error_on_one_worker_fails_both_jobs(volume):
    # Only the chief mounts the claim: the other worker has no data.
    volume.kubectl("delete", "jobs", "--all")
    volume.apply("multiworker", f"--data={SOUND}")
    for job in JOBS:
        assert_failed_at_once(volume, 66, SOUND, job=job)
    ((_, message),) = volume.messages("digits")
    assert "worker 1 (digits-workers-0.digits:2222): " in message


def test_a_pod_is_pending_without_gpus_and_fails_if_it_sees_none(namespace, pretended_gpus):
    namespace.apply("gpu", *SMALL, gpus=pretended_gpus + 1, image=IMAGE)
    reason = f"Insufficient {GPU}"
    namespace.wait(lambda: reason in namespace.kubectl("describe", "pods"))
    namespace.kubectl("delete", "job", "digits")
    namespace.apply("gpu", *SMALL, gpus=pretended_gpus, image=IMAGE)
    assert_failed_at_once(namespace, 78, f"Expected {pretended_gpus} GPUs")


@pytest.fixture
def pretended_gpus(namespace):
    """Advertises GPUs on a node that has none; yields their number."""
    nodes = namespace.get("nodes")["items"]
    if any(GPU in node["status"]["capacity"] for node in nodes):
        pytest.skip("this cluster has GPUs")
    count = 4
    node = nodes[0]["metadata"]["name"]
    path = f"/status/capacity/{GPU.replace('/', '~1')}"
    patch = ("patch", "node", node, "--subresource=status", "--type=json", "--patch")
    add = {"op": "add", "path": path, "value": str(count)}
    namespace.kubectl(*patch, json.dumps([add]))
    namespace.wait(lambda: GPU in namespace.get("node", node)["status"]["allocatable"])
    yield count
    paths = [path, path.replace("capacity", "allocatable")]
    namespace.kubectl(*patch, json.dumps([{"op": "remove", "path": one} for one in paths]))


def digests(namespace, *, resumed):
    """Waits until both Jobs are complete; returns the digest of the weights that each logged."""
    found = []
    for job in JOBS:
        assert namespace.ended(job) == "Complete"
        events = namespace.events(job)
        (event,) = (one for one in events if one["event"] == "weights")
        assert event["same"]
        found.append(event["weights_sha256"])
        if job == "digits":
            notices = [one["message"] for one in events if one["event"] == "notice"]
            assert (
                any(text.startswith("Resuming the unfinished run") for text in notices) == resumed
            )
    return found


def test_two_workers_end_with_the_weights_of_two_on_one_machine(namespace, local):
    namespace.apply("multiworker", *SMALL)
    assert digests(namespace, resumed=False) == [local, local]
    (_, message), (_, other) = (namespace.messages(job)[0] for job in JOBS)
    assert "test accuracy" in message
    assert f"SHA-256 {local}" in other


def delete(namespace, job, how):
    (pod,) = namespace.pods(job)
    namespace.kubectl("delete", "pod", pod["metadata"]["name"], *how)


def drain(namespace):
    (pod,) = namespace.pods("digits")
    node = pod["spec"]["nodeName"]
    run = "--pod-selector=job-name in (digits,digits-workers)"  # only pods of the run
    try:
        namespace.kubectl("drain", node, run, "--force", "--delete-emptydir-data")
    finally:
        namespace.kubectl("uncordon", node)


def suspend(namespace, *jobs):
    namespace.suspend(*jobs)
    namespace.suspend(*jobs, to=False)


@pytest.mark.parametrize(
    "disturb",
    [
        pytest.param(lambda run: delete(run, "digits-workers", KILLED), id="a worker is killed"),
        pytest.param(lambda run: delete(run, "digits", KILLED), id="the chief is killed"),
        pytest.param(lambda run: delete(run, "digits-workers", ()), id="a worker is preempted"),
        pytest.param(drain, id="the node is drained"),
        pytest.param(lambda run: suspend(run, *JOBS), id="the run is suspended"),
        pytest.param(lambda run: suspend(run, JOBS[1]), id="the others alone are suspended"),
    ],
)
def test_a_disturbed_run_ends_with_the_same_weights(namespace, local, disturb):
    namespace.apply("multiworker", *EAGER)
    namespace.wait(lambda: namespace.steps() >= 2)
    disturb(namespace)
    assert digests(namespace, resumed=True) == [local, local]
