"""Runs under operators: JobSet, Kubeflow Trainer and Kueue, where their controllers are there.

Where the API server has no more than their definitions, it validates the manifests, and nothing
runs.
"""

import json
import signal
import subprocess
import venv

import pytest
import yaml
from namespaces import EAGER, KILLED, ROOT, SMALL

DEFINITIONS = {  # and a field of each
    "jobset": ("jobsets.jobset.x-k8s.io", "replicatedJobs"),
    "kubeflow": ("trainjobs.trainer.kubeflow.org", "podTemplateOverrides"),
    "kubeflow-2.2": ("trainjobs.trainer.kubeflow.org", "runtimePatches"),
    "kubeflow/runtime": ("clustertrainingruntimes.trainer.kubeflow.org", "replicatedJobs"),
}
RUNTIME = "tensorflow-distributed"
CHIEFS = {"jobset": "digits-chief-0", "trainjob": "digits-node-0"}
ROOTS = {"jobset": "jobset.jobset.x-k8s.io", "trainjob": "trainjob.trainer.kubeflow.org"}
# Two workers, a third node and Kueue's other workloads fit into two cores.
LIGHT = ("--cpu", "500m", "--memory", "1Gi")


@pytest.mark.parametrize("overlay", DEFINITIONS)
def test_the_api_server_accepts_it(namespace, overlay):
    definition, field = DEFINITIONS[overlay]
    if definition not in namespace.kubectl("get", "customresourcedefinitions", "--output=name"):
        pytest.skip(f"the cluster does not know {definition}")
    if overlay.startswith("kubeflow") and not overlay.endswith("runtime"):
        known = namespace.kubectl("explain", f"trainjob.spec.{field}", check=False)
        if field not in known:
            pytest.skip(f"the cluster's TrainJobs are of another version, without {field}")
    if overlay == "kubeflow" and serves(namespace, "trainer"):
        namespace.kubectl("apply", "--kustomize", ROOT / "k8s" / "kubeflow" / "runtime")
    check = ("apply", "--dry-run=server", "--validate=strict", "--filename=-")
    text = namespace.kubectl("kustomize", ROOT / "k8s" / overlay)
    objects = len(list(yaml.safe_load_all(text)))
    accepted = "(server dry run)"
    assert namespace.kubectl(*check, input=text).count(accepted) == objects
    # It would have said so.
    wrong = text.replace(f"{field}:", "unknown:")
    assert wrong != text
    assert namespace.kubectl(*check, input=wrong, check=False).count(accepted) < objects


def serves(namespace, operator):
    """Tells whether an operator's controller is there, by its webhooks."""
    kinds = "validatingwebhookconfigurations,mutatingwebhookconfigurations"
    return operator in namespace.kubectl("get", kinds, "--output=name")


def need(namespace, *operators):
    for operator in operators:
        if not serves(namespace, operator):
            pytest.skip(f"the cluster has no controller of {operator}")


@pytest.fixture
def jobset(namespace):
    need(namespace, "jobset")


@pytest.fixture
def runtime(namespace):
    """Installs the ClusterTrainingRuntime; it stays, as another test's TrainJob may use it."""
    need(namespace, "jobset", "trainer")
    namespace.kubectl("apply", "--kustomize", ROOT / "k8s" / "kubeflow" / "runtime")


@pytest.fixture(params=["jobset", "trainjob"])
def kind(request, namespace):
    need(namespace, "jobset")
    if request.param == "trainjob":
        request.getfixturevalue("runtime")
    return request.param


@pytest.fixture
def queue(namespace):
    """A ClusterQueue of two CPUs and its LocalQueue, in which a workload of a higher priority takes
    the place of one of a lower.
    """
    need(namespace, "kueue")
    name = namespace.name
    quota = {"cpu": "2", "memory": "8Gi"}
    resources = [{"name": one, "nominalQuota": value} for one, value in quota.items()]
    flavors = [{"name": name, "resources": resources}]
    version = "kueue.x-k8s.io/v1beta2"
    objects = [
        {"kind": "ResourceFlavor", "metadata": {"name": name}},
        {
            "kind": "ClusterQueue",
            "metadata": {"name": name},
            "spec": {
                "namespaceSelector": {},
                "preemption": {"withinClusterQueue": "LowerPriority"},
                "resourceGroups": [{"coveredResources": list(quota), "flavors": flavors}],
            },
        },
        {
            "kind": "LocalQueue",
            "metadata": {"name": "research", "namespace": name},
            "spec": {"clusterQueue": name},
        },
        {
            "kind": "WorkloadPriorityClass",
            "metadata": {"name": name},
            "value": 1000,
            "description": "goes first",
        },
    ]
    text = yaml.safe_dump_all([{"apiVersion": version, **one} for one in objects])
    namespace.kubectl("apply", "--filename=-", input=text)
    yield "research"
    namespace.kubectl("delete", "jobsets,trainjobs,jobs", "--all", check=False)
    namespace.kubectl("delete", "--filename=-", "--wait=false", input=text)


def weights(folder):
    return json.loads((folder / "mnist.json").read_text())["model"]["weights_sha256"]


