"""What a run consists of in Kubernetes: the manifests, with what the user says about pods.

    objects = build("digits-a1b2c", PodSettings(workers=3), Program(["--epochs", "2"]))
    print(manifests.dump(objects))

What is changed here is what a user would change in an editor: names, numbers and arguments.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from trainer.errors import UsageError
from trainer.k8s import manifests
from trainer.k8s.manifests import QUEUE_LABEL
from trainer.k8s.settings import PodSettings

MODULES = "/modules"  # where the user's Python files are in a pod
_QUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"
_GPU, _TPU = "nvidia.com/gpu", "google.com/tpu"
# The API's limit for a ConfigMap is 1 MiB, names and base64 included.
_CONFIG_MAP_BYTES = 1_000_000


class Program(NamedTuple):
    """What the pods run.

    Attributes:
        flags: Further flags of ``python -m trainer.task``.
        script: In place of them: the name of a script that is among ``modules``, and its arguments,
            for ``python -m trainer.script``.
        modules: Texts of Python files by their names, which the pods can import.
    """

    flags: Sequence[str] = ()
    script: Sequence[str] = ()
    modules: Mapping[str, str] = MappingProxyType({})

    def command(self, args: Sequence[str]) -> dict[str, list[str]]:
        """Returns command and arguments of the container, from the arguments of a manifest."""
        if not self.script:
            return {"args": found} if (found := [*args, *self.flags]) else {}
        own = [arg for arg in args if arg.startswith("--gpus=")]
        return {
            "command": ["python", "-m", "trainer.script"],
            "args": [*own, "--", f"{MODULES}/{self.script[0]}", *self.script[1:]],
        }


def build(
    name: str,
    settings: PodSettings | None = None,
    program: Program | None = None,
    *,
    kind: manifests.Kind = "job",
    token: str | None = None,
    downloads: bool = False,
) -> list[dict]:
    """Returns the objects of a run.

    They are a PersistentVolumeClaim and what trains: a Job, and for several workers a second Job
    and a headless Service; or a JobSet; or a TrainJob. Several workers have a NetworkPolicy and a
    Secret, too, and a run with files of the user's a ConfigMap.

    Args:
        name: Name of the run, a prefix of the name of each object.
        settings: Of the pods; None: those of the manifests.
        program: What the pods run; None: ``python -m trainer.task`` without further flags.
        kind: What trains. ``trainjob`` needs the runtime of ``k8s/kubeflow/runtime``.
        token: The secret by which several workers know one another; None: that of the Secret
            NAME-token, if there is one.
        downloads: Whether the pods need the internet, for their data.

    Returns:
        Manifests as the API server takes them, in the order to apply them in.

    Raises:
        UsageError: The kind has no place for a setting.
        ConfigurationError: The package is installed without its extra ``k8s``.
    """
    settings = settings or PodSettings()
    program = program or Program()
    objects = manifests.load_asset(_asset(kind, settings), name)
    if kind == "trainjob":
        (trainjob,) = (one for one in objects if one["kind"] == "TrainJob")
        _complete_trainjob(trainjob, settings, program, name, token)
    else:
        for job in _jobs(objects):
            _complete_job(job, settings, program, name)
        _set_workers(objects, settings.workers, name)
    if settings.queue:
        _queue(objects, settings, kind)
    if settings.ttl is not None:
        for one in objects:
            if one["kind"] in ("Job", "JobSet"):
                one["spec"]["ttlSecondsAfterFinished"] = settings.ttl
    (claim,) = (one for one in objects if one["kind"] == "PersistentVolumeClaim")
    if settings.storage:
        claim["spec"]["resources"]["requests"]["storage"] = settings.storage
    if settings.storage_class:
        claim["spec"]["storageClassName"] = settings.storage_class
    labels = claim["metadata"]["labels"]
    if program.modules:
        objects.append(_config_map(name, labels, program.modules))
    if settings.workers > 1 and token:
        if kind != "trainjob":
            _require_secret(objects)
        metadata = {"name": manifests.secret_name(name), "labels": dict(labels)}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata}
        objects.append({**secret, "stringData": {"token": token}})
    for one in objects:
        if one["kind"] == "NetworkPolicy" and downloads:
            one["spec"]["egress"].append({"ports": [{"port": port} for port in (80, 443)]})
    # What trains comes last: a pod needs its volume, its network, its secret and its files.
    return sorted(objects, key=lambda one: one["kind"] in ("Job", "JobSet", "TrainJob"))


def _asset(kind: manifests.Kind, settings: PodSettings) -> str:
    if kind == "trainjob":
        return "trainjob"
    if kind == "jobset":
        if settings.tpu:
            raise UsageError(
                "tpu must be left out for a JobSet: a slice of one host has one pod. Received: "
                f"tpu={settings.tpu!r}. Use --as job."
            )
        return "jobset-gpu" if settings.gpus else "jobset"
    if settings.tpu:
        return "tpu"
    name = "multiworker" if settings.workers > 1 else "job"
    return {"multiworker": "multiworker-gpu", "job": "gpu"}[name] if settings.gpus else name


def _jobs(objects: Sequence[dict]) -> Iterator[dict]:
    """Yields the Jobs, and those that a JobSet is made of, with their names in it."""
    for one in objects:
        if one["kind"] == "Job":
            yield one
        for replicated in one["spec"].get("replicatedJobs", ()):
            yield {
                "metadata": {"name": replicated["name"]},
                "spec": replicated["template"]["spec"],
            }


def _complete_job(job: dict, settings: PodSettings, program: Program, name: str) -> None:
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    if settings.image:
        container["image"] = settings.image
    resources_of = container["resources"]
    for resource, quantity in (("cpu", settings.cpu), ("memory", settings.memory)):
        if quantity:
            for part in ("requests", "limits"):
                resources_of[part][resource] = quantity
    if settings.gpus:
        resources_of["limits"][_GPU] = settings.gpus
        container["args"] = [
            f"--gpus={settings.gpus}" if arg.startswith("--gpus=") else arg
            for arg in container["args"]
        ]
    if chips := settings.tpu_slice():
        accelerator, topology, count = chips
        pod["nodeSelector"] = _slice_labels(accelerator, topology)
        for part in ("requests", "limits"):
            resources_of[part][_TPU] = count
    container |= program.command(container["args"])
    if program.script:  # It serves no metrics.
        container.pop("livenessProbe", None)
    container["env"] += _environment(settings, program)
    if settings.env_from_secret:
        container["envFrom"] = [{"secretRef": {"name": one}} for one in settings.env_from_secret]
    mounts, volumes = _volumes(settings, program, name)
    container["volumeMounts"] += mounts
    pod["volumes"] += volumes
    _place(pod, settings)
    if settings.priority_class:
        pod["priorityClassName"] = settings.priority_class
    if settings.active_deadline:
        job["spec"]["activeDeadlineSeconds"] = settings.active_deadline
    if settings.platform_user:
        for field in ("runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy"):
            pod["securityContext"].pop(field, None)


def _complete_trainjob(
    trainjob: dict,
    settings: PodSettings,
    program: Program,
    name: str,
    token: str | None,
) -> None:
    """Sets in a TrainJob what its API has a place for; the rest is the runtime's."""
    for field, remedy in (
        ("env_from_secret", "Use env, or kind jobset"),
        ("active_deadline", "It is set in the runtime"),
        ("ttl", "It is set in the runtime"),
        ("platform_user", "The runtime names the user: install it with k8s/components/openshift"),
    ):
        if getattr(settings, field) != getattr(PodSettings, field):
            raise UsageError(
                f"{field} must be left out for a TrainJob, which has no such field. Received: "
                f"{field}={getattr(settings, field)!r}. {remedy}."
            )
    if settings.priority_class and not settings.queue:
        raise UsageError(
            "priority_class must be left out for a TrainJob without a queue, whose pods have that "
            f"of the runtime. Received: priority_class={settings.priority_class!r}. Use queue, too."
        )
    container: dict = trainjob["spec"].setdefault("trainer", {})
    container["numNodes"] = settings.workers
    accelerator = "gpu" if settings.gpus else "tpu" if settings.tpu else None
    if settings.image or accelerator:
        container["image"] = settings.image or f"{manifests.image()}-{accelerator}"
    args = []  # after those in the runtime's command
    if settings.gpus:
        args.append(f"--gpus={settings.gpus}")
    if settings.tpu:
        args.append("--strategy=tpu")
    container |= program.command(args)
    if variables := _environment(settings, program):
        container["env"] = variables
    devices: dict[str, int] = {_GPU: settings.gpus} if settings.gpus else {}
    (override,) = trainjob["spec"]["podTemplateOverrides"]
    pod = override["spec"]
    if chips := settings.tpu_slice():
        model, topology, devices[_TPU] = chips
        pod["nodeSelector"] = _slice_labels(model, topology)
    if settings.cpu or settings.memory or devices or settings.queue:
        # They replace the runtime's, of which a ClusterQueue seldom has a quota for all.
        memory = {"memory": settings.memory or ("8Gi" if accelerator else "2Gi")}
        container["resourcesPerNode"] = {
            "requests": {"cpu": settings.cpu or "1"} | memory | devices,
            "limits": {"cpu": settings.cpu or "2"} | memory | devices,
        }
    mounts, volumes = _volumes(settings, program, name)
    pod["containers"][0]["volumeMounts"] += mounts
    pod["volumes"] += volumes
    if token and settings.workers > 1:
        pod["volumes"].append(
            {"name": "token", "secret": {"secretName": manifests.secret_name(name)}}
        )
    if accelerator:  # As in the manifests of Jobs.
        taint = {"key": _GPU if accelerator == "gpu" else _TPU, "operator": "Exists"}
        pod["tolerations"] = [taint | {"effect": "NoSchedule"}]
    _place(pod, settings)


