"""What a user says about pods, and where it stands in each kind of run."""

import kubernetes_validate
import pytest
import yaml

from trainer.errors import UsageError
from trainer.k8s import manifests
from trainer.k8s.objects import MODULES, Program, build
from trainer.k8s.settings import PodSettings, config_arguments

EVERYTHING = PodSettings(
    image="registry.example/x:1",
    image_pull_secret=("pull",),
    workers=2,
    cpu="4",
    memory="8Gi",
    storage="20Gi",
    storage_class="fast",
    mount_claim=("images:/data/", "more:/more"),
    env=("A=1", "B=x=y"),
    env_from_secret=("keys",),
    priority_class="high",
    node_selector=("pool=train", "example.com/disk=ssd"),
    toleration=("team=a:NoSchedule", "spot:NoExecute", "any"),
    service_account="runner",
    active_deadline=600,
    ttl=60,
    platform_user=True,
)


def pods_of(objects):
    """Yields the pods' specifications of Jobs and JobSets, with those of their Jobs."""
    for one in objects:
        if one["kind"] == "Job":
            yield one["spec"], one["spec"]["template"]["spec"]
        for replicated in one["spec"].get("replicatedJobs", ()) if "spec" in one else ():
            job = replicated["template"]["spec"]
            yield job, job["template"]["spec"]


@pytest.mark.parametrize("kind", ["job", "jobset"])
def test_every_setting_stands_in_every_pod(kind):
    objects = build("mine", EVERYTHING, kind=kind)
    pods = list(pods_of(objects))
    assert len(pods) == 2
    for job, pod in pods:
        assert job["activeDeadlineSeconds"] == 600
        assert pod["imagePullSecrets"] == [{"name": "pull"}]
        assert pod["serviceAccountName"] == "runner"
        assert pod["automountServiceAccountToken"] is False
        assert pod["priorityClassName"] == "high"
        assert pod["nodeSelector"] == {"pool": "train", "example.com/disk": "ssd"}
        assert pod["tolerations"] == [
            {"key": "team", "operator": "Equal", "value": "a", "effect": "NoSchedule"},
            {"key": "spot", "operator": "Exists", "effect": "NoExecute"},
            {"key": "any", "operator": "Exists"},
        ]
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & pod["securityContext"].keys()
        (container,) = pod["containers"]
        assert container["image"] == "registry.example/x:1"
        for part in ("requests", "limits"):
            assert container["resources"][part]["cpu"] == "4"
            assert container["resources"][part]["memory"] == "8Gi"
        assert container["env"][-2:] == [
            {"name": "A", "value": "1"},
            {"name": "B", "value": "x=y"},
        ]
        assert container["envFrom"] == [{"secretRef": {"name": "keys"}}]
        mounts = {one["mountPath"]: one for one in container["volumeMounts"]}
        volumes = {one["name"]: one for one in pod["volumes"]}
        for path, claim in (("/data", "images"), ("/more", "more")):
            assert mounts[path]["readOnly"] is True
            source = volumes[mounts[path]["name"]]["persistentVolumeClaim"]
            assert source == {"claimName": claim, "readOnly": True}
    (claim,) = (one for one in objects if one["kind"] == "PersistentVolumeClaim")
    assert claim["spec"]["storageClassName"] == "fast"
    assert claim["spec"]["resources"]["requests"]["storage"] == "20Gi"
    roots = [one for one in objects if one["kind"] in ("Job", "JobSet")]
    assert {one["spec"]["ttlSecondsAfterFinished"] for one in roots} == {60}
    for one in objects:
        if one["kind"] != "JobSet":
            kubernetes_validate.validate(one, "1.37", strict=True)


