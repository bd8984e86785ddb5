"""What is shown of a run, given what the API server sends; ``tests/cluster`` has a real one."""

import pytest

from trainer.k8s import manifests
from trainer.k8s.api import Change, RefusedError
from trainer.k8s.follow import Follower
from trainer.log_lines import json_line


class Screen:
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    def show(self, position, metrics):
        self.position = position


class Server:
    """Knows the pods that it is given, which have written nothing."""

    def __init__(self):
        self.pods = []

    def list(self, kind, selector):
        assert selector == ("app.kubernetes.io/name=digits-trainer,app.kubernetes.io/instance=mine")
        return self.pods

    def log_lines(self, pod):
        return iter(())


@pytest.fixture
def run():
    return Follower(Server(), "mine", Screen(), past_events=True)


def job(name="mine", condition=None, **spec):
    conditions = [{"status": "True", **condition}] if condition else []
    return {
        "metadata": {"name": name, "uid": f"uid of {name}"},
        "spec": spec,
        "status": {"conditions": conditions},
    }


def pod(name, *, of="mine", code=None, termination="", created="2026-01-01T00:00:00Z", **status):
    status.setdefault("phase", "Running" if code is None else "Failed")
    if code is not None:
        ended = {"exitCode": code, "message": termination}
        status["containerStatuses"] = [{"state": {"terminated": ended}}]
    return {
        "metadata": {
            "name": name,
            "uid": f"uid of {name}",
            "labels": {"job-name": of},
            "creationTimestamp": created,
        },
        "spec": {"nodeName": "node-1"},
        "status": status,
    }


def warning(uid, about, reason, message):
    involved = {"kind": "Job", "name": about, "uid": f"uid of {about}"}
    return {
        "metadata": {"name": uid, "uid": uid},
        "involvedObject": involved,
        "reason": reason,
        "message": message,
    }


FAILED = {"type": "Failed", "reason": "PodFailurePolicy", "message": "by its policy"}


def test_the_chiefs_job_ends_the_run_and_that_of_the_other_workers_does_not(run):
    run.handle("Job", Change("LISTED", [job(), job("mine-workers", {"type": "Complete"})]))
    assert not run.ended_by
    run.handle("Job", Change("MODIFIED", [job(condition={"type": "Complete"})]))
    assert run.ended_by == "mine"
    assert run.outcome()[:2] == (0, "")


def test_a_run_whose_chief_is_complete_succeeded_whatever_became_of_the_other_workers(run):
    listed = [job(condition={"type": "Complete"}), job("mine-workers", FAILED)]
    run.handle("Job", Change("LISTED", listed[::-1]))
    assert run.outcome().code == 0


def test_the_exit_code_is_that_of_the_error_and_not_of_the_75_it_caused(run):
    stopped = pod("a", code=75, termination="stopped by SIGTERM")
    wrong = pod("b", code=66, termination="python -m trainer.task: error: Expected data.\n")
    run.server.pods = [wrong, stopped]
    run.handle("Job", Change("LISTED", [job(condition=FAILED)]))
    assert run.outcome()[:2] == (66, "Expected data.")


def test_a_pod_that_the_kubelet_refused_fails_the_run(run):
    refused = {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "no devices"}
    run.server.pods = [pod("a", **refused)]
    run.handle("Job", Change("LISTED", [job(condition=FAILED)]))
    assert run.outcome()[:2] == (1, "UnexpectedAdmissionError: no devices")
    assert run.screen.lines == ["a has ended with 1: UnexpectedAdmissionError: no devices"]


def test_a_run_past_its_deadline_can_be_resumed(run):
    late = {"type": "Failed", "reason": "DeadlineExceeded", "message": "longer than a day"}
    run.server.pods = [pod("a", code=137)]
    run.handle("Job", Change("LISTED", [job(condition=late)]))
    assert run.outcome()[:2] == (75, "the Job mine has failed: longer than a day")


