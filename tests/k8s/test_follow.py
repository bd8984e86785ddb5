"""What is said of a run, from what the API server sends; ``tests/cluster`` has the real thing."""

import pytest

from trainer.k8s.api import Change, RefusedError
from trainer.k8s.follow import Watched
from trainer.log_lines import json_line


class Screen:
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)

    def show(self, place, logs):
        self.place = place


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
    return Watched(Server(), "mine", Screen(), old_events=True)


def job(name="mine", condition=None, **spec):
    conditions = [{"status": "True", **condition}] if condition else []
    return {
        "metadata": {"name": name, "uid": f"uid of {name}"},
        "spec": spec,
        "status": {"conditions": conditions},
    }


def pod(name, *, of="mine", code=None, word="", created="2026-01-01T00:00:00Z", **status):
    status.setdefault("phase", "Running" if code is None else "Failed")
    if code is not None:
        ended = {"exitCode": code, "message": word}
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


def test_the_chiefs_job_ends_the_run_and_the_others_success_does_not(run):
    run.take("Job", Change("LISTED", [job(), job("mine-workers", {"type": "Complete"})]))
    assert not run.ended
    run.take("Job", Change("MODIFIED", [job(condition={"type": "Complete"})]))
    assert run.ended == "mine"
    assert run.outcome()[:2] == (0, "")


def test_the_chiefs_model_counts_whatever_became_of_the_others(run):
    listed = [job(condition={"type": "Complete"}), job("mine-workers", FAILED)]
    run.take("Job", Change("LISTED", listed[::-1]))
    assert run.outcome().code == 0


def test_the_code_is_that_of_the_reason_and_not_of_what_followed(run):
    stopped = pod("a", code=75, word="stopped by SIGTERM")
    wrong = pod("b", code=66, word="python -m trainer.task: error: Expected data.\n")
    run.server.pods = [wrong, stopped]
    run.take("Job", Change("LISTED", [job(condition=FAILED)]))
    assert run.outcome()[:2] == (66, "Expected data.")


def test_a_pod_that_the_kubelet_refused_is_a_reason(run):
    refused = {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": "no devices"}
    run.server.pods = [pod("a", **refused)]
    run.take("Job", Change("LISTED", [job(condition=FAILED)]))
    assert run.outcome()[:2] == (1, "UnexpectedAdmissionError: no devices")
    assert run.screen.lines == ["a has ended with 1: UnexpectedAdmissionError: no devices"]


def test_a_run_that_took_too_long_can_be_gone_on_with(run):
    late = {"type": "Failed", "reason": "DeadlineExceeded", "message": "longer than a day"}
    run.server.pods = [pod("a", code=137)]
    run.take("Job", Change("LISTED", [job(condition=late)]))
    assert run.outcome()[:2] == (75, "the Job mine has failed: longer than a day")


def test_a_job_that_is_deleted_ends_it(run):
    run.take("Job", Change("LISTED", [job()]))
    run.take("Job", Change("DELETED", [job()]))
    assert run.outcome().code == 75


def test_what_a_pod_waits_for_is_said_once(run):
    waits = pod("a", phase="Pending")
    why = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available"}
    waits["status"]["conditions"] = [why]
    for _ in range(2):
        run.take("Pod", Change("LISTED", [waits]))
    run.take("Pod", Change("MODIFIED", [pod("a")]))
    run.take("Pod", Change("DELETED", [pod("a")]))
    assert run.screen.lines == [
        "a is pending: 0/1 nodes are available",
        "a runs on node-1",
        "a is gone",
    ]


def test_suspending_and_going_on_are_said(run):
    for suspend in (False, True, True, False):
        run.take("Job", Change("MODIFIED", [job(suspend=suspend)]))
    assert run.screen.lines == ["mine is suspended", "mine goes on"]


def test_a_warning_is_said_once_and_none_of_another_run(run):
    quota = 'pods "mine-{}" is forbidden: exceeded quota'
    warnings = [
        warning("1", "mine", "FailedCreate", quota.format("abc")),
        warning("2", "mine", "FailedCreate", quota.format("xyz")),
        warning("3", "mine-2", "FailedCreate", quota.format("2")),
    ]
    run.take("Event", Change("LISTED", warnings))
    assert run.screen.lines == []  # It is not known yet whose they are.
    run.take("Job", Change("LISTED", [job()]))
    run.take("Event", Change("LISTED", warnings))
    assert run.screen.lines == [f"Job mine: FailedCreate: {quota.format('abc')}"]


def test_the_log_is_shown_as_a_terminal_would_have(run):
    run.take("log", json_line("start", "60,000 images"))
    run.take("log", json_line("step", "epoch 1/2", epoch=1, step=3, loss=0.5))
    end = "python -m trainer.task: error: in the termination message, too"
    for line in ("not JSON", "[1]", end, json_line("error", end, severity="ERROR")):
        run.take("log", line)
    assert run.screen.lines == ["60,000 images", "not JSON", "[1]"]
    assert run.screen.place["step"] == 3
    assert run.begun


def test_a_lost_connection_is_said_once_for_all_watches(run):
    for kind in ("Job", "Pod", "Event"):
        run.take(kind, Change("LOST", [], f"in the words of {kind}s"))
    run.take("Job", Change("LISTED", [job()]))
    run.take("Pod", Change("LOST", [], "once more"))
    for kind in ("Pod", "Event"):
        run.take(kind, Change("LISTED", []))
    run.take("Pod", Change("LOST", [], "another time"))
    lost = "The connection was lost, trying again: "
    assert run.screen.lines == [f"{lost}in the words of Jobs", f"{lost}another time"]


def test_who_may_not_see_events_or_logs_is_told_and_who_may_not_see_pods_cannot_follow(run):
    run.take("Event", RefusedError("403"))
    assert not run.begun
    run.take("log", RefusedError("403"))
    assert run.begun  # for all that is known
    assert run.screen.lines == [
        "The events of mine cannot be shown: 403",
        "The logs of mine cannot be shown: 403",
    ]
    with pytest.raises(RefusedError):
        run.take("Pod", RefusedError("403"))