def test_a_trainjob_has_them_where_its_api_has_a_place():
    settings = PodSettings(
        workers=3,
        gpus=2,
        image="registry.example/x:1",
        image_pull_secret=("pull",),
        memory="8Gi",
        env=("A=1",),
        mount_claim=("images:/data",),
        queue="research",
        priority_class="high",
        node_selector=("pool=train",),
        toleration=("spot:NoExecute",),
        service_account="runner",
    )
    objects = build("mine", settings, Program(["--epochs", "2"]), kind="trainjob", token="0f" * 32)
    (trainjob,) = (one for one in objects if one["kind"] == "TrainJob")
    assert objects[-1] is trainjob
    labels = trainjob["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "research"
    assert labels["kueue.x-k8s.io/priority-class"] == "high"
    spec = trainjob["spec"]
    assert spec["suspend"] is True
    wanted = {"memory": "8Gi", "nvidia.com/gpu": 2}
    assert spec["trainer"] == {
        "numNodes": 3,
        "image": "registry.example/x:1",
        "args": ["--gpus=2", "--epochs", "2"],
        "env": [{"name": "A", "value": "1"}],
        "resourcesPerNode": {
            "requests": {"cpu": "1"} | wanted,
            "limits": {"cpu": "2"} | wanted,
        },
    }
    (override,) = spec["podTemplateOverrides"]
    assert override["metadata"]["labels"] == {"app.kubernetes.io/instance": "mine"}
    pod = override["spec"]
    assert pod["imagePullSecrets"] == [{"name": "pull"}]
    assert pod["serviceAccountName"] == "runner"
    assert pod["nodeSelector"] == {"pool": "train"}
    assert pod["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Exists", "effect": "NoExecute"},
    ]
    volumes = {one["name"]: one for one in pod["volumes"]}
    assert volumes["claim"]["persistentVolumeClaim"] == {"claimName": "mine"}
    assert volumes["token"]["secret"] == {"secretName": "mine-token"}
    mounts = {one["mountPath"]: one["name"] for one in pod["containers"][0]["volumeMounts"]}
    assert volumes[mounts["/data"]]["persistentVolumeClaim"]["claimName"] == "images"


@pytest.mark.parametrize(
    "setting",
    [
        {"env_from_secret": ("a",)},
        {"active_deadline": 5},
        {"ttl": 0},
        {"platform_user": True},
        {"priority_class": "high"},
    ],
)
def test_a_trainjob_refuses_what_its_api_has_no_place_for(setting):
    (field,) = setting
    with pytest.raises(UsageError, match=f"Received: {field}="):
        build("mine", PodSettings(**setting), kind="trainjob")


@pytest.mark.parametrize(("kind", "root"), [("job", "Job"), ("jobset", "JobSet")])
def test_a_queue_admits_the_run_as_one(kind, root):
    objects = build("mine", PodSettings(queue="research"), kind=kind)
    queued = [one for one in objects if one["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")]
    assert [one["kind"] for one in queued] == [root]
    assert queued[0]["spec"]["suspend"] is True
    for _, pod in pods_of(objects):
        for quantities in pod["containers"][0]["resources"].values():
            assert quantities.keys() == {"cpu", "memory"}  # what most queues have a quota for
    if kind == "jobset":  # One worker is the chief alone.
        (only,) = queued[0]["spec"]["replicatedJobs"]
        assert only["name"] == "chief"


def test_two_jobs_are_not_queued_one_by_one():
    with pytest.raises(UsageError, match="Use --as jobset"):
        build("mine", PodSettings(queue="research", workers=2))


@pytest.mark.parametrize("kind", ["job", "jobset", "trainjob"])
def test_the_users_files_reach_the_pods(kind):
    program = Program(
        script=["train.py", "--lr", "0.1"], modules={"train.py": "import net\n", "net.py": "\n"}
    )
    objects = build("mine", PodSettings(workers=2), program, kind=kind)
    (files,) = (one for one in objects if one["kind"] == "ConfigMap")
    assert files["data"] == dict(program.modules)
    root = objects[-1]
    if kind == "trainjob":
        containers = [root["spec"]["trainer"] | root["spec"]["podTemplateOverrides"][0]["spec"]]
        containers[0] |= {"volumeMounts": containers[0]["containers"][0]["volumeMounts"]}
        volumes = [containers[0]["volumes"]]
    else:
        pods = [pod for _, pod in pods_of(objects)]
        containers = [pod["containers"][0] for pod in pods]
        volumes = [pod["volumes"] for pod in pods]
    for container, found in zip(containers, volumes, strict=True):
        assert container["command"] == ["python", "-m", "trainer.script"]
        assert container["args"] == ["--", f"{MODULES}/train.py", "--lr", "0.1"]
        assert {"name": "PYTHONPATH", "value": MODULES} in container["env"]
        (mount,) = (one for one in container["volumeMounts"] if one["mountPath"] == MODULES)
        (volume,) = (one for one in found if one["name"] == mount["name"])
        assert volume["configMap"] == {"name": files["metadata"]["name"]}


