"""Trains in a Kubernetes cluster, and brings home what comes out.

    python -m trainer.submit --image registry.example/digits-trainer:0.1.0 --workers 2 -- --epochs 2

The flags after ``--`` are those of ``python -m trainer.task``. The objects are those of ``k8s/``;
Ctrl-C leaves them to go on, and ``--attach`` comes back to them.
"""

import contextlib
import dataclasses
import json
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import cli, errors
from trainer.config import TrainConfig
from trainer.errors import (
    ConfigurationError,
    DataError,
    InputError,
    OutputError,
    StoppedError,
    TrainerError,
    UsageError,
)
from trainer.files import (
    MANIFEST_FILE,
    MODEL_FILE,
    REPORT_FILES,
    lock_output_dir,
    remove_files,
    write_files,
)
from trainer.k8s import manifests
from trainer.signals import Signals

if TYPE_CHECKING:  # --help loads neither.
    from trainer.k8s.api import Kind, Server
    from trainer.k8s.follow import Screen

PROG = "python -m trainer.submit"
TASK = "python -m trainer.task"

_OWN = ("--output-dir", "--log-format", "--gpus")  # what the manifests say to the task

# What this command makes in the cluster bears this label, and it deletes nothing else. In the order
# to delete it in; the claim, with the model, last.
_MADE = {"app.kubernetes.io/managed-by": "trainer.submit"}
_KINDS: tuple["Kind", ...] = ("Job", "Service", "NetworkPolicy", "PersistentVolumeClaim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Trains in a Kubernetes cluster; the flags of python -m trainer.task follow --.

    Raises:
        UsageError: A value is outside its range.
    """

    image: str | None = None
    """The trainer's image, as the cluster's nodes can
    pull it. None: digits-trainer of this version, which
    was loaded into them."""

    workers: int = 1
    """How many pods train together."""

    gpus: int = 0
    """GPUs of each pod."""

    namespace: str | None = None
    """Where in the cluster. None: the context's."""

    context: str | None = None
    """Which of the kubeconfig file's. None: its current
    one."""

    output_dir: Path = Path()
    """Folder for mnist.h5, history.json and mnist.json;
    created where it does not exist."""

    name: str | None = None
    """The run's, which begins the name of each object.
    None: a new one. That of a run whose claim was kept
    goes on with its checkpoints."""

    attach: str | None = None
    """Start nothing: follow the run of this name, and
    fetch its files."""

    keep: bool = False
    """Leave everything in the cluster at the end."""

    dry_run: bool = False
    """Print the manifests as YAML, and do nothing."""

    def __post_init__(self) -> None:
        for field, least in (("workers", 1), ("gpus", 0)):
            if getattr(self, field) < least:
                raise UsageError(
                    f"{field} must be at least {least}. Received: {field}={getattr(self, field)}. "
                    f"Use {getattr(SubmitConfig, field)}, the default."
                )
        # What all names made of it allow: a Service's begins with a letter, a pod's host name
        # has 63 characters, "-workers-" and a number among them.
        for field in ("name", "attach"):
            value = getattr(self, field)
            if value is not None and not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", value):
                raise UsageError(
                    f"{field} must be at most 40 lower-case letters, digits and hyphens, a letter "
                    f"first. Received: {field}={value!r}. Leave it out for a new run."
                )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, which is that of the run in the cluster."""
    own, flags = cli.split(argv)
    return cli.run(PROG, SubmitConfig, lambda config: submit(config, flags), own)


def submit(config: SubmitConfig, flags: Sequence[str]) -> None:
    """Starts a run in the cluster, or comes back to one, and follows it to its end.

    Args:
        config: Which run, and where.
        flags: Those of ``python -m trainer.task``.

    Raises:
        UsageError: A flag is wrong; then nothing is started.
        ConfigurationError: The cluster cannot be reached, or refuses.
        StoppedError: A signal came; the run goes on without this command.
        TrainerError: The run failed; by the exit code of its pod.
    """
    _check(config, flags)
    name = config.attach or config.name or f"digits-{secrets.token_hex(3)}"
    if not config.attach:
        objects = manifests.build(
            name, image=config.image, workers=config.workers, gpus=config.gpus, flags=flags
        )
    if config.dry_run:
        for one in objects if config.namespace else ():
            one["metadata"]["namespace"] = config.namespace
        print(manifests.dump(objects), end="")
        return

    from trainer.k8s.api import Server

    with lock_output_dir(config.output_dir), Signals() as signals:
        server = Server(context=config.context, namespace=config.namespace)
        signals.defer()
        with _screen() as screen:
            run = _Submitted(config, server, name, screen, lambda: signals.received)
            if config.attach:
                run.attach()
            else:
                run.start(objects)


def _check(config: SubmitConfig, flags: Sequence[str]) -> None:
    """Finds what is wrong before anything is started."""
    for flag in flags:
        word = flag.split("=")[0].replace("_", "-")  # Both are understood.
        if word in _OWN:
            raise UsageError(
                f"Expected {word} before --: it is this command's. Received: it "
                "among the flags of the training. --output-dir names the folder here, --gpus the "
                "GPUs of each pod; the log is JSON."
            )
    cli.parse(TASK, TrainConfig, flags)
    if config.attach and (flags or config.name or config.dry_run):
        raise UsageError(
            "Expected --attach without --name, --dry-run and flags of the training: the run has "
            f"begun. Received: {' '.join(flags) or '--name or --dry-run'}. Leave them out."
        )


@contextlib.contextmanager
def _screen() -> "Iterator[Screen]":
    from rich.console import Console

    from trainer.reporting.bar import Bar

    if Console().is_terminal:
        with Bar(sys.stdout) as bar:
            yield bar
    else:
        yield _Lines()


class _Lines:
    """What ``trainer.reporting.bar.Bar`` is on a terminal, for a pipe: the lines alone."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def show(self, place: dict, logs: dict[str, float]) -> None:
        self.say(place["message"])

    def set_status(self, text: str) -> None:
        pass


class _Submitted:
    """A run in the cluster, and what this command does with it."""

    def __init__(
        self,
        config: SubmitConfig,
        server: "Server",
        name: str,
        screen: "Screen",
        stop: Callable[[], str | None],
    ) -> None:
        self.config = config
        self.server = server
        self.name = name
        self.screen = screen
        self.stop = stop
        self.image = config.image or manifests.image()
        self.created: list[tuple[Kind, str]] = []
        where = f"--namespace {server.namespace}"
        if config.context:
            where += f" --context {config.context}"
        self.how_to_delete = (
            f"kubectl delete jobs,services,networkpolicies,pvc {where} "
            f"-l {manifests.selector(name)}"
        )
        self.how_to_come_back = f"{PROG} --attach {name} {where}"

    def start(self, objects: Sequence[dict]) -> None:
        """Begins it, and stays until its end."""
        self.screen.say(f"Starting {self.name} in the namespace {self.server.namespace}")
        self._apply(objects)
        self.image = objects[-1]["spec"]["template"]["spec"]["containers"][0]["image"]
        self._follow()

    def attach(self) -> None:
        """Comes back to it, or to what it has left."""
        if job := self.server.get("Job", self.name):
            self.image = job["spec"]["template"]["spec"]["containers"][0]["image"]
            self.screen.say(f"Following {self.name} in the namespace {self.server.namespace}")
            self._follow()
        elif self.server.get(*self._claim):
            # Of a Job that was complete, and is gone since.
            self.screen.say(f"The Job {self.name} is gone; fetching what is in its claim")
            self._bring_home()
        else:
            raise InputError(
                f"Expected a run {self.name} in the namespace {self.server.namespace}. Received: "
                "no Job and no claim of this name. kubectl get jobs -A -l "
                "app.kubernetes.io/name=digits-trainer lists them."
            )

    @property
    def _claim(self) -> tuple["Kind", str]:
        return "PersistentVolumeClaim", self.name

    def _apply(self, objects: Sequence[dict]) -> None:
        """Creates the objects, all of them or none. A claim that is there is used as it is."""
        places = [(one["kind"], one["metadata"]["name"]) for one in objects]
        there = [place for place in places if self.server.get(*place)]
        for kind, name in there:
            if (kind, name) != self._claim:
                raise ConfigurationError(
                    f"Expected no {kind} {name} in the namespace {self.server.namespace}. "
                    f"Received: one. {self.how_to_come_back} comes back to a run; another --name "
                    "starts another."
                )
        try:
            for place, one in zip(places, objects, strict=True):
                if place not in there:
                    one["metadata"].setdefault("labels", {}).update(_MADE)
                    self.created.append(place)
                    self.server.apply(one)
        except BaseException:  # a second Ctrl-C, too
            for place in self.created:
                with contextlib.suppress(TrainerError):  # The first error explains this one.
                    self.server.delete(*place)
            raise

    def _follow(self) -> None:
        """Follows it to its end, and does what is to be done then."""
        from trainer.k8s.api import RefusedError
        from trainer.k8s.follow import follow

        try:
            outcome = follow(
                self.server,
                self.name,
                self.screen,
                stop=self.stop,
                old_events=not self.config.attach,
            )
        except RefusedError as error:
            raise ConfigurationError(
                f"{error} {self.name} goes on: {self.how_to_come_back}."
            ) from error
        if outcome is None:
            raise self._detached()
        if outcome.code:
            # What could be gone on with stays.
            self._clean_up(but_the_claim=outcome.begun or self._claim not in self.created)
            raise errors.of(outcome.code, outcome.text)
        self._bring_home()

    def _bring_home(self) -> None:
        """Fetches its files, and deletes it."""
        from trainer.k8s.fetch import fetch

        self.screen.set_status("fetching the files")
        try:
            files = fetch(
                self.server, self.name, image=self.image, screen=self.screen, stop=self.stop
            )
            if files is None:
                raise self._detached()
            # That of another run would be taken for this one's.
            remove_files(self.config.output_dir, set(REPORT_FILES) - files.keys())
            write_files(self.config.output_dir, files)
        except (ConfigurationError, DataError, OutputError) as error:
            raise type(error)(
                f"{error} Nothing is deleted in the cluster: {self.how_to_come_back} tries again."
            ) from error
        model = json.loads(files[MANIFEST_FILE])["model"]
        self.screen.say(
            f"{self.config.output_dir / MODEL_FILE}  {model['bytes'] / 1e6:.1f} MB  "
            f"SHA-256 {model['sha256']}, as in the cluster"
        )
        self._clean_up()

    def _detached(self) -> StoppedError:
        return StoppedError(
            f"detached; {self.name} goes on. {self.how_to_come_back} comes back; "
            f"{self.how_to_delete} deletes it."
        )

    def _clean_up(self, *, but_the_claim: bool = False) -> None:
        """Deletes what this command, or an earlier call of it, has made for the run."""
        if self.config.keep:
            self.screen.say(f"Everything stays. {self.how_to_delete} deletes it.")
            return
        made = ",".join(f"{key}={value}" for key, value in _MADE.items())
        stays = []
        try:
            for kind in _KINDS:
                for one in self.server.list(kind, manifests.selector(self.name)):
                    place = kind, one["metadata"]["name"]
                    own = one["metadata"]["labels"].items() >= _MADE.items()
                    if not own or (place == self._claim and but_the_claim):
                        stays.append(" ".join(place))
                    else:
                        self.server.delete(*place)
        except TrainerError as error:  # The run has ended as it has, all the same.
            self.screen.say(f"Not everything could be deleted: {error} {self.how_to_delete}")
            return
        if stays:
            why = "a run of the same --name goes on from it" if but_the_claim else f"not {made}"
            self.screen.say(f"Stays: {', '.join(stays)} ({why}). {self.how_to_delete} deletes it.")


if __name__ == "__main__":
    sys.exit(main())
