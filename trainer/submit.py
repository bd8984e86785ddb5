"""Trains in a Kubernetes cluster, and brings home what comes out.

    python -m trainer.submit --image registry.example/digits-trainer:0.1.0 --workers 2 -- --epochs 2

The flags after ``--`` are those of ``python -m trainer.task``. The objects are those of ``k8s/``;
Ctrl-C leaves them to go on, and ``--attach`` comes back to them.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import cli, errors, export, manifests
from trainer.config import TrainConfig
from trainer.errors import (
    ConfigurationError,
    DataError,
    InputError,
    StoppedError,
    TrainerError,
    UsageError,
)

if TYPE_CHECKING:  # --help loads neither.
    from trainer.apiserver import Kind, Server
    from trainer.follow import Screen

PROG = "python -m trainer.submit"
TASK = "python -m trainer.task"

FETCH = 300.0  # Seconds in which the pod that reads the files begins.
TRIES = 3  # How often a file is read whose digest is not the manifest's.
_NOTHING_DONE = {
    error.exit_code for error in (UsageError, DataError, InputError, ConfigurationError)
}
OWN = ("--output-dir", "--log-format", "--gpus")  # what the manifests say to the task

# What a run leaves in the cluster, in the order to delete it in; the claim, with the model, last.
_KINDS: tuple["Kind", ...] = ("Job", "Pod", "Service", "NetworkPolicy", "PersistentVolumeClaim")


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
        if self.name is not None and not re.fullmatch(
            r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name
        ):
            raise UsageError(
                "name must be at most 40 lower-case letters, digits and hyphens, a letter first. "
                f"Received: name={self.name!r}. Leave it out for a new one."
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
    objects = manifests.build(
        name, image=config.image, workers=config.workers, gpus=config.gpus, flags=flags
    )
    if config.dry_run:
        for one in objects if config.namespace else ():
            one["metadata"]["namespace"] = config.namespace
        print(manifests.dump(objects), end="")
        return

    from trainer.apiserver import Server

    with export.claim(config.output_dir), cli.Signals() as signals:
        server = Server(context=config.context, namespace=config.namespace)
        signals.defer()
        if config.attach:
            job = server.get("Job", name)
            if job is None:
                raise InputError(
                    f"Expected a run {name} in the namespace {server.namespace}. Received: no Job "
                    "of this name. kubectl get jobs -A -l app.kubernetes.io/name=digits-trainer "
                    "lists them."
                )
            image = job["spec"]["template"]["spec"]["containers"][0]["image"]
            created = []
        else:
            created = _apply(server, name, objects)
            image = objects[-1]["spec"]["template"]["spec"]["containers"][0]["image"]
        run = _Run(config, server, name, image, created, lambda: signals.received)
        with _screen() as screen:
            run.follow(screen)


def _check(config: SubmitConfig, flags: Sequence[str]) -> None:
    """Finds what is wrong before anything is started."""
    for flag in flags:
        if flag.split("=")[0] in OWN:
            raise UsageError(
                f"Expected {flag.split('=')[0]} before --: it is this command's. Received: it "
                "among the flags of the training. --output-dir names the folder here, --gpus the "
                "GPUs of each pod; the log is JSON."
            )
    cli.parse(TASK, TrainConfig, flags)
    if config.attach and (flags or config.name or config.dry_run):
        raise UsageError(
            "Expected --attach without --name, --dry-run and flags of the training: the run has "
            f"begun. Received: {' '.join(flags) or '--name or --dry-run'}. Leave them out."
        )


def _apply(server: "Server", name: str, objects: Sequence[dict]) -> list[tuple["Kind", str]]:
    """Creates the objects; returns what was not there before. All of them or none."""
    if server.get("Job", name) is not None:
        raise ConfigurationError(
            f"Expected no run {name} in the namespace {server.namespace}. Received: one. "
            f"--attach {name} comes back to it; another --name starts another."
        )
    created = []
    try:
        for one in objects:
            place = one["kind"], one["metadata"]["name"]
            if server.get(*place) is None:
                created.append(place)
            server.apply(one)
    except TrainerError:
        for place in created:
            with contextlib.suppress(TrainerError):  # The first error explains this one.
                server.delete(*place)
        raise
    return created


@contextlib.contextmanager
def _screen():
    from rich.console import Console

    from trainer.bar import Bar

    if Console().is_terminal:
        with Bar(sys.stdout) as bar:
            yield bar
    else:
        yield _Lines()


class _Lines:
    """What ``trainer.bar.Bar`` is on a terminal, for a pipe: the lines alone."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def show(self, place: dict, logs: dict[str, float]) -> None:
        self.say(place["message"])

    def note(self, facts: str) -> None:
        pass


