"""Follows a run in a cluster to its end: why a pod is pending, how the training goes, which pod was
lost and why.

    outcome = follow(server, "digits-a1b2c", screen, stop=lambda: signals.received)
    outcome.code, outcome.text
"""

import contextlib
import functools
import json
import queue
import re
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from trainer.cli import TASK
from trainer.errors import StoppedError, TrainerError
from trainer.k8s.api import Change, Kind, Server
from trainer.k8s.manifests import Root, selector
from trainer.k8s.status import (
    final_condition,
    has_started,
    pending_reason,
    queue_state,
    termination,
)

POLL_SECONDS = 0.2  # between two looks at the signals
DRAIN_SECONDS = 5.0  # for the last lines of a log to arrive

# Reasons of events that repeat the status of the pod or the Job.
_KNOWN_FROM_STATUS = ("FailedScheduling", "Failed", "BackOff", "Evicted", "BackoffLimitExceeded")


class Screen(Protocol):
    """Where output goes: ``trainer.reporting.bar.Bar`` on a terminal, else plain lines."""

    def say(self, text: str) -> None:
        """Writes a line."""

    def show(self, position: dict, metrics: dict[str, float]) -> None:
        """Shows how far the run is, as ``Bar.show`` does; ``position`` also has a ``message``."""

    def set_status(self, text: str) -> None:
        """Shows what is going on, until the next call."""


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        code: 0, or the exit code of the pod that failed (``trainer.errors`` lists them).
        text: The pod's termination message, or the reason that the cluster gives.
        started: Whether training had started, or may have: the log could not be read.
    """

    code: int
    text: str
    started: bool


def follow(
    server: Server,
    name: str,
    screen: Screen,
    *,
    stop: Callable[[], str | None],
    root: Root | None = None,
    past_events: bool = True,
) -> Outcome | None:
    """Follows a run until what trains is complete or has failed: the chief's Job or one of its
    Jobs, the JobSet or the TrainJob.

    Args:
        server: The namespace of the run.
        name: Name of the run.
        screen: Shows what happens.
        root: What trains; None: a Job.
        stop: Returns the name of a signal once one was received.
        past_events: Whether to show warnings from before this call, too.

    Returns:
        How the run ended; None after ``stop``.

    Raises:
        RefusedError: The user may not watch Jobs or pods, or no longer.
    """
    follower = Follower(server, name, screen, root=root, past_events=past_events)
    try:
        follower.start()
        while not stop():
            try:
                source, item = follower.queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            follower.handle(source, item)
            if follower.ended_by:
                return follower.outcome()
    finally:
        server.close(follower.threads)
    return None


class Follower:
    """The state of a run as its watches report it, and which changes were shown already."""

    def __init__(
        self,
        server: Server,
        name: str,
        screen: Screen,
        *,
        root: Root | None = None,
        past_events: bool,
    ) -> None:
        self.server = server
        self.name = name
        self.screen = screen
        self.root = root or Root.of("job", name)
        self.ended_by = ""  # name of the Job, or of the other root, that has ended the run
        self.started = False
        self.jobs: dict[str, dict] = {}
        self.roots: dict[str, dict] = {}  # the JobSet or TrainJob by its name
        self.workloads: dict[str, dict] = {}  # Kueue's
        self.pods: dict[str, dict] = {}
        self.warnings: dict[str, dict] = {}  # events by their uid
        self.disconnected: set[str] = set()  # the kinds whose watch is cut off
        self.shown: dict[tuple, str] = {}  # the last text by subject
        self.logs: dict[str, threading.Thread] = {}
        self.threads: list[threading.Thread] = []
        self.skip_events = not past_events
        self.queue: queue.SimpleQueue = queue.SimpleQueue()

    def start(self) -> None:
        """Watches Jobs, pods and events, each in a thread that fills the queue."""
        # Events have no labels to select by; a namespace has few warnings.
        watches: dict[Kind, dict[str, str]] = {
            "Job": {"label_selector": self.root.jobs},
            "Pod": {"label_selector": selector(self.name)},
            "Event": {"field_selector": "type=Warning"},
        }
        if self.root.kind != "Job":
            watches[self.root.kind] = {"field_selector": f"metadata.name={self.name}"}
        if self.root.queued and self.server.serves("Workload"):
            watches["Workload"] = {}
        for kind, selectors in watches.items():
            self._spawn(kind, functools.partial(self.server.changes, kind, **selectors))

    def _spawn(
        self, source: str, iterate: Callable[[], Iterator[Change | str]]
    ) -> threading.Thread:
        """Starts a thread that puts what an iterator yields into the queue."""

        def fill() -> None:
            try:
                for item in iterate():
                    self.queue.put((source, item))
            except Exception as error:  # The main thread raises it.
                self.queue.put((source, error))

        thread = threading.Thread(target=fill, daemon=True)
        thread.start()
        self.threads.append(thread)
        return thread

    def handle(self, source: str, item: Change | str | Exception) -> None:
        """Handles an item of the queue.

        Args:
            source: The kind of the objects of a watch; or ``log``, the log of the chief.
            item: A change, a line of the log, or the error that ended the source.
        """
        if isinstance(item, Exception):
            if not isinstance(item, TrainerError) or source in ("Job", "Pod"):
                raise item
            self.started = self.started or source == "log"
            self.screen.say(f"The {source.lower()}s of {self.name} cannot be shown: {item}")
        elif isinstance(item, str):
            self._handle_line(item)
        elif item.type == "LOST":
            if not self.disconnected:  # Once, though every watch has its own error.
                self.screen.say(f"The connection was lost, trying again: {item.reason}")
            self.disconnected.add(source)
        else:
            self.disconnected.discard(source)
            handlers = {
                "Job": self._handle_jobs,
                "JobSet": self._handle_root,
                "TrainJob": self._handle_root,
                "Pod": self._handle_pods,
                "Event": self._handle_events,
                "Workload": self._handle_workloads,
            }
            handlers[source](item)
            self._show_warnings()
            self._show_queue()

    def _handle_jobs(self, change: Change) -> None:
        if self.root.kind != "Job":  # They come and go with each restart.
            self._update(self.jobs, change, deleted=lambda name: None)
            return
        self._update(self.jobs, change, deleted=self._root_deleted)
        for name, job in self.jobs.items():
            self._show_suspended(name, job)
            condition = final_condition(job)
            # The chief has still to save the model when the other workers' Job is complete.
            if condition and (name == self.name or condition["type"] == "Failed"):
                self.ended_by = self.ended_by or name

    def _handle_root(self, change: Change) -> None:
        self._update(self.roots, change, deleted=self._root_deleted)
        for name, one in self.roots.items():
            self._show_suspended(name, one)
            if restarts := one.get("status", {}).get("restarts"):
                self._show_once(("restarts", name), f"{name} is restarted ({restarts})")
            if final_condition(one):
                self.ended_by = name

    def _root_deleted(self, name: str) -> None:
        self.ended_by = self.ended_by or name

    def _show_suspended(self, name: str, one: dict) -> None:
        suspended = one["spec"].get("suspend", False)
        if suspended or ("suspended", name) in self.shown:
            state = "is suspended" if suspended else "is resumed"
            self._show_once(("suspended", name), f"{name} {state}")

    def _handle_workloads(self, change: Change) -> None:
        self._update(self.workloads, change, deleted=lambda name: None)

    def _show_queue(self) -> None:
        """Shows why Kueue has not admitted the run yet, or has taken its place back."""
        uids = {one["metadata"].get("uid") for one in (*self.jobs.values(), *self.roots.values())}
        for workload in self.workloads.values():
            owners = workload["metadata"].get("ownerReferences", [])
            if uids.isdisjoint(owner["uid"] for owner in owners):
                continue
            if state := queue_state(workload):
                self._show_once(("queue",), f"{self.name} {state}")

    def _handle_pods(self, change: Change) -> None:
        self._update(self.pods, change, deleted=self._pod_deleted)
        for name, pod in self.pods.items():
            for condition in pod["status"].get("conditions", []):
                if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
                    reason = condition.get("message") or condition.get("reason")
                    self._show_once(("disrupted", name), f"{name} is evicted: {reason}")
            if ended := termination(pod):
                code, text = ended
                if code:
                    self._show_once(("ended", name), f"{name} has ended with {code}: {text}")
            elif pod["status"]["phase"] == "Running":
                if ("pending", name) in self.shown:
                    self._show_once(("pending", name), f"{name} runs on {pod['spec']['nodeName']}")
            elif reason := pending_reason(pod):
                self._show_once(("pending", name), f"{name} is pending: {reason}")
            if self._is_chief(pod) and has_started(pod) and name not in self.logs:
                self.logs[name] = self._spawn("log", functools.partial(self.server.log_lines, name))

    def _is_chief(self, pod: dict) -> bool:
        labels = pod["metadata"]["labels"]
        index = labels.get("batch.kubernetes.io/job-completion-index", "0")
        return labels.get("job-name") == self.root.chief and index == "0"

    def _pod_deleted(self, name: str) -> None:
        if termination(self.pods[name]) is None:
            self.screen.say(f"{name} is deleted")

    def _handle_events(self, change: Change) -> None:
        events = {event["metadata"]["uid"]: event for event in change.objects}
        if change.type == "DELETED":
            self.warnings = {uid: self.warnings[uid] for uid in self.warnings.keys() - events}
        elif change.type == "LISTED":
            self.warnings = events
            if self.skip_events:
                self.shown |= {("skipped", uid): "" for uid in events}
                self.skip_events = False
        else:
            self.warnings |= events

    def _show_warnings(self) -> None:
        """Shows the warnings about this run's objects, matched by uid, since names recur."""
        uids = {
            one["metadata"].get("uid")
            for one in (*self.jobs.values(), *self.roots.values(), *self.pods.values())
        } - {None}
        for uid, event in self.warnings.items():
            about, reason = event["involvedObject"], event.get("reason")
            if about.get("uid") not in uids or reason in _KNOWN_FROM_STATUS:
                continue
            message = event.get("message", "")
            # The same message about the next pod is no news.
            subject = ("event", about["uid"], reason, re.sub(r'"[^"]*"', "", message))
            if subject not in self.shown and ("skipped", uid) not in self.shown:
                text = f"{about['kind']} {about['name']}: {reason}: {message}"
                self._show_once(subject, text)

    def _handle_line(self, line: str) -> None:
        """Shows a line of the chief's log. The error in which the command ended is left out: the
        pod's termination message is the same.
        """
        try:
            entry = json.loads(line)
            event, message = entry["event"], entry["message"]
        except (ValueError, TypeError, KeyError):  # not a line of trainer.log_lines
            self.started = True  # A script's.
            if not line.startswith(f"{TASK}: "):
                self.screen.say(line)
            return
        self.started = self.started or event == "start"
        if event == "step":
            metrics = {name: entry[name] for name in ("loss", "accuracy") if name in entry}
            self.screen.show(entry, metrics)
        elif event != "error":
            self.screen.say(message)

    def _update(
        self, known: dict[str, dict], change: Change, deleted: Callable[[str], None]
    ) -> None:
        """Applies a change to the objects known by name."""
        objects = {one["metadata"]["name"]: one for one in change.objects}
        if change.type == "DELETED":
            gone = [name for name in objects if name in known]
        else:
            gone = [name for name in known if change.type == "LISTED" and name not in objects]
            known |= objects
        for name in gone:
            deleted(name)
            del known[name]

    def _show_once(self, subject: tuple, text: str) -> None:
        """Shows a text, unless it is the last one that was shown about its subject."""
        if self.shown.get(subject) != text:
            self.shown[subject] = text
            self.screen.say(text)

    def outcome(self) -> Outcome:
        """Returns how the run ended, after showing the rest of the chief's log."""
        # The watches are independent: that of the pods may be behind that of the Jobs.
        with contextlib.suppress(TrainerError):
            self._handle_pods(Change("LISTED", self.server.list("Pod", selector(self.name))))
        for thread in self.logs.values():
            thread.join(DRAIN_SECONDS)
        while not self.queue.empty():
            self.handle(*self.queue.get())
        # Whatever became of the other workers, the chief has saved the model.
        roots = self.jobs if self.root.kind == "Job" else self.roots
        chief = final_condition(roots.get(self.name, {}))
        if chief and chief["type"] != "Failed":
            return Outcome(0, "", self.started)
        condition = final_condition(roots.get(self.ended_by, {}))
        if condition is None:
            text = (
                f"the {self.root.kind} {self.ended_by} was deleted. The PersistentVolumeClaim "
                f"{self.name} keeps the checkpoints"
            )
            return Outcome(StoppedError.exit_code, text, self.started)
        terminations = [
            # An error before the 75 that it causes elsewhere, and of several the latest.
            (
                ended[0] != StoppedError.exit_code,
                pod["metadata"]["creationTimestamp"],
                ended,
            )
            for pod in self.pods.values()
            if (
                self.root.kind != "Job"
                or pod["metadata"]["labels"].get("job-name") == self.ended_by
            )
            and (ended := termination(pod))
            and ended[0]
        ]
        if condition.get("reason") == "DeadlineExceeded" or not terminations:
            text = f"the {self.root.kind} {self.ended_by} has failed: {condition.get('message')}"
            return Outcome(StoppedError.exit_code, text, self.started)
        return Outcome(*max(terminations)[-1], self.started)
