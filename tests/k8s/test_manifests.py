"""The manifests agree with the program and with Kubernetes; ``tests/cluster`` runs them."""

import functools
import json
import re
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml
from support import ROOT

import trainer
from trainer.config import TrainConfig
from trainer.distributed.cluster import resolve
from trainer.errors import StoppedError, TrainerError
from trainer.k8s import manifests
from trainer.k8s.objects import Program, build
from trainer.k8s.settings import PodSettings

K8S = ROOT / "k8s"
ASSETS = ROOT / "trainer" / "k8s" / "assets"

# The oldest that has podReplacementPolicy without a feature gate, and the newest that
# kubernetes-validate has.
OLDEST, NEWEST = "1.29", "1.37"
ONE_JOB = ("base", "gpu", "tpu", "kueue", "doctor")
TWO_JOBS = ("multiworker", "multiworker-gpu")
JOBSETS = ("jobset", "jobset-gpu")
RUNTIME = "kubeflow/runtime"
OVERLAYS = (*ONE_JOB, *TWO_JOBS, *JOBSETS, RUNTIME)  # those with pods
CUSTOM = ("JobSet", "ClusterTrainingRuntime", "TrainJob")  # validated by the Jobs they contain
SHARED = "0f" * 32  # the workers' secret
WRITTEN_OUT = {  # copied into the wheel, by the file there
    **{name: name for name in ("gpu", "tpu", *TWO_JOBS, *JOBSETS)},
    "trainjob": "kubeflow",
}

STOPPED = StoppedError.exit_code
WRONG = {error.exit_code for error in TrainerError.__subclasses__()} - {STOPPED}


@functools.cache
def rendered(folder):
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not on the PATH")
    command = ["kubectl", "kustomize", folder]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def render(name, k8s=K8S):
    """Returns a kustomization's objects, by kind and name."""
    objects = yaml.safe_load_all(rendered(k8s / name))
    return {(one["kind"], one["metadata"]["name"]): one for one in objects}


def jobs_of(objects):
    """Returns the Jobs, and those that a JobSet or a runtime is made of, by their names there."""
    jobs = {name: one["spec"] for (kind, name), one in objects.items() if kind == "Job"}
    for (kind, _), one in objects.items():
        if kind in ("JobSet", "ClusterTrainingRuntime"):
            jobset = one["spec"] if kind == "JobSet" else one["spec"]["template"]["spec"]
            for replicated in jobset["replicatedJobs"]:
                jobs[replicated["name"]] = replicated["template"]["spec"]
    return jobs


def pods_of(objects):
    """Returns all pods and pod templates by name."""
    pods = {name: one for (kind, name), one in objects.items() if kind == "Pod"}
    return pods | {name: job["template"] for name, job in jobs_of(objects).items()}


def container_of(pod):
    (container,) = pod["spec"]["containers"]
    return container


def environ_of(pod, index=0):
    """Returns the environment of a pod's container, without what the downward API adds."""
    environ = {one["name"]: one.get("value", "") for one in container_of(pod)["env"]}
    return environ | {"JOB_COMPLETION_INDEX": str(index)}


def opening(path):
    """Returns the comment at the top of a file."""
    return re.match(r"(#.*\n)*", path.read_text())[0]


@pytest.fixture
def edit(tmp_path):
    """Returns a function that changes a file in a copy of ``k8s/`` and returns the copy."""
    copy = shutil.copytree(K8S, tmp_path / "k8s")

    def replace(name, old, new):
        text = (copy / name).read_text()
        assert text.count(old) == 1
        (copy / name).write_text(text.replace(old, new))
        return copy

    return replace


# All of them.


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("name", [*OVERLAYS, "fetch"])
def test_kubernetes_knows_every_field(name, version):
    objects = render(name)
    own = [one for one in objects.values() if one["kind"] not in CUSTOM]
    for job, spec in jobs_of(objects).items():
        own.append(
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job}, "spec": spec}
        )
    for one in own:
        kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("name", [*OVERLAYS, "fetch"])
def test_every_pod_is_allowed_where_pod_security_is_restricted(name):
    pods = pods_of(render(name))
    assert pods
    for pod in pods.values():
        assert not violations(pod["spec"])


