"""What the API server says about pods, about what trains, and about Kueue's workloads.

    pending_reason(pod)         # "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    termination(pod)            # (66, "Expected data at /nowhere. ...")

Objects are dicts, as the API server sends them.
"""

from trainer.cli import TASK


def pending_reason(pod: dict) -> str | None:
    """Returns why a pod does not run yet, as the kubelet or the scheduler reports it."""
    waiting = _container_status(pod).get("state", {}).get("waiting", {})
    if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
        return f"{waiting['reason']}: {waiting.get('message', '')}".removesuffix(": ")
    for condition in pod["status"].get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return condition.get("message") or condition.get("reason")
    return None


def queue_state(workload: dict) -> str | None:
    """Returns what Kueue does with a workload, as the rest of a sentence; None before that."""
    conditions = workload.get("status", {}).get("conditions", [])
    known = {one["type"]: one for one in conditions}
    evicted, reserved = known.get("Evicted", {}), known.get("QuotaReserved", {})
    if evicted.get("status") == "True":
        return f"is evicted from its queue: {evicted.get('message')}"
    if reserved.get("status") == "False":
        return f"waits in its queue: {reserved.get('message')}"
    if known.get("Admitted", {}).get("status") == "True":
        return "is admitted by its queue"
    return None


def is_ready(pod: dict) -> bool:
    """Tells whether the first container of a pod has passed its readiness probe."""
    return bool(_container_status(pod).get("ready"))


def final_condition(one: dict) -> dict | None:
    """Returns the condition with which a Job, a JobSet or a TrainJob has ended."""
    for condition in one.get("status", {}).get("conditions", []):
        if (
            condition["type"] in ("Complete", "Completed", "Failed")
            and condition["status"] == "True"
        ):
            return condition
    return None


def _container_status(pod: dict) -> dict:
    return next(iter(pod["status"].get("containerStatuses", [])), {})


def has_started(pod: dict) -> bool:
    """Tells whether the first container of a pod runs, or has run."""
    return not _container_status(pod).get("state", {"waiting": 1}).get("waiting")


def termination(pod: dict) -> tuple[int, str] | None:
    """Returns the exit code of a pod and its termination message; None while it has not ended."""
    status = pod["status"]
    terminated = _container_status(pod).get("state", {}).get("terminated")
    if not terminated:
        if status.get("phase") != "Failed":
            return None
        # The kubelet refused it: no container has run.
        return 1, f"{status.get('reason')}: {status.get('message')}"
    text = " ".join(terminated.get("message", "").split()) or terminated.get("reason", "")
    for prefix in (f"{TASK}: ", "error: "):
        text = text.removeprefix(prefix)
    return terminated["exitCode"], text