def test_a_deleted_job_ends_the_run(run):
    run.handle("Job", Change("LISTED", [job()]))
    run.handle("Job", Change("DELETED", [job()]))
    assert run.outcome().code == 75


def test_the_reason_why_a_pod_is_pending_is_shown_once(run):
    waits = pod("a", phase="Pending")
    why = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available"}
    waits["status"]["conditions"] = [why]
    for _ in range(2):
        run.handle("Pod", Change("LISTED", [waits]))
    run.handle("Pod", Change("MODIFIED", [pod("a")]))
    run.handle("Pod", Change("DELETED", [pod("a")]))
    assert run.screen.lines == [
        "a is pending: 0/1 nodes are available",
        "a runs on node-1",
        "a is deleted",
    ]


def test_suspending_and_resuming_are_shown(run):
    for suspend in (False, True, True, False):
        run.handle("Job", Change("MODIFIED", [job(suspend=suspend)]))
    assert run.screen.lines == ["mine is suspended", "mine is resumed"]


def test_a_warning_is_shown_once_and_none_of_another_run(run):
    quota = 'pods "mine-{}" is forbidden: exceeded quota'
    warnings = [
        warning("1", "mine", "FailedCreate", quota.format("abc")),
        warning("2", "mine", "FailedCreate", quota.format("xyz")),
        warning("3", "mine-2", "FailedCreate", quota.format("2")),
    ]
    run.handle("Event", Change("LISTED", warnings))
    assert run.screen.lines == []  # The objects they are about are not known yet.
    run.handle("Job", Change("LISTED", [job()]))
    run.handle("Event", Change("LISTED", warnings))
    assert run.screen.lines == [f"Job mine: FailedCreate: {quota.format('abc')}"]


def test_the_chiefs_log_is_shown_as_on_a_terminal(run):
    run.handle("log", json_line("start", "60,000 images"))
    run.handle("log", json_line("step", "epoch 1/2", epoch=1, step=3, loss=0.5))
    end = "python -m trainer.task: error: in the termination message, too"
    for line in ("not JSON", "[1]", end, json_line("error", end, severity="ERROR")):
        run.handle("log", line)
    assert run.screen.lines == ["60,000 images", "not JSON", "[1]"]
    assert run.screen.position["step"] == 3
    assert run.started


def test_a_lost_connection_is_reported_once_for_all_watches(run):
    for kind in ("Job", "Pod", "Event"):
        run.handle(kind, Change("LOST", [], f"in the words of {kind}s"))
    run.handle("Job", Change("LISTED", [job()]))
    run.handle("Pod", Change("LOST", [], "once more"))
    for kind in ("Pod", "Event"):
        run.handle(kind, Change("LISTED", []))
    run.handle("Pod", Change("LOST", [], "another time"))
    lost = "The connection was lost, trying again: "
    assert run.screen.lines == [f"{lost}in the words of Jobs", f"{lost}another time"]


def test_permissions_for_events_and_logs_may_be_missing_and_for_pods_may_not(run):
    run.handle("Event", RefusedError("403"))
    assert not run.started
    run.handle("log", RefusedError("403"))
    assert run.started  # It may have.
    assert run.screen.lines == [
        "The events of mine cannot be shown: 403",
        "The logs of mine cannot be shown: 403",
    ]
    with pytest.raises(RefusedError):
        run.handle("Pod", RefusedError("403"))


# A JobSet, a TrainJob, and Kueue.


def root(*conditions, name="mine", restarts=0, **spec):
    return {
        "metadata": {"name": name, "uid": f"uid of {name}"},
        "spec": spec,
        "status": {
            "restarts": restarts,
            "conditions": [{"status": "True", **one} for one in conditions],
        },
    }


@pytest.fixture(params=["jobset", "trainjob"])
def other(request):
    kind = manifests.Root.of(request.param, "mine", queued=True)
    return Follower(Server(), "mine", Screen(), root=kind, past_events=True)


