"""A run in a cluster: creates its objects, follows it, fetches its files, deletes the objects.

    run = ClusterRun(server, "digits-a1b2c", output_dir=Path("out"), screen=screen, stop=stop, ...)
    run.start(objects.build("digits-a1b2c", settings), kind="jobset")     # or: run.attach()

``trainer.submit`` is built on it.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer import errors
from trainer.errors import (
    ConfigurationError,
    DataError,
    InputError,
    OutputError,
    StoppedError,
    TrainerError,
)
from trainer.files import REPORT_FILES, check_replaceable, remove_files, write_files
from trainer.k8s import manifests
from trainer.k8s.api import OPERATORS, Kind, RefusedError, Server
from trainer.k8s.fetch import fetch, names_of
from trainer.k8s.follow import Screen, follow

# Objects that are created here have this label; no others are deleted.
_MANAGED_BY = {"app.kubernetes.io/managed-by": "trainer.submit"}
# In the order in which they are deleted: the PersistentVolumeClaim, with the model, last.
_KINDS: tuple[Kind, ...] = ("Service", "NetworkPolicy", "PersistentVolumeClaim")
_ROOTS: tuple[tuple[manifests.Kind, Kind], ...] = (
    ("job", "Job"),
    ("jobset", "JobSet"),
    ("trainjob", "TrainJob"),
)


class ClusterRun:
    """A run of one name in a namespace.

    Args:
        server: The namespace.
        name: Name of the run.
        output_dir: Folder for the run's files, under ``lock_output_dir``.
        screen: Shows what happens.
        stop: Returns the name of a signal once one was received; the run then continues without
            this process.
        image: The trainer's image for fetching files where no Job is left to name it; None: that of
            the manifests.
        keep: Whether to delete nothing at the end.
        attach_command: The shell command that attaches to this run, for messages.
    """

    def __init__(
        self,
        server: Server,
        name: str,
        *,
        output_dir: Path,
        screen: Screen,
        stop: Callable[[], str | None],
        image: str | None = None,
        keep: bool = False,
        attach_command: str,
    ) -> None:
        self.server = server
        self.name = name
        self.output_dir = output_dir
        self.screen = screen
        self.stop = stop
        self.image = image
        self.keep = keep
        self.attach_command = attach_command
        self.claim: tuple[Kind, str] = ("PersistentVolumeClaim", name)
        self.root = manifests.Root.of("job", name)

    @property
    def delete_command(self) -> str:
        """The shell command that deletes every object of the run, the model with it."""
        return (
            f"kubectl delete {self.root.kind.lower()}s,services,networkpolicies,pvc "
            f"{self.server.flags} -l {manifests.selector(self.name)}"
        )

    def start(self, objects: Sequence[dict], kind: manifests.Kind = "job") -> None:
        """Creates the objects of the run, follows it to its end and fetches its files.

        Args:
            objects: As ``objects.build`` returns them.
            kind: What trains.

        Raises:
            ConfigurationError: The server refuses an object, or one of this name exists.
            StoppedError: A signal was received, or the run can be resumed by another.
            TrainerError: The run failed; the exit code is that of its pod.
        """
        self.screen.say(f"Starting {self.name} in the namespace {self.server.namespace}")
        self.root = manifests.Root.found(kind, self.name, objects[-1])
        if kind != "job" and not self.server.serves(self.root.kind):
            raise ConfigurationError(
                f"Expected the operator of {self.root.kind}s in the cluster "
                f"({OPERATORS[self.root.kind]}). Received: an API server that does not know them. "
                "Use --as job, which needs none."
            )
        created = self._create(objects)
        # A PersistentVolumeClaim that existed before is not deleted.
        self._follow(objects[-1], keep_claim=self.claim not in created)

    def attach(self) -> None:
        """Follows a run that was started before, or fetches its files if it is complete.

        Raises:
            InputError: There is no such run.
            StoppedError, TrainerError: As ``start``.
        """
        for kind, root_kind in _ROOTS:
            if one := self._find(root_kind):
                self.root = manifests.Root.found(kind, self.name, one)
                self.screen.say(f"Following {self.name} in the namespace {self.server.namespace}")
                self._follow(one, keep_claim=True, past_events=False)
                return
        if self.server.get(*self.claim):
            # The Job was complete, and deleted since (ttlSecondsAfterFinished).
            self.screen.say(
                f"The Job {self.name} was deleted; fetching the files from its "
                "PersistentVolumeClaim"
            )
            self._fetch(self.image or manifests.image())
        else:
            raise InputError(
                f"Expected a run {self.name} in the namespace {self.server.namespace}. Received: "
                "no Job, JobSet or TrainJob and no PersistentVolumeClaim of this name. kubectl get "
                "pvc -A -l app.kubernetes.io/name=digits-trainer lists the runs."
            )

    def _find(self, kind: Kind) -> dict | None:
        """Returns what trains, if it is of this kind; None also where a user may not see it."""
        try:
            return self.server.get(kind, self.name)
        except RefusedError:
            if kind == "Job":
                raise
            return None

    def _create(self, objects: Sequence[dict]) -> list[tuple[Kind, str]]:
        """Creates the objects, all or none, and returns kinds and names of those that are new. An
        existing PersistentVolumeClaim is used as it is: a run resumes from its checkpoints.
        """
        created: list[tuple[Kind, str]] = []
        keys = [(one["kind"], one["metadata"]["name"]) for one in objects]
        existing = [key for key in keys if self.server.get(*key)]
        for kind, name in existing:
            if (kind, name) != self.claim:
                raise ConfigurationError(
                    f"Expected no {kind} {name} in the namespace {self.server.namespace}. "
                    f"Received: one. {self.attach_command} attaches to a run; another --name "
                    "starts another."
                )
        try:
            for key, one in zip(keys, objects, strict=True):
                if key not in existing:
                    one["metadata"].setdefault("labels", {}).update(_MANAGED_BY)
                    created.append(key)
                    self._apply(one)
            self._hand_over(objects)
        except BaseException:  # also a second Ctrl-C
            for key in created:
                with contextlib.suppress(TrainerError):  # The first error explains this one.
                    self.server.delete(*key)
            raise
        return created

    def _apply(self, one: dict) -> None:
        try:
            self.server.apply(one)
        except ConfigurationError as error:
            if one["kind"] != "TrainJob":
                raise
            if "podTemplateOverrides" in str(error) and "podTemplateOverrides" in one["spec"]:
                one["spec"] = manifests.with_runtime_patches(one)["spec"]
                self._apply(one)
                return
            if "runtime" not in str(error).lower():
                raise
            raise ConfigurationError(
                f"{error.args[0].rstrip('.')}. kubectl apply -k k8s/kubeflow/runtime installs the "
                "runtime, once per cluster."
            ) from error

    def _hand_over(self, objects: Sequence[dict]) -> None:
        """Makes what trains the owner of the run's Secret and ConfigMap, which are then deleted
        with it.
        """
        for one in objects:
            if one["kind"] not in ("Secret", "ConfigMap"):
                continue
            if root := self.server.get(self.root.kind, self.name):
                owner = {"apiVersion": objects[-1]["apiVersion"], "kind": self.root.kind}
                owner |= {"name": self.name, "uid": root["metadata"]["uid"]}
                one["metadata"]["ownerReferences"] = [owner]
                self.server.apply(one)

    def _follow(self, root: dict, *, keep_claim: bool, past_events: bool = True) -> None:
        """Follows the run to its end, then fetches its files or raises its error."""
        try:
            outcome = follow(
                self.server,
                self.name,
                self.screen,
                stop=self.stop,
                root=self.root,
                past_events=past_events,
            )
        except RefusedError as error:
            raise ConfigurationError(
                f"{error} {self.name} continues: {self.attach_command}."
            ) from error
        if outcome is None:
            raise self._detached()
        if outcome.code:
            # Once training has started there may be a checkpoint to resume from.
            self._clean_up(keep_claim=outcome.started or keep_claim)
            raise errors.from_exit_code(outcome.code, outcome.text)
        self._fetch(manifests.image_of(root), manifests.pod_spec(root))

    def _fetch(self, image: str, like: dict | None = None) -> None:
        """Fetches the files of a complete run, and deletes its objects."""
        self.screen.set_status("fetching the files")
        try:
            contents = fetch(
                self.server, self.name, image=image, like=like, screen=self.screen, stop=self.stop
            )
            if contents is None:
                raise self._detached()
            names = names_of(contents)
            check_replaceable(self.output_dir, names)
            # An earlier run's would be taken for this one's.
            remove_files(self.output_dir, set(REPORT_FILES) - contents.keys())
            write_files(self.output_dir, contents)
        except (ConfigurationError, DataError, OutputError) as error:
            raise type(error)(
                f"{error} Nothing is deleted in the cluster: {self.attach_command} tries again."
            ) from error
        model = json.loads(contents[names.manifest])["model"]
        self.screen.say(
            f"{self.output_dir / names.model}  {model['bytes'] / 1e6:.1f} MB  "
            f"SHA-256 {model['sha256']}, as in the cluster"
        )
        self._clean_up()

    def _detached(self) -> StoppedError:
        return StoppedError(
            f"detached; {self.name} continues. {self.attach_command} attaches to it again; "
            f"{self.delete_command} deletes it."
        )

    def _clean_up(self, *, keep_claim: bool = False) -> None:
        """Deletes the objects that this command, in this call or an earlier one, has created."""
        if self.keep:
            self.screen.say(f"All objects are kept. {self.delete_command} deletes them.")
            return
        kept = []
        try:
            for kind in (self.root.kind, *_KINDS):
                for one in self.server.list(kind, manifests.selector(self.name)):
                    key = kind, one["metadata"]["name"]
                    managed = one["metadata"]["labels"].items() >= _MANAGED_BY.items()
                    if not managed or (key == self.claim and keep_claim):
                        kept.append(" ".join(key))
                    else:
                        self.server.delete(*key)
        except TrainerError as error:  # It does not change how the run has ended.
            self.screen.say(f"Not everything could be deleted: {error} {self.delete_command}")
            return
        if kept:
            label = ",".join(f"{key}={value}" for key, value in _MANAGED_BY.items())
            reason = "a run of the same --name resumes from it" if keep_claim else f"not {label}"
            self.screen.say(
                f"Kept: {', '.join(kept)} ({reason}). {self.delete_command} deletes it."
            )