class _Run:
    """A run in the cluster, of which this command made ``created``."""

    def __init__(
        self,
        config: SubmitConfig,
        server: "Server",
        name: str,
        image: str,
        created: list[tuple["Kind", str]],
        stop: Callable[[], str | None],
    ) -> None:
        self.config = config
        self.server = server
        self.name = name
        self.image = image
        self.created = created
        self.stop = stop
        self.selector = f"app.kubernetes.io/instance={name}"

    def follow(self, screen: "Screen") -> None:
        """Follows it, fetches its files and cleans up."""
        from trainer.follow import follow

        begun = "Following" if self.config.attach else "Started"
        screen.say(f"{begun} {self.name} in the namespace {self.server.namespace}")
        outcome = follow(
            self.server, self.name, screen, stop=self.stop, old_events=not self.config.attach
        )
        if outcome is None:
            raise self._detached()
        if outcome.code:
            self._clean_up(screen, failed=outcome.code)
            raise errors.of(outcome.code, outcome.text)
        files = self._fetch(screen)
        export.write(self.config.output_dir, files)
        model = json.loads(files[export.MANIFEST_FILE])["model"]
        screen.say(
            f"{self.config.output_dir / export.MODEL_FILE}  {model['bytes'] / 1e6:.1f} MB  "
            f"SHA-256 {model['sha256']}, as in the cluster"
        )
        self._clean_up(screen)

    def _fetch(self, screen: "Screen") -> dict[str, bytes]:
        """Reads the files of the run, in the order to write them in."""
        for tries_left in reversed(range(TRIES)):
            screen.note("fetching the files")
            try:
                return self._read_files()
            except (ConfigurationError, DataError) as error:
                if not tries_left:
                    raise type(error)(
                        f"{error} Nothing is deleted: {PROG} --attach {self.name} tries again."
                    ) from error
                screen.say(f"Fetching the files failed, trying again: {error}")
        raise AssertionError

    def _read_files(self) -> dict[str, bytes]:
        """Reads the files through a pod that mounts the claim."""
        pod = manifests.fetch_pod(self.name, image=self.image)
        name = pod["metadata"]["name"]
        self.server.delete("Pod", name, grace_seconds=0)  # one that an earlier try left
        self.server.apply(pod)
        try:
            self._await(name)
            files = {file: self.server.read_file(name, f"/output/{file}") for file in export.FILES}
        finally:
            with contextlib.suppress(TrainerError):
                self.server.delete("Pod", name, grace_seconds=0)
        try:
            json.loads(files[export.HISTORY_FILE])
            expected = json.loads(files[export.MANIFEST_FILE])["model"]["sha256"]
        except (ValueError, KeyError, TypeError):
            expected = None
        if hashlib.sha256(files[export.MODEL_FILE]).hexdigest() != expected:
            raise DataError(
                f"Expected {export.MODEL_FILE} to have the SHA-256 that {export.MANIFEST_FILE} "
                f"names. Received: {len(files[export.MODEL_FILE]):,} bytes with another one."
            )
        return files

    def _await(self, pod: str) -> None:
        """Waits until a pod runs."""
        from trainer.follow import pending

        until = time.monotonic() + FETCH
        while (found := self.server.get("Pod", pod)) and found["status"]["phase"] != "Running":
            if self.stop():
                raise self._detached()
            if time.monotonic() > until:
                raise ConfigurationError(
                    f"Expected the pod {pod} to run within {FETCH:g} s, to fetch the files. "
                    f"Received: {pending(found) or found['status']['phase']}."
                )
            time.sleep(1)

    def _detached(self) -> StoppedError:
        where = f"--namespace {self.server.namespace}"
        if self.config.context:
            where += f" --context {self.config.context}"
        return StoppedError(
            f"detached; {self.name} goes on. {PROG} --attach {self.name} {where} comes back; "
            f"{self._how_to_delete()} deletes it."
        )

    def _clean_up(self, screen: "Screen", *, failed: int = 0) -> None:
        """Deletes what the run has left; of one that failed not what it could go on with."""
        if self.config.keep:
            screen.say(f"Everything stays. {self._how_to_delete()} deletes it.")
            return
        claim = ("PersistentVolumeClaim", self.name)
        keep = failed and (failed not in _NOTHING_DONE or claim not in self.created)
        for kind in _KINDS:
            for one in self.server.list(kind, self.selector):
                place = kind, one["metadata"]["name"]
                if not (keep and place == claim):
                    self.server.delete(*place)
        if keep:
            screen.say(
                f"The claim {self.name} stays, with its checkpoints: --name {self.name} goes on "
                f"from them; kubectl delete pvc {self.name} -n {self.server.namespace} deletes it."
            )

    def _how_to_delete(self) -> str:
        return (
            "kubectl delete jobs,pods,services,networkpolicies,pvc "
            f"-n {self.server.namespace} -l {self.selector}"
        )


if __name__ == "__main__":
    sys.exit(main())