def _environment(settings: PodSettings, program: Program) -> list[dict]:
    path = [{"name": "PYTHONPATH", "value": MODULES}] if program.modules else []
    return [*path, *settings.variables()]


def _volumes(settings: PodSettings, program: Program, name: str) -> tuple[list[dict], list[dict]]:
    """Returns mounts and volumes for the user's files and claims."""
    mounts, volumes = [], []
    if program.modules:
        mounts.append({"name": "modules", "mountPath": MODULES, "readOnly": True})
        volumes.append({"name": "modules", "configMap": {"name": manifests.config_map_name(name)}})
    for number, (claim, path) in enumerate(settings.mounts()):
        volume = f"claim-{number}"
        mounts.append({"name": volume, "mountPath": path, "readOnly": True})
        source = {"claimName": claim, "readOnly": True}
        volumes.append({"name": volume, "persistentVolumeClaim": source})
    return mounts, volumes


def _place(pod: dict, settings: PodSettings) -> None:
    """Sets the fields that a pod and an override of a TrainJob's pods have alike."""
    if settings.image_pull_secret:
        pod["imagePullSecrets"] = [{"name": one} for one in settings.image_pull_secret]
    if settings.service_account:
        pod["serviceAccountName"] = settings.service_account
    if settings.node_selector:
        pod["nodeSelector"] = pod.get("nodeSelector", {}) | settings.node_labels()
    if settings.toleration:
        pod["tolerations"] = pod.get("tolerations", []) + settings.tolerations()


