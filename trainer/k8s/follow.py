"""Watches a run in a cluster until it ends, and says what a person would want to know meanwhile:
why a pod is pending, how the training goes, which pod was lost and why.

    outcome = follow(server, "digits-a1b2c", screen, stop=lambda: signals.received)
    outcome.code, outcome.text
"""

import contextlib
import json
import queue
import re
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol

from trainer.errors import StoppedError, TrainerError
from trainer.k8s.api import Change, Server
from trainer.k8s.manifests import selector

TICK = 0.2  # Seconds between two looks at whether to stop.
DRAIN = 5.0  # Seconds in which the last lines of a log come.

# What else an event says that is known from the pod itself.
_KNOWN = ("FailedScheduling", "Failed", "BackOff", "Evicted", "BackoffLimitExceeded")


class Screen(Protocol):
    """Where a person looks: ``trainer.reporting.bar.Bar`` on a terminal, lines elsewhere."""

    def say(self, text: str) -> None:
        """Writes a line that stays."""

    def show(self, place: dict, logs: dict[str, float]) -> None:
        """Shows where the run is, as ``reporting.bar.Bar.show``; ``place`` has a ``message``."""

    def set_status(self, text: str) -> None:
        """Shows what is going on, until it is replaced."""


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        code: 0, or an exit code: that of the pod that failed, of ``trainer.errors``.
        text: Why, in the pod's words or the cluster's.
        begun: Whether it had begun to train, or may have: its log could not be read.
    """

    code: int
    text: str
    begun: bool


def follow(
    server: Server,
    name: str,
    screen: Screen,
    *,
    stop: Callable[[], str | None],
    old_events: bool = True,
) -> Outcome | None:
    """Follows a run until its chief's Job is complete or one of its Jobs has failed.

    Args:
        server: Where the run is.
        name: Of the run.
        screen: Takes what there is to say.
        stop: Tells whether to leave it alone.
        old_events: Whether to say also what was wrong before this call.

    Returns:
        How it ended; None: it was told to stop.

    Raises:
        RefusedError: The server does not let this user see Jobs or pods, or no more.
    """
    watched = Watched(server, name, screen, old_events=old_events)
    try:
        watched.start()
        while not stop():
            try:
                kind, change = watched.changes.get(timeout=TICK)
            except queue.Empty:
                continue
            watched.take(kind, change)
            if watched.ended:
                return watched.outcome()
    finally:
        server.leave(watched.threads)
    return None


class Watched:
    """What is known of a run, and what was said of it."""

    def __init__(self, server: Server, name: str, screen: Screen, *, old_events: bool) -> None:
        self.server = server
        self.name = name
        self.screen = screen
        self.ended = ""  # the name of the Job that has ended it
        self.begun = False
        self.jobs: dict[str, dict] = {}
        self.pods: dict[str, dict] = {}
        self.warnings: dict[str, dict] = {}  # events by their uid
        self.lost: set[str] = set()  # the kinds of objects that cannot be watched now
        self.said: dict[tuple, str] = {}
        self.logs: dict[str, threading.Thread] = {}
        self.threads: list[threading.Thread] = []
        self.skip_events = not old_events
        self.changes: queue.SimpleQueue = queue.SimpleQueue()

    def start(self) -> None:
        """Begins to watch."""
        labels = {"label_selector": selector(self.name)}
        # Events have no labels; there are few warnings in a namespace.
        for kind, selectors in (
            ("Job", labels),
            ("Pod", labels),
            ("Event", {"field_selector": "type=Warning"}),
        ):
            self._spawn(kind, lambda kind=kind, by=selectors: self.server.changes(kind, **by))

    def _spawn(self, kind: str, source: Callable) -> threading.Thread:
        """Puts what a source yields into the queue, from a thread."""

        def put() -> None:
            try:
                for item in source():
                    self.changes.put((kind, item))
            except Exception as error:  # A thread must not end unseen.
                self.changes.put((kind, error))

        thread = threading.Thread(target=put, daemon=True)
        thread.start()
        self.threads.append(thread)
        return thread

    def take(self, kind: str, change: Change | str | Exception) -> None:
        """Takes one change, one line of the chief's log, or why there will be no more of them."""
        if isinstance(change, Exception):
            if not isinstance(change, TrainerError) or kind in ("Job", "Pod"):
                raise change
            self.begun = self.begun or kind == "log"
            self.screen.say(f"The {kind.lower()}s of {self.name} cannot be shown: {change}")
        elif isinstance(change, str):
            self._line(change)
        elif change.type == "LOST":
            if not self.lost:  # Each try has its own words.
                self.screen.say(f"The connection was lost, trying again: {change.reason}")
            self.lost.add(kind)
        else:
            self.lost.discard(kind)
            getattr(self, f"_{kind.lower()}s")(change)
            self._say_warnings()

    def _jobs(self, change: Change) -> None:
        self._update(self.jobs, change, gone=self._job_is_gone)
        for job, found in self.jobs.items():
            suspended = found["spec"].get("suspend", False)
            if suspended or ("suspended", job) in self.said:
                self._say_once(
                    ("suspended", job), f"{job} {'is suspended' if suspended else 'goes on'}"
                )
            condition = _ending(found)
            # The others' Job that is complete says nothing of the chief's.
            if condition and (job == self.name or condition["type"] == "Failed"):
                self.ended = self.ended or job

    def _job_is_gone(self, job: str) -> None:
        self.ended = self.ended or job

    def _pods(self, change: Change) -> None:
        self._update(self.pods, change, gone=self._pod_is_gone)
        for pod, found in self.pods.items():
            for condition in found["status"].get("conditions", []):
                if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
                    why = condition.get("message") or condition.get("reason")
                    self._say_once(("disrupted", pod), f"{pod} is evicted: {why}")
            if end := _end(found):
                code, text = end
                if code:
                    self._say_once(("end", pod), f"{pod} has ended with {code}: {text}")
            elif found["status"]["phase"] == "Running":
                if ("pending", pod) in self.said:
                    self._say_once(("pending", pod), f"{pod} runs on {found['spec']['nodeName']}")
            elif reason := pending(found):
                self._say_once(("pending", pod), f"{pod} is pending: {reason}")
            is_chief = found["metadata"]["labels"].get("job-name") == self.name
            if is_chief and _has_begun(found) and pod not in self.logs:
                self.logs[pod] = self._spawn("log", lambda pod=pod: self.server.log_lines(pod))

    def _pod_is_gone(self, pod: str) -> None:
        if _end(self.pods[pod]) is None:
            self.screen.say(f"{pod} is gone")

    def _events(self, change: Change) -> None:
        known = {one["metadata"]["uid"]: one for one in change.objects}
        if change.type == "DELETED":
            self.warnings = {uid: self.warnings[uid] for uid in self.warnings.keys() - known}
        elif change.type == "LISTED":
            self.warnings = known
            if self.skip_events:
                self.said |= {("old", uid): "" for uid in known}
                self.skip_events = False
        else:
            self.warnings |= known

    def _say_warnings(self) -> None:
        """Says what the cluster warns of, of this run's own objects and not of a namesake's."""
        mine = {
            one["metadata"].get("uid") for one in (*self.jobs.values(), *self.pods.values())
        } - {None}
        for uid, event in self.warnings.items():
            about, reason = event["involvedObject"], event.get("reason")
            if about.get("uid") in mine and reason not in _KNOWN and ("old", uid) not in self.said:
                message = event.get("message", "")
                text = f"{about['kind']} {about['name']}: {reason}: {message}"
                # The same of one pod after the other is the same.
                key = ("event", about["uid"], reason, re.sub(r'"[^"]*"', "", message))
                if key not in self.said:
                    self._say_once(key, text)

    def _line(self, line: str) -> None:
        """Shows a line of the chief's log: an event of ``reporting.progress``, or another."""
        try:
            event = json.loads(line)
            kind, text = event["event"], event["message"]
        except (ValueError, TypeError, KeyError):
            # The error in which the command ended: the pod's termination message has it, too.
            if not line.startswith("python -m trainer.task: "):
                self.screen.say(line)
            return
        self.begun = self.begun or kind == "start"
        if kind == "step":
            metrics = {name: event[name] for name in ("loss", "accuracy") if name in event}
            self.screen.show(event, metrics)
        elif kind != "error":
            self.screen.say(text)

    def _update(self, known: dict[str, dict], change: Change, gone: Callable[[str], None]) -> None:
        """Brings what is known to what is."""
        changed = {one["metadata"]["name"]: one for one in change.objects}
        if change.type == "DELETED":
            lost = [name for name in changed if name in known]
        else:
            lost = [name for name in known if change.type == "LISTED" and name not in changed]
            known |= changed
        for name in lost:
            gone(name)
            del known[name]

    def _say_once(self, about: tuple, text: str) -> None:
        """Says something, unless it was the last that was said about this."""
        if self.said.get(about) != text:
            self.said[about] = text
            self.screen.say(text)

    def outcome(self) -> Outcome:
        """Returns how the run ended, when what its chief wrote has been shown."""
        # The watches are not in step: the pods may have more to say.
        with contextlib.suppress(TrainerError):
            self._pods(Change("LISTED", self.server.list("Pod", selector(self.name))))
        for reader in self.logs.values():
            reader.join(DRAIN)
        while not self.changes.empty():
            self.take(*self.changes.get())
        # Whatever became of the others: the chief has its model.
        done = _ending(self.jobs.get(self.name, {}))
        if done and done["type"] == "Complete":
            return Outcome(0, "", self.begun)
        condition = _ending(self.jobs.get(self.ended, {}))
        if condition is None:
            text = f"the Job {self.ended} was deleted. Its claim keeps what was saved"
            return Outcome(StoppedError.exit_code, text, self.begun)
        ends = [
            # The reason before what followed from it, of these the last.
            (end[0] != StoppedError.exit_code, found["metadata"]["creationTimestamp"], end)
            for found in self.pods.values()
            if found["metadata"]["labels"].get("job-name") == self.ended
            and (end := _end(found))
            and end[0]
        ]
        if condition.get("reason") == "DeadlineExceeded" or not ends:
            text = f"the Job {self.ended} has failed: {condition.get('message')}"
            return Outcome(StoppedError.exit_code, text, self.begun)
        return Outcome(*max(ends)[-1], self.begun)