def violations(spec):
    """Lists what https://kubernetes.io/docs/concepts/security/pod-security-standards refuses."""
    found = [field for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field)]
    allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"}
    allowed |= {"persistentVolumeClaim", "projected", "secret"}
    for volume in spec.get("volumes", []):
        found += [f"volume {kind}" for kind in volume.keys() - {"name"} - allowed]
    for container in spec["containers"] + spec.get("initContainers", []):
        # A container's securityContext overrides the pod's.
        security = spec.get("securityContext", {}) | container.get("securityContext", {})
        capabilities = security.get("capabilities", {})
        needed = {
            "privileged": not security.get("privileged"),
            "allowPrivilegeEscalation": security.get("allowPrivilegeEscalation") is False,
            "runAsNonRoot": security.get("runAsNonRoot") is True,
            "runAsUser": security.get("runAsUser") != 0,
            "seccompProfile": security.get("seccompProfile", {}).get("type")
            in ("RuntimeDefault", "Localhost"),
            "capabilities.drop": "ALL" in capabilities.get("drop", []),
            "capabilities.add": set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "procMount": security.get("procMount", "Default") == "Default",
            "sysctls": not security.get("sysctls"),
            "seLinuxOptions": not security.get("seLinuxOptions"),
            "hostPort": not any("hostPort" in port for port in container.get("ports", [])),
        }
        found += [what for what, holds in needed.items() if not holds]
    return found


@pytest.mark.parametrize("name", [*OVERLAYS, "fetch"])
def test_every_pod_has_the_usual_hardening_and_resources(name):
    for pod in pods_of(render(name)).values():
        spec, container = pod["spec"], container_of(pod)
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["fsGroup"] > 0
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["imagePullPolicy"] == "IfNotPresent"
        assert re.fullmatch(
            rf"digits-trainer:{re.escape(trainer.__version__)}(-[gt]pu)?", container["image"]
        )
        for kind in ("requests", "limits"):
            needed = {"cpu", "memory"}
            if name != "kueue":
                needed.add("ephemeral-storage")
            assert needed <= container["resources"][kind].keys()


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_worker_has_the_memory_it_may_use_and_a_cpu(name):
    for pod in pods_of(render(name)).values():
        resources = container_of(pod)["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        assert int(resources["requests"]["cpu"]) >= 1


@pytest.mark.parametrize("name", OVERLAYS)
def test_metrics_are_served_and_a_pod_that_is_alone_is_probed(name):
    for pod in pods_of(render(name)).values():
        container = container_of(pod)
        words = container.get("command", []) + container.get("args", [])
        (flag,) = (one for one in words if one.startswith("--metrics-port="))
        _, port = TrainConfig(metrics_port=flag.partition("=")[2]).metrics_address
        assert {"name": "metrics", "containerPort": port} in container["ports"]
        # Several wait for one another before there is anything to probe.
        assert ("livenessProbe" in container) == (name in ONE_JOB)
        if name in ONE_JOB:
            assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}