def _slice_labels(accelerator: str, topology: str) -> dict[str, str]:
    return {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology,
    }


def _set_workers(objects: list[dict], workers: int, name: str) -> None:
    """Sets the number of pods of the Jobs, where there are two."""
    jobs = list(_jobs(objects))
    if len(jobs) == 1:
        return
    for job in jobs:
        (container,) = job["spec"]["template"]["spec"]["containers"]
        for variable in container["env"]:
            if variable["name"] == "TRAINER_WORKERS":
                variable["value"] = f"1+{workers - 1}" if workers > 1 else "1"
        if job["metadata"]["name"] in (manifests.workers_job(name), "workers"):
            job["spec"] |= {"completions": workers - 1, "parallelism": workers - 1}
    if workers == 1:  # A JobSet of the chief alone.
        for one in objects:
            if one["kind"] == "JobSet":
                one["spec"]["replicatedJobs"] = one["spec"]["replicatedJobs"][:1]


def _queue(objects: Sequence[dict], settings: PodSettings, kind: manifests.Kind) -> None:
    """Has Kueue admit what trains, all of its pods or none."""
    if kind == "job" and settings.workers > 1:
        raise UsageError(
            "queue must be left out for several workers as Jobs, which Kueue admits one by one, so "
            f"that the first would wait for the second. Received: queue={settings.queue!r} and "
            f"workers={settings.workers}. Use --as jobset or --as trainjob."
        )
    for job in _jobs(objects):  # A ClusterQueue admits only what it has a quota for.
        for container in job["spec"]["template"]["spec"]["containers"]:
            for quantities in container["resources"].values():
                quantities.pop("ephemeral-storage", None)
    for one in objects:
        if one["kind"] in ("Job", "JobSet", "TrainJob"):
            one["metadata"]["labels"][QUEUE_LABEL] = settings.queue
            one["spec"]["suspend"] = True
            if kind == "trainjob" and settings.priority_class:
                one["metadata"]["labels"][_QUEUE_PRIORITY] = settings.priority_class


def _config_map(name: str, labels: Mapping[str, str], modules: Mapping[str, str]) -> dict:
    size = sum(len(text.encode()) for text in modules.values())
    if size > _CONFIG_MAP_BYTES:
        raise UsageError(
            f"module must be files of at most {_CONFIG_MAP_BYTES:,} bytes together, what a "
            f"ConfigMap can hold. Received: {size:,}. Put them into an image, or into a claim "
            "with mount_claim."
        )
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": manifests.config_map_name(name), "labels": dict(labels)},
        "data": dict(modules),
    }


def _require_secret(objects: Sequence[dict]) -> None:
    """Has the pods require the run's Secret, which is optional in the manifests."""
    for job in _jobs(objects):
        pod = job["spec"]["template"]["spec"]
        for volume in pod["volumes"]:
            volume.get("secret", {}).pop("optional", None)
        for variable in pod["containers"][0]["env"]:
            if variable["name"] == "TRAINER_TOKEN_FILE":
                variable["value"] = variable["value"].removeprefix("-")