def chief_of(namespace, kind):
    (pod,) = (
        pod
        for pod in namespace.pods(CHIEFS[kind])
        if pod["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"] == "0"
    )
    return pod["metadata"]["name"]


def suspend(namespace, kind, to):
    patch = json.dumps({"spec": {"suspend": to}})
    namespace.kubectl("patch", ROOTS[kind], "digits", "--type=merge", "--patch", patch)


def test_a_lost_pod_restarts_the_run_which_ends_with_the_same_weights(
    namespace, submit, tmp_path, local, kind
):
    # Threads decide bits: two, as without --cpu.
    flags = ("--as", kind, "--name", "digits", "--workers", 2, *LIGHT)
    run = submit(*flags, "--", *EAGER, "--threads=2")
    namespace.wait(lambda: namespace.steps(CHIEFS[kind]) >= 2 or run.process.poll() is not None)
    namespace.kubectl("delete", "pod", chief_of(namespace, kind), *KILLED)
    run.until("Resuming the unfinished run", seconds=240)
    if kind == "jobset":
        run.until("digits is restarted (1)")
    suspend(namespace, kind, to=True)
    run.until("digits is suspended")
    namespace.wait(lambda: not namespace.pods(CHIEFS[kind]))
    suspend(namespace, kind, to=False)
    run.until("digits is resumed")
    assert run.end(seconds=600) == 0, run.text
    assert weights(tmp_path) == local
    found = namespace.get("jobs,jobsets,networkpolicies,persistentvolumeclaims")["items"]
    assert [one["kind"] for one in found if "deletionTimestamp" not in one["metadata"]] == []


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [(["--epoch=3"], 2, "Perhaps you meant --epochs"), (["--data=/nowhere"], 66, "/nowhere")],
)
def test_a_users_error_fails_the_run_at_once(namespace, tmp_path, kind, flags, code, says):
    """With kubectl, as trainer.submit would refuse the first."""
    if kind == "jobset":
        text = namespace.kubectl("kustomize", ROOT / "k8s" / "jobset")
        text = text.replace(
            "- --log-format=json", f"- --log-format=json\n              - {flags[0]}"
        )
    else:
        text = namespace.kubectl("kustomize", ROOT / "k8s" / "kubeflow")
        text = text.replace("numNodes: 2", f"numNodes: 2\n    args: {json.dumps(flags)}")
    namespace.kubectl("apply", "--filename=-", input=text)

    def failed():
        conditions = namespace.get(ROOTS[kind], "digits").get("status", {}).get("conditions", [])
        return any(one["type"] == "Failed" and one["status"] == "True" for one in conditions)

    namespace.wait(failed)
    pods = namespace.get("pods", "--selector=app.kubernetes.io/instance=digits")["items"]
    ended = [
        status["state"]["terminated"]
        for pod in pods
        for status in pod["status"].get("containerStatuses", [])
        if "terminated" in status["state"]
    ]
    assert any(one["exitCode"] == code and says in one.get("message", "") for one in ended)
    namespace.kubectl("delete", ROOTS[kind], "digits")


def test_kueue_preempts_a_run_and_gives_it_back(namespace, submit, tmp_path, local, jobset, queue):
    flags = ("--as", "jobset", "--name", "digits", "--workers", 2, "--queue", queue)
    run = submit(*flags, "--", *EAGER)
    run.until("digits is admitted by its queue")
    namespace.wait(lambda: namespace.steps(CHIEFS["jobset"]) >= 2)
    other = fetch_job(namespace, queue)
    namespace.kubectl("apply", "--filename=-", input=yaml.safe_dump(other))
    run.until("digits is evicted from its queue", "Preempted")
    assert namespace.ended("urgent") == "Complete"
    namespace.kubectl("delete", "job", "urgent")
    run.until("Resuming the unfinished run", seconds=240)
    assert run.end(seconds=600) == 0, run.text
    assert weights(tmp_path) == local


def fetch_job(namespace, queue):
    """A Job that runs no time at all, for which the queue has no room besides two workers."""
    pod = yaml.safe_load((ROOT / "k8s" / "fetch.yaml").read_text())["spec"]
    (container,) = pod["containers"]
    container["command"] = ["true"]
    container["volumeMounts"], pod["volumes"] = [], []
    del pod["activeDeadlineSeconds"]
    for quantities in container["resources"].values():
        quantities.clear()
        quantities.update(cpu="1", memory="128Mi")
    labels = {
        "kueue.x-k8s.io/queue-name": queue,
        "kueue.x-k8s.io/priority-class": namespace.name,
    }
    metadata = {"name": "urgent", "namespace": namespace.name, "labels": labels}
    spec = {"suspend": True, "template": {"spec": pod}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def test_kueue_admits_a_trainjob_as_one(namespace, submit, tmp_path, local, runtime, queue):
    known = namespace.kubectl("explain", "trainjob.spec.runtimePatches", check=False)
    if "runtimePatches" not in known:
        # Kueue 0.17 suspends it for ever: "kueue runtime patch not found".
        pytest.skip("Kueue admits TrainJobs from Kubeflow Trainer 2.2 on")
    flags = ("--as", "trainjob", "--name", "digits", "--workers", 2, "--queue", queue)
    run = submit(*flags, "--", *SMALL)
    run.until("digits is admitted by its queue")
    assert run.end(seconds=600) == 0, run.text
    assert weights(tmp_path) == local


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--queue", "none"], "none"),
        (["--queue", "research", "--cpu", "3"], "cpu"),
    ],
)
def test_what_a_queue_cannot_admit_is_said(namespace, submit, queue, jobset, flags, says):
    run = submit("--as", "jobset", *flags, "--", *SMALL)
    assert says in run.until("waits in its queue: ")
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 75, run.text