def test_prometheus_reads_the_pods_of_several_workers_too():
    objects = render("podmonitor")
    monitor = objects["PodMonitor", "digits-trainer"]["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    policy = objects["NetworkPolicy", "digits-trainer-metrics"]["spec"]
    for name in SEVERAL_WORKERS[:-1]:
        for pod in pods_of(render(name)).values():
            labels = pod["metadata"]["labels"].items()
            assert labels >= monitor["selector"]["matchLabels"].items()
            assert labels >= policy["podSelector"]["matchLabels"].items()
            ports = {one["name"]: one["containerPort"] for one in container_of(pod)["ports"]}
            assert policy["ingress"] == [{"ports": [{"port": ports[endpoint["port"]]}]}]


@pytest.mark.parametrize(
    ("name", "taint"),
    [(name, "nvidia.com/gpu") for name in ("gpu", "multiworker-gpu", "jobset-gpu")]
    + [("tpu", "google.com/tpu")],
)
def test_pods_with_accelerators_tolerate_the_taint_of_their_nodes(name, taint):
    tolerated = {"key": taint, "operator": "Exists", "effect": "NoSchedule"}
    for pod in pods_of(render(name)).values():
        assert pod["spec"]["tolerations"] == [tolerated]


@pytest.mark.parametrize("name", ["base", "multiworker", "jobset"])
def test_a_platform_that_gives_users_finds_none_named(tmp_path, name):
    copy = shutil.copytree(K8S, tmp_path / "k8s")
    (copy / "openshift").mkdir()
    (copy / "openshift" / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources: [../{'multiworker' if name == 'jobset' else name}]\n"
        "components: [../components/openshift"
        f"{', ../components/jobset' if name == 'jobset' else ''}]\n"
    )
    pods = pods_of(render("openshift", copy))
    assert len(pods) == (1 if name == "base" else 2)
    for pod in pods.values():
        security = pod["spec"]["securityContext"]
        assert security == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_pod_has_a_grace_period_for_a_checkpoint(name):
    for pod in pods_of(render(name)).values():
        assert pod["spec"]["terminationGracePeriodSeconds"] >= 30
        assert pod["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("name", [*(name for name in OVERLAYS if name != RUNTIME), "kubeflow"])
def test_every_object_is_labelled_with_its_run(name):
    objects = render(name)
    run = {"app.kubernetes.io/name": "digits-trainer", "app.kubernetes.io/instance": "digits"}
    for one in [*objects.values(), *pods_of(objects).values()]:
        assert one["metadata"]["labels"].items() >= run.items()


@pytest.mark.parametrize("name", [*TWO_JOBS, *JOBSETS])
def test_selectors_match_the_pods_of_the_run(name):
    objects = render(name)
    selectors = [
        one["spec"].get("selector") or one["spec"]["podSelector"]["matchLabels"]
        for (kind, _), one in objects.items()
        if kind in ("Service", "NetworkPolicy")
    ]
    pods = pods_of(objects).values()
    for pod in pods:
        (spread,) = pod["spec"]["topologySpreadConstraints"]
        selectors.append(spread["labelSelector"]["matchLabels"])
    for selector in selectors:
        assert "app.kubernetes.io/instance" in selector
        assert all(pod["metadata"]["labels"].items() >= selector.items() for pod in pods)


SEVERAL_WORKERS = (*TWO_JOBS, *JOBSETS, "kubeflow")


@pytest.mark.parametrize("name", SEVERAL_WORKERS)
def test_only_the_runs_own_pods_reach_one_another_at_any_port(name):
    objects = render(name)
    policy = objects["NetworkPolicy", "digits"]["spec"]
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    (ingress,) = policy["ingress"]
    own, dns = policy["egress"]
    # Without "ports" a rule is for all: NCCL's connections have ports that the system chooses.
    assert ingress == {"from": own["to"]}
    assert own == {"to": [{"podSelector": policy["podSelector"]}]}
    assert {(one["protocol"], one["port"]) for one in dns["ports"]} >= {("UDP", 53), ("TCP", 53)}
    labels = policy["podSelector"]["matchLabels"].items()
    pods = [pod["metadata"]["labels"] for pod in pods_of(objects).values()]
    if name == "kubeflow":  # The runtime's pods, with what the TrainJob overrides.
        (pod,) = pods_of(render(RUNTIME)).values()
        override = objects["TrainJob", "digits"]["spec"]["podTemplateOverrides"][0]
        pods = [pod["metadata"]["labels"] | override["metadata"]["labels"]]
    assert pods
    assert all(pod.items() >= labels for pod in pods)
    # It shares the run's other labels.
    fetch = render("fetch")["Pod", "digits-fetch"]
    assert not fetch["metadata"]["labels"].items() >= labels


@pytest.mark.parametrize("name", [*TWO_JOBS, *JOBSETS, RUNTIME])
def test_all_workers_mount_the_same_secret_which_may_be_missing(name):
    for pod in pods_of(render(name)).values():
        (volume,) = (one for one in pod["spec"]["volumes"] if one["name"] == "token")
        assert volume["secret"]["secretName"] == "digits-token"
        assert volume["secret"]["optional"] is True
        # fsGroup makes it the user's who trains.
        assert volume["secret"]["defaultMode"] == 0o440
        container = container_of(pod)
        (mount,) = (one for one in container["volumeMounts"] if one["name"] == "token")
        (file,) = (one for one in container["env"] if one["name"] == "TRAINER_TOKEN_FILE")
        assert file["value"] == f"-{mount['mountPath']}/token"
        assert mount["readOnly"] is True


# The end of a run.


@pytest.mark.parametrize("name", [*ONE_JOB, *TWO_JOBS])
def test_a_job_fails_at_once_for_user_errors_and_retries_when_it_was_stopped(name):
    for job in jobs_of(render(name)).values():
        disruption, stopped, wrong = job["podFailurePolicy"]["rules"]
        assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
        assert stopped["onExitCodes"]["values"] == [STOPPED]
        assert set(wrong["onExitCodes"]["values"]) == WRONG
        rules = (disruption, stopped, wrong)
        assert [rule["action"] for rule in rules] == ["Ignore", "Ignore", "FailJob"]
        assert job["backoffLimit"] > 0
        assert job["ttlSecondsAfterFinished"] >= 86400


@pytest.mark.parametrize("name", ["jobset", RUNTIME])
@pytest.mark.parametrize(
    ("reason", "ending", "action"),
    [
        *(("PodFailurePolicy", f"exit code {code}", "FailJobSet") for code in sorted(WRONG)),
        ("PodFailurePolicy", f"exit code {STOPPED}", "RestartJobSetAndIgnoreMaxRestarts"),
        ("PodFailurePolicy", "condition", "RestartJobSetAndIgnoreMaxRestarts"),
        ("BackoffLimitExceeded", None, "RestartJobSet"),
        ("DeadlineExceeded", None, "FailJobSet"),
    ],
)
def test_a_jobset_fails_at_once_for_user_errors_and_restarts_for_the_rest(
    name, reason, ending, action
):
    # Messages as in Kubernetes' pkg/controller/job/pod_failure_policy.go.
    message = {
        None: "Job has reached the specified limit",
        "condition": "Pod a/digits-chief-0-0-2 has condition DisruptionTarget matching FailJob "
        "rule at index 0",
    }.get(
        ending, f"Container trainer for pod a/digits-2 failed with {ending} matching FailJob rule"
    )
    objects = render(name)
    one = next(one for (kind, _), one in objects.items() if kind in CUSTOM[:2])
    jobset = one["spec"] if one["kind"] == "JobSet" else one["spec"]["template"]["spec"]
    actions = [
        rule["action"]
        for rule in jobset["failurePolicy"]["rules"]
        if reason in rule["onJobFailureReasons"]
        and any(
            re.search(pattern, message) for pattern in rule.get("onJobFailureMessagePatterns", [""])
        )
    ]
    assert actions[0] == action
    assert jobset["ttlSecondsAfterFinished"] >= 86400
    for job in jobs_of(objects).values():
        # The JobSet decides about every failure: its Jobs never retry a pod.
        assert job["backoffLimit"] == 0
        assert "ttlSecondsAfterFinished" not in job
        rules = job["podFailurePolicy"]["rules"]
        assert [rule["action"] for rule in rules] == ["FailJob"] * 3
        names = {rule["onExitCodes"]["containerName"] for rule in rules[1:]}
        assert names == {container_of(job["template"])["name"]}


@pytest.mark.parametrize(
    ("name", "label"),
    [
        *((name, "batch.kubernetes.io/controller-uid") for name in (*ONE_JOB, *TWO_JOBS)),
        # A restart replaces the Jobs of a JobSet.
        *((name, "jobset.sigs.k8s.io/jobset-uid") for name in (*JOBSETS, RUNTIME)),
    ],
)
def test_every_pod_has_the_uid_of_its_job(name, label):
    for pod in pods_of(render(name)).values():
        (uid,) = (one for one in container_of(pod)["env"] if one["name"] == "TRAINER_JOB_UID")
        assert uid["valueFrom"]["fieldRef"]["fieldPath"] == f"metadata.labels['{label}']"


# Several workers, and GPUs.


@pytest.mark.parametrize("name", TWO_JOBS)
def test_the_two_jobs_are_one_cluster(name):
    objects = render(name)
    pods = pods_of(objects)
    assert objects["Service", "digits"]["spec"]["publishNotReadyAddresses"] is True
    for index, job in enumerate(("digits", "digits-workers")):
        assert pods[job]["spec"]["subdomain"] == "digits"
        cluster = resolve(environ_of(pods[job]))
        assert cluster.workers == ("digits-0.digits:2222", "digits-workers-0.digits:2222")
        assert cluster.index == index
        spec = objects["Job", job]["spec"]
        assert (spec["completionMode"], spec["podReplacementPolicy"]) == ("Indexed", "Failed")


@pytest.mark.parametrize(
    ("name", "chief"),
    [(name, "digits") for name in TWO_JOBS] + [(name, "chief") for name in JOBSETS],
)
def test_only_the_chief_mounts_the_claim(name, chief):
    for job, pod in pods_of(render(name)).items():
        mounts = {mount["mountPath"] for mount in container_of(pod)["volumeMounts"]}
        claims = [one for one in pod["spec"]["volumes"] if "persistentVolumeClaim" in one]
        assert ("/output" in mounts, len(claims)) == ((True, 1) if job == chief else (False, 0))


def test_the_jobs_of_a_jobset_are_one_cluster():
    objects = render("jobset")
    network = objects["JobSet", "digits"]["spec"]["network"]
    assert network == {"subdomain": "digits", "publishNotReadyAddresses": True}
    for index, pod in enumerate(pods_of(objects).values()):
        cluster = resolve(environ_of(pod))
        # JOBSET-REPLICATEDJOB-JOBINDEX-PODINDEX.SUBDOMAIN
        assert cluster.workers == (
            "digits-chief-0-0.digits:2222",
            "digits-workers-0-0.digits:2222",
        )
        assert cluster.index == index
    # The JobSet makes its own Service and contains the Jobs.
    assert {kind for kind, _ in objects} == {"JobSet", "NetworkPolicy", "PersistentVolumeClaim"}


def test_the_runtime_is_one_cluster_for_a_trainjob_of_any_name():
    run, objects = render("kubeflow"), render(RUNTIME)
    trainjob = run["TrainJob", "digits"]["spec"]
    ((_, name),) = objects
    assert trainjob["runtimeRef"] == {"name": name}
    runtime = objects["ClusterTrainingRuntime", name]["spec"]
    (pod,) = pods_of(objects).values()
    # By these Kubeflow Trainer finds its Job and container.
    labels = runtime["template"]["spec"]["replicatedJobs"][0]["template"]["metadata"]["labels"]
    assert labels == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert container_of(pod)["name"] == "node"

    # $() refers to earlier variables only.
    names = [one["name"] for one in container_of(pod)["env"]]
    assert names.index("JOBSET_NAME") < names.index("TRAINER_HOSTS")
    assert names.index("PET_NNODES") < names.index("TRAINER_WORKERS")
    (uses,) = (one for one in container_of(pod)["env"] if one["name"] == "JOBSET_NAME")
    assert uses["valueFrom"]["fieldRef"]["fieldPath"].endswith("['jobset.sigs.k8s.io/jobset-name']")
    environ = environ_of(pod, index=1)
    environ["TRAINER_HOSTS"] = environ["TRAINER_HOSTS"].replace("$(JOBSET_NAME)", "any")
    for nodes, workers in ((1, None), (2, ("any-node-0-0.any:2222", "any-node-0-1.any:2222"))):
        # As Kubeflow Trainer sets PET_NNODES in its place, and Kubernetes expands it.
        cluster = resolve(environ | {"TRAINER_WORKERS": str(nodes)})
        assert (cluster and cluster.workers) == workers
    assert cluster.index == 1


def test_a_trainjobs_arguments_come_after_the_runtimes_flags_and_its_command_replaces_them():
    container = container_of(*pods_of(render(RUNTIME)).values())
    (chief, _) = pods_of(render("multiworker")).values()
    flags = container_of(chief)["args"]
    assert container["command"] == ["python", "-m", "trainer.task", *flags]
    assert "args" not in container


def test_a_trainjob_brings_its_own_claim_and_the_runtime_names_none():
    (pod,) = pods_of(render(RUNTIME)).values()
    assert not [one for one in pod["spec"]["volumes"] if "persistentVolumeClaim" in one]
    (mounted,) = (one for one in container_of(pod)["volumeMounts"] if one["mountPath"] == "/output")
    run = render("kubeflow")
    override = run["TrainJob", "digits"]["spec"]["podTemplateOverrides"][0]["spec"]
    (volume,) = override["volumes"]
    # Another name: two kinds of source in one volume would be refused.
    assert volume["name"] != mounted["name"]
    assert override["containers"][0]["volumeMounts"] == [
        {"name": volume["name"], "mountPath": "/output"}
    ]
    assert run["PersistentVolumeClaim", "digits"]["spec"]["accessModes"] == ["ReadWriteMany"]


def test_a_newer_trainjob_is_the_same_in_another_form():
    old, new = render("kubeflow"), render("kubeflow-2.2")
    assert new.pop(("TrainJob", "digits")) == manifests.with_runtime_patches(
        old.pop(("TrainJob", "digits"))
    )
    assert new == old


@pytest.mark.parametrize("name", [*TWO_JOBS, "jobset"])
def test_the_number_of_workers_is_set_in_one_place(edit, name):
    k8s = edit("multiworker/kustomization.yaml", "      value: 1\n", "      value: 3\n")
    chief, workers = jobs_of(render(name, k8s)).values()
    assert (chief["completions"], chief["parallelism"]) == (1, 1)
    assert (workers["completions"], workers["parallelism"]) == (3, 3)
    for job, index in ((chief, 0), (workers, 2)):
        assert len(resolve(environ_of(job["template"], index)).workers) == 4


def test_the_number_of_nodes_is_set_in_one_place(edit):
    k8s = edit("kubeflow/trainjob.yaml", "numNodes: 2", "numNodes: 5")
    trainer = render("kubeflow", k8s)["TrainJob", "digits"]["spec"]["trainer"]
    assert trainer == {"numNodes": 5}


@pytest.mark.parametrize("name", ["gpu", "multiworker-gpu"])
def test_the_number_of_gpus_is_set_in_one_place(edit, name):
    k8s = edit("components/gpu/kustomization.yaml", "      value: 1\n", "      value: 4\n")
    for pod in pods_of(render(name, k8s)).values():
        container = container_of(pod)
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
        assert container["args"][-1] == "--gpus=4"
        assert "/dev/shm" in {mount["mountPath"] for mount in container["volumeMounts"]}  # noqa: S108
        (shared,) = (one for one in pod["spec"]["volumes"] if one["name"] == "shared-memory")
        assert shared["emptyDir"]["medium"] == "Memory"


def test_a_tpus_job_asks_for_all_chips_of_its_topology():
    (pod,) = pods_of(render("tpu")).values()
    container = container_of(pod)
    width, height = pod["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    for kind in ("requests", "limits"):
        assert container["resources"][kind]["google.com/tpu"] == int(width) * int(height)
    assert "--strategy=tpu" in container["args"]


def test_kueue_admits_the_job():
    job = render("kueue")["Job", "digits"]
    assert job["spec"]["suspend"] is True
    assert "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]


def test_a_pod_is_examined_as_the_container_that_trains_would_find_it(edit):
    both = "- ../components/gpu\n- ../components/doctor\n"
    k8s = edit("gpu/kustomization.yaml", "- ../components/gpu\n", both)
    for pod in (*pods_of(render("doctor")).values(), *pods_of(render("gpu", k8s)).values()):
        (doctor,) = pod["spec"]["initContainers"]
        assert doctor.pop("name") == "doctor"
        assert doctor.pop("command") == ["python", "-m", "trainer.doctor"]
        trainer = dict(container_of(pod))
        assert trainer.pop("name") == "trainer"
        del trainer["livenessProbe"], trainer["ports"]
        assert doctor == trainer
    for objects in (render("doctor"), render("gpu", k8s)):
        (job,) = jobs_of(objects).values()
        wrong = job["podFailurePolicy"]["rules"][2]["onExitCodes"]
        assert "containerName" not in wrong  # As its name would leave the doctor's errors out.


# Images; generated files; comments.


@pytest.mark.parametrize("name", [*OVERLAYS, "fetch"])
def test_the_images_are_set_in_one_place(edit, name):
    file = K8S / "components" / "image" / "kustomization.yaml"
    component = yaml.safe_load(file.read_text())
    images = {one["name"]: f"{one['newName']}:{one['newTag']}" for one in component["images"]}
    version = trainer.__version__
    assert images == {
        "digits-trainer-cpu": f"digits-trainer:{version}",
        "digits-trainer-gpu": f"digits-trainer:{version}-gpu",
        "digits-trainer-tpu": f"digits-trainer:{version}-tpu",
    }
    for one in component["images"]:
        one["newName"], one["newTag"] = "registry.example/me/trainer", f"of-{one['name'][-3:]}"
    new = yaml.safe_dump(component)
    k8s = edit("components/image/kustomization.yaml", file.read_text(), new)
    kind = "gpu" if name.endswith("gpu") else "tpu" if name == "tpu" else "cpu"
    for pod in pods_of(render(name, k8s)).values():
        assert container_of(pod)["image"] == f"registry.example/me/trainer:of-{kind}"


@pytest.mark.parametrize(("file", "folder"), [("job", "base"), ("fetch", "fetch")])
def test_a_standalone_file_is_the_output_of_kustomize(file, folder):
    path = K8S / f"{file}.yaml"
    assert path.read_text() == opening(path) + rendered(K8S / folder), "make manifests"
    assert path.read_text().count("image: ") == 1


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_the_wheel_has_the_output_of_kustomize(name):
    text = (ASSETS / f"{name}.yaml").read_text()
    assert text == rendered(K8S / WRITTEN_OUT[name]), "make manifests"


def test_the_wheel_has_the_standalone_files():
    names = {"job.yaml", "fetch.yaml", *(f"{name}.yaml" for name in WRITTEN_OUT)}
    assert {path.name for path in ASSETS.iterdir()} == names
    for name in ("job.yaml", "fetch.yaml"):
        assert (ASSETS / name).read_text() == (K8S / name).read_text(), "make manifests"


def test_the_fetching_pod_reads_the_jobs_claim_and_ends():
    objects = render("fetch")
    pod = objects["Pod", "digits-fetch"]
    assert list(objects) == [("Pod", "digits-fetch")]
    assert pod["spec"]["restartPolicy"] == "Never"
    assert pod["spec"]["activeDeadlineSeconds"] == 600
    container = container_of(pod)
    assert (container["command"], container.get("args")) == (["sleep", "600"], None)
    (mount,) = container["volumeMounts"]
    assert (mount["mountPath"], mount["readOnly"]) == ("/output", True)
    (volume,) = pod["spec"]["volumes"]
    assert volume["persistentVolumeClaim"] == {"claimName": "digits"}


OPENINGS = {
    name: K8S / name / "kustomization.yaml"
    for name in (*OVERLAYS, "kubeflow")
    if name not in ("base", "jobset-gpu", RUNTIME)  # whose commands stand elsewhere
}


@pytest.mark.parametrize("name", [*OPENINGS, "job.yaml"])
def test_an_opening_comment_has_the_commands(name):
    comment = opening(OPENINGS.get(name, K8S / name))
    assert re.search(rf"#   kubectl apply -[kf] k8s/{re.escape(name)}\n", comment)
    if name in SEVERAL_WORKERS:
        assert "kubectl create secret generic digits-token --from-literal=token=" in comment
        assert re.search(r"kubectl delete .* secret/digits-token\n", comment)
    for command in (
        r"get [^,\n]* --watch",
        r"logs -f job/digits",
        r"describe pod -l .*=digits ",
        r"apply -[kf] k8s/fetch\b",
        r"cp digits-fetch:/output/mnist.h5",
        r"delete (job|trainjob)[ s,/]",
        r"delete pvc digits .*# the model with it",
    ):
        assert re.search(rf"kubectl {command}", comment), command
    # That would delete the claim, and so the model.
    assert not re.search(r"#   kubectl delete -[kf]", comment)


def test_comments_name_existing_files():
    for path in K8S.rglob("*.yaml"):
        for name in re.findall(r"\bk8s/[\w./-]*\w", path.read_text()):
            assert (ROOT / name).exists(), f"{path.relative_to(ROOT)}: {name}"


@pytest.mark.parametrize("name", OPENINGS)
def test_opening_comments_name_existing_objects(name):
    objects = render(name)
    known = {one for _, one in objects} | {"digits-fetch"}
    for one in objects.values():
        if one["kind"] in ("JobSet", "TrainJob"):
            jobs = jobs_of(objects if one["kind"] == "JobSet" else render(RUNTIME))
            known |= {f"{one['metadata']['name']}-{job}-0" for job in jobs}
    named = re.findall(
        r"(?:job/|get job |delete job |pvc |pod/|runtime )(digits[\w-]*)", opening(OPENINGS[name])
    )
    assert named
    assert set(named) <= known


# trainer.submit.


def by_name(objects):
    return {(one["kind"], one["metadata"]["name"]): one for one in objects}


def container(job):
    return job["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ({}, "job"),
        ({"gpus": 1}, "gpu"),
        ({"workers": 2}, "multiworker"),
        ({"workers": 2, "gpus": 1}, "multiworker-gpu"),
        ({"tpu": "tpu-v5-lite-podslice:2x2"}, "tpu"),
        ({"workers": 2}, "jobset"),
        ({"workers": 2, "gpus": 1}, "jobset-gpu"),
    ],
)
def test_a_run_with_default_options_is_the_manifest(options, file):
    expected = yaml.safe_load_all((ASSETS / f"{file}.yaml").read_text())
    kind = "jobset" if file.startswith("jobset") else "job"
    found = build("digits", PodSettings(**options), kind=kind)
    assert by_name(found) == by_name(expected)


def test_a_trainjob_with_default_options_is_the_manifest():
    expected = by_name(yaml.safe_load_all((ASSETS / "trainjob.yaml").read_text()))
    found = build("digits", PodSettings(workers=2), kind="trainjob")
    assert by_name(found) == expected


def test_yaml_is_what_kubectl_reads():
    values = ("y", "N", "yes", "null", "1e3", "0x10", "1_0", ".5", "+1", "a: b", "é\n")
    objects = build("mine", PodSettings(env=tuple(f"A={value}" for value in values)))
    text = manifests.dump(objects)
    assert list(yaml.safe_load_all(text)) == objects
    assert "value: 'y'" in text
    assert "value: 'N'" in text
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not on the PATH")
    (job,) = (one for one in text.split("\n---\n") if "kind: Job" in one)
    read = subprocess.run(
        ["kubectl", "annotate", "--local", "--filename=-", "a=b", "--output=json"],
        input=job,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    variables = json.loads(read)["spec"]["template"]["spec"]["containers"][0]["env"]
    assert [one["value"] for one in variables if one["name"] == "A"] == list(values)


def test_a_worker_alone_has_no_secret():
    assert by_name(build("digits", token=SHARED)).keys() == {
        ("PersistentVolumeClaim", "digits"),
        ("Job", "digits"),
    }


@pytest.mark.parametrize("downloads", [False, True])
def test_pods_that_download_their_data_reach_the_internet(downloads):
    objects = by_name(build("digits", PodSettings(workers=2), downloads=downloads))
    egress = objects["NetworkPolicy", "digits"]["spec"]["egress"]
    anywhere = {one["port"] for rule in egress if "to" not in rule for one in rule["ports"]}
    assert anywhere & {80, 443} == ({80, 443} if downloads else set())


def test_a_run_has_its_own_name_image_numbers_and_flags():
    objects = build(
        "mine",
        PodSettings(image="registry/x:1", workers=5, gpus=2),
        Program(["--epochs", "3"]),
        token=SHARED,
    )
    found = by_name(objects)
    assert set(found) == {
        ("PersistentVolumeClaim", "mine"),
        ("Service", "mine"),
        ("NetworkPolicy", "mine"),
        ("Secret", "mine-token"),
        ("Job", "mine"),
        ("Job", "mine-workers"),
    }
    for name, pods in (("mine", 1), ("mine-workers", 4)):
        job = found["Job", name]
        assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (pods, pods)
        trainer = container(job)
        assert trainer["image"] == "registry/x:1"
        assert trainer["args"][-3:] == ["--gpus=2", "--epochs", "3"]
        assert trainer["resources"]["limits"]["nvidia.com/gpu"] == 2
        environ = {entry["name"]: entry.get("value") for entry in trainer["env"]}
        assert environ["TRAINER_WORKERS"] == "1+4"
        assert environ["TRAINER_HOSTS"] == "mine-{index}.mine,mine-workers-{index}.mine"
        # Its own secret is there, or the pod must not run.
        assert not environ["TRAINER_TOKEN_FILE"].startswith("-")
        volumes = job["spec"]["template"]["spec"]["volumes"]
        (volume,) = (one["secret"] for one in volumes if one["name"] == "token")
        assert (volume["secretName"], volume.get("optional")) == ("mine-token", None)
    assert found["Secret", "mine-token"]["stringData"] == {"token": SHARED}
    labels = found["Secret", "mine-token"]["metadata"]["labels"]
    assert labels["app.kubernetes.io/instance"] == "mine"
    # No name of the manifests' run is left; digits-trainer is the program's.
    assert "digits" not in manifests.dump(objects).replace("digits-trainer", "")