def test_jobs_of_a_jobset_may_fail_and_come_again(other):
    other.handle(other.root.kind, Change("LISTED", [root()]))
    other.handle("Job", Change("LISTED", [job("mine-chief-0", FAILED)]))
    other.handle("Job", Change("DELETED", [job("mine-chief-0")]))
    assert not other.ended_by
    other.handle(other.root.kind, Change("MODIFIED", [root(restarts=1)]))
    assert other.screen.lines == ["mine is restarted (1)"]
    completed = {"type": {"JobSet": "Completed", "TrainJob": "Complete"}[other.root.kind]}
    other.handle(other.root.kind, Change("MODIFIED", [root(completed, restarts=1)]))
    assert other.ended_by == "mine"
    assert other.outcome()[:2] == (0, "")


def test_a_failed_jobset_has_the_error_of_any_of_its_pods(other):
    stopped = pod("a", of="mine-chief-0", code=75, termination="stopped by SIGTERM")
    wrong = pod("b", of="mine-workers-0", code=65, termination="error: Expected digits.")
    other.server.pods = [wrong, stopped]
    failed = {"type": "Failed", "reason": "FailedJobs", "message": "jobset failed"}
    other.handle(other.root.kind, Change("LISTED", [root(failed)]))
    assert other.outcome()[:2] == (65, "Expected digits.")


def test_a_deleted_jobset_ends_the_run(other):
    other.handle(other.root.kind, Change("LISTED", [root()]))
    other.handle(other.root.kind, Change("DELETED", [root()]))
    outcome = other.outcome()
    assert outcome.code == 75
    assert f"the {other.root.kind} mine was deleted" in outcome.text


def test_the_log_is_that_of_the_first_pod_of_the_chiefs_job(other):
    first = pod("mine-node-0-0-x", of=other.root.chief, phase="Running")
    first["status"]["containerStatuses"] = [{"state": {"running": {}}}]
    second, third = (pod(name, of=other.root.chief, phase="Running") for name in ("b", "c"))
    for one, index in ((first, "0"), (second, "1")):
        one["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] = index
        one["status"]["containerStatuses"] = [{"state": {"running": {}}}]
    third["metadata"]["labels"]["job-name"] = "mine-workers-0"
    third["status"]["containerStatuses"] = [{"state": {"running": {}}}]
    other.handle("Pod", Change("LISTED", [third, second, first]))
    assert list(other.logs) == ["mine-node-0-0-x"]


def workload(owner, *conditions):
    return {
        "metadata": {"name": "w", "ownerReferences": [{"uid": f"uid of {owner}"}]},
        "spec": {},
        "status": {"conditions": conditions},
    }


def condition(kind, status, message=""):
    return {"type": kind, "status": status, "message": message}


def test_what_a_queue_does_is_shown_once_and_that_of_others_never(other):
    waiting = condition("QuotaReserved", "False", "LocalQueue q doesn't exist")
    strange = workload("another", condition("QuotaReserved", "False", "no quota"))
    other.handle("Workload", Change("LISTED", [strange, workload("mine", waiting)]))
    assert other.screen.lines == []  # Whose it is, is not known yet.
    other.handle(other.root.kind, Change("LISTED", [root(suspend=True)]))
    strange["metadata"]["name"] = "s"
    admitted = workload(
        "mine", condition("QuotaReserved", "True"), condition("Admitted", "True", "admitted")
    )
    evicted = workload(
        "mine",
        condition("QuotaReserved", "False", "Preempted"),
        condition("Evicted", "True", "Preempted to accommodate a workload"),
    )
    for one in (workload("mine", waiting), admitted, admitted, strange, evicted):
        other.handle("Workload", Change("MODIFIED", [one]))
    assert other.screen.lines == [
        "mine is suspended",
        "mine waits in its queue: LocalQueue q doesn't exist",
        "mine is admitted by its queue",
        "mine is evicted from its queue: Preempted to accommodate a workload",
    ]


def test_a_line_that_is_no_json_is_a_scripts_which_has_started(run):
    run.handle("log", "epoch 1, loss 0.3")
    assert run.screen.lines == ["epoch 1, loss 0.3"]
    assert run.started