def test_a_runtime_that_is_not_there_is_named(namespace, submit, tmp_path, runtime):
    patch = {"kind": "TrainJob", "spec": {"runtimeRef": {"name": "another"}}}
    (tmp_path / "patch.yaml").write_text(yaml.safe_dump(patch))
    run = submit("--as", "trainjob", "--patch", "patch.yaml", "--", *SMALL)
    assert run.end() == 78, run.text
    assert "kubectl apply -k k8s/kubeflow/runtime installs the runtime" in run.lines[-1]


# A program that is not this package's, as TensorFlow's guide to custom training loops has it.
STOCK = """
import sys
import numpy as np, tensorflow as tf

strategy = tf.distribute.MultiWorkerMirroredStrategy()
with strategy.scope():
    weights = tf.Variable(tf.zeros((4, 1)))

@tf.function
def step(x, y):
    def replica(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((x @ weights - y) ** 2)
        gradient = tf.distribute.get_replica_context().all_reduce(
            "mean", tape.gradient(loss, weights)
        )
        weights.assign_sub(0.1 * gradient)
        return loss
    return strategy.reduce("mean", strategy.run(replica, args=(x, y)), axis=None)

assert len(sys.argv) == 1  # nothing of the runtime's
index = strategy.cluster_resolver.task_id
noise = np.random.default_rng(index)
x = noise.normal(size=(64, 4)).astype("float32")
y = x @ np.float32([[1], [2], [3], [4]])
for _ in range(200):
    loss = step(tf.constant(x), tf.constant(y))
found = [round(float(one), 3) for one in weights.numpy().ravel()]
print("ended", index, strategy.num_replicas_in_sync, found, flush=True)
"""


def test_a_stock_program_trains_on_two_nodes(namespace, runtime):
    files = {"stock.py": STOCK}
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "stock"}}
    mount = {"name": "program", "mountPath": "/program"}
    volume = {"name": "program", "configMap": {"name": "stock"}}
    pod = {"containers": [{"name": "node", "volumeMounts": [mount]}], "volumes": [volume]}
    light = {"cpu": "500m", "memory": "1Gi"}
    trainjob = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": "stock"},
        "spec": {
            "runtimeRef": {"name": RUNTIME},
            "trainer": {
                "numNodes": 2,
                "command": ["python", "/program/stock.py"],
                "resourcesPerNode": {"requests": light, "limits": light},
            },
            "podTemplateOverrides": [{"targetJobs": [{"name": "node"}], "spec": pod}],
        },
    }
    text = yaml.safe_dump_all([config_map | {"data": files}, trainjob])
    namespace.kubectl("apply", "--filename=-", input=text)
    assert namespace.ended("stock-node-0") == "Complete"
    lines = [
        line
        for pod in namespace.pods("stock-node-0")
        for line in namespace.kubectl("logs", pod["metadata"]["name"]).splitlines()
        if line.startswith("ended")
    ]
    assert sorted(lines) == [f"ended {index} 2 [1.0, 2.0, 3.0, 4.0]" for index in (0, 1)]


# Of the client, whose versions for this one of Kubeflow Trainer take older clients of Kubernetes.
SDK = ("kubeflow==0.2.1", "kubeflow-trainer-api==2.1.0")
SUBMIT = """
import sys
from kubeflow.trainer import CustomTrainer, KubernetesBackendConfig, TrainerClient

def train():
    import json, os
    cluster = json.loads(os.environ["TF_CONFIG"])
    print("ended", cluster["task"]["index"], len(cluster["cluster"]["worker"]), flush=True)

client = TrainerClient(backend_config=KubernetesBackendConfig(namespace=sys.argv[1]))
runtime = client.get_runtime("tensorflow-distributed")
light = {"cpu": "500m", "memory": "512Mi"}
trainer = CustomTrainer(func=train, num_nodes=2, resources_per_node=light)
name = client.train(runtime=runtime, trainer=trainer)
job = client.wait_for_job_status(name, timeout=300)
print(job.status, *sorted(client.get_job_logs(name, step="node-0")))
"""


def test_the_kubeflow_sdk_submits_a_function(namespace, tmp_path, runtime):
    environment = tmp_path / "sdk"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", *SDK]
    subprocess.run(install, check=True, capture_output=True)
    (tmp_path / "submit.py").write_text(SUBMIT)
    done = subprocess.run(
        [python, tmp_path / "submit.py", namespace.name],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Complete", "ended", "0", "2"]