def test_files_that_no_config_map_holds_are_refused():
    with pytest.raises(UsageError, match="at most 1,000,000 bytes"):
        build("mine", None, Program(modules={"a.py": "#" * 1_000_001}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cpu", "two"),
        ("cpu", "-1"),
        ("memory", "4 GB"),
        ("storage", "big"),
        ("storage_class", "Fast"),
        ("queue", "my queue"),
        ("priority_class", "High"),
        ("service_account", "a/b"),
        ("image_pull_secret", ("A",)),
        ("env_from_secret", ("a", "b c")),
        ("env", ("A",)),
        ("env", ("1A=2",)),
        ("node_selector", ("pool",)),
        ("node_selector", ("pool=a b",)),
        ("toleration", ("gpu=yes:Never",)),
        ("toleration", (":NoSchedule",)),
        ("mount_claim", ("images",)),
        ("mount_claim", ("images:data",)),
        ("mount_claim", ("images:/",)),
        ("mount_claim", ("images:/a/../b",)),
        ("mount_claim", ("images:/output",)),
        ("mount_claim", ("a:/data", "b:/data/")),
        ("tpu", "v5e"),
        ("active_deadline", 0),
        ("ttl", -1),
    ],
)
def test_a_malformed_setting_is_refused_before_anything_is_started(field, value):
    with pytest.raises(UsageError, match=f"Received: {field}="):
        PodSettings(**{field: value})


def test_a_tpu_is_one_pods():
    with pytest.raises(UsageError, match="tpu must be alone"):
        PodSettings(tpu="tpu-v5-lite-podslice:2x2", workers=2)


def test_a_jobset_is_not_for_a_slice_of_one_host():
    with pytest.raises(UsageError, match="Use --as job"):
        build("mine", PodSettings(tpu="tpu-v5-lite-podslice:2x2"), kind="jobset")


@pytest.mark.parametrize(
    ("settings", "image", "taint"),
    [
        ({"gpus": 1}, "-gpu", "nvidia.com/gpu"),
        ({"tpu": "tpu-v5-lite-podslice:2x2"}, "-tpu", "google.com/tpu"),
    ],
)
def test_a_trainjob_with_accelerators_has_their_image_and_nodes(settings, image, taint):
    trainjob = build("mine", PodSettings(**settings), kind="trainjob")[-1]
    assert trainjob["spec"]["trainer"]["image"] == manifests.image() + image
    (override,) = trainjob["spec"]["podTemplateOverrides"]
    assert [one["key"] for one in override["spec"]["tolerations"]] == [taint]
    limits = trainjob["spec"]["trainer"]["resourcesPerNode"]["limits"]
    assert limits[taint] == settings.get("gpus", 4)


def test_a_tpu_slice_has_all_its_chips():
    (_, job) = build("mine", PodSettings(tpu="tpu-v6e-slice:2x4"))
    pod = job["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "2x4",
    }
    assert pod["containers"][0]["resources"]["limits"]["google.com/tpu"] == 8


def test_a_configuration_file_is_a_command_line():
    text = """
    workers: 4
    as: jobset
    env: {SEED: 1, NAME: "a b"}
    toleration: [gpu:NoSchedule, spot]
    keep: true
    dry_run: false
    training:
      epochs: 3
      optimizer: adam
    """
    own, training = config_arguments(yaml.safe_load(text))
    assert own == [
        *("--workers", "4", "--as", "jobset", "--env", "SEED=1", "NAME=a b"),
        *("--toleration", "gpu:NoSchedule", "spot", "--keep"),
    ]
    assert training == ["--epochs", "3", "--optimizer", "adam"]


@pytest.mark.parametrize("values", [[1], "workers", {"training": ["--epochs"]}])
def test_a_configuration_file_of_another_form_is_refused(values):
    with pytest.raises(UsageError, match="config must"):
        config_arguments(values)