def pending(pod: dict) -> str | None:
    """Returns why a pod does not run, in the scheduler's words or the kubelet's."""
    waiting = _container(pod).get("state", {}).get("waiting", {})
    if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
        return f"{waiting['reason']}: {waiting.get('message', '')}".removesuffix(": ")
    for condition in pod["status"].get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return condition.get("message") or condition.get("reason")
    return None


def _ending(job: dict) -> dict | None:
    """Returns the condition in which a Job has ended."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return condition
    return None


def _container(pod: dict) -> dict:
    return next(iter(pod["status"].get("containerStatuses", [])), {})


def _has_begun(pod: dict) -> bool:
    return not _container(pod).get("state", {"waiting": 1}).get("waiting")


def _end(pod: dict) -> tuple[int, str] | None:
    """Returns the exit code of a pod and its last word."""
    ended = _container(pod).get("state", {}).get("terminated")
    if not ended:
        if pod["status"].get("phase") != "Failed":
            return None
        # It never ran: the kubelet refused it.
        status = pod["status"]
        return 1, f"{status.get('reason')}: {status.get('message')}"
    text = " ".join(ended.get("message", "").split()) or ended.get("reason", "")
    for opening in ("python -m trainer.task: ", "error: "):
        text = text.removeprefix(opening)
    return ended["exitCode"], text
