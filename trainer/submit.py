"""The command: trains in a Kubernetes cluster, and fetches the model.

    python -m trainer.submit --image registry.example/digits-trainer:0.1.0 --workers 2 -- --epochs 2

The flags after ``--`` are those of ``python -m trainer.task``. The objects are those of ``k8s/``.
After Ctrl-C the run continues in the cluster, and ``--attach`` follows it again.
"""

import contextlib
import dataclasses
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer import cli
from trainer.config import TrainConfig, local_path
from trainer.errors import UsageError
from trainer.files import lock_output_dir
from trainer.k8s import manifests
from trainer.k8s.api import Server
from trainer.k8s.follow import Screen
from trainer.k8s.run import ClusterRun
from trainer.signals import Signals

PROG = "python -m trainer.submit"

_SET_BY_MANIFESTS = ("--output-dir", "--log-format", "--gpus")  # flags of trainer.task


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Trains in a Kubernetes cluster; the flags of python -m trainer.task follow --.

    Raises:
        UsageError: A value is outside its range.
    """

    image: str | None = None
    """The trainer's image, which the cluster's nodes can
    pull. None: digits-trainer of this version, loaded
    into the nodes beforehand."""

    workers: int = 1
    """Number of pods that train together."""

    gpus: int = 0
    """GPUs per pod."""

    namespace: str | None = None
    """Namespace. None: that of the context."""

    context: str | None = None
    """Context of the kubeconfig file. None: the current
    one."""

    output_dir: Path = Path()
    """Folder for mnist.h5, history.json and mnist.json;
    created where it does not exist."""

    name: str | None = None
    """Name of the run, a prefix of the name of each
    object. None: a new one. With the name of a run
    whose PersistentVolumeClaim was kept, training
    resumes from its checkpoint."""

    attach: str | None = None
    """Start nothing: follow the run of this name and
    fetch its files."""

    keep: bool = False
    """Delete nothing in the cluster at the end."""

    dry_run: bool = False
    """Print the manifests as YAML and exit."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_dir", local_path("output_dir", self.output_dir))
        for field, least in (("workers", 1), ("gpus", 0)):
            if getattr(self, field) < least:
                raise UsageError(
                    f"{field} must be at least {least}. Received: {field}={getattr(self, field)}. "
                    f"Use {getattr(SubmitConfig, field)}, the default."
                )
        # What is allowed in every name made from it: a Service's begins with a letter; the host
        # name of a pod has 63 characters, "-workers-" and a number among them.
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
    """Starts a run in the cluster or attaches to one, follows it to its end and fetches its files.

    Args:
        config: Which run, and where.
        flags: Flags of ``python -m trainer.task``.

    Raises:
        UsageError: A flag is wrong; nothing is started.
        ConfigurationError: The cluster cannot be reached, or refuses a request.
        StoppedError: A signal was received; the run continues without this command.
        TrainerError: The run failed; the exit code is that of its pod.
    """
    from trainer.data import sources  # Here, for --help: it takes NumPy's time.

    data = _check(config, flags).data
    name = config.attach or config.name or f"digits-{secrets.token_hex(3)}"
    objects = []
    if not config.attach:
        objects = manifests.build(
            name,
            image=config.image,
            workers=config.workers,
            gpus=config.gpus,
            flags=flags,
            token=secrets.token_hex(32),
            downloads=sources.downloads(data),
        )
    if config.dry_run:
        for one in objects if config.namespace else ():
            one["metadata"]["namespace"] = config.namespace
        print(manifests.dump(objects), end="")
        return
    with lock_output_dir(config.output_dir), Signals() as signals:
        server = Server(context=config.context, namespace=config.namespace)
        signals.defer()
        with _screen() as screen:
            run = ClusterRun(
                server,
                name,
                output_dir=config.output_dir,
                screen=screen,
                stop=lambda: signals.received,
                image=config.image,
                keep=config.keep,
                attach_command=f"{PROG} --attach {name} {server.flags}",
            )
            if config.attach:
                run.attach()
            else:
                run.start(objects)


def _check(config: SubmitConfig, flags: Sequence[str]) -> TrainConfig:
    """Checks both sets of flags before anything is started, and returns the training's."""
    for flag in flags:
        word = flag.split("=")[0].replace("_", "-")  # The parser accepts both.
        if word in _SET_BY_MANIFESTS:
            raise UsageError(
                f"Expected {word} before --: it is a flag of this command. Received: it among the "
                "flags of the training. --output-dir is the folder on this machine, --gpus the "
                "number of GPUs per pod; the log format is always json."
            )
    task = cli.parse(cli.TASK, TrainConfig, flags)
    if config.attach and (flags or config.name or config.dry_run):
        raise UsageError(
            "Expected --attach without --name, --dry-run and flags of the training: the run has "
            f"started. Received: {' '.join(flags) or '--name or --dry-run'}. Leave them out."
        )
    return task


@contextlib.contextmanager
def _screen() -> Iterator[Screen]:
    """Yields a progress bar on a terminal, plain lines elsewhere."""
    from rich.console import Console  # Here, so that --help does not load it.

    from trainer.reporting.bar import Bar

    if Console().is_terminal:
        with Bar(sys.stdout) as bar:
            yield bar
    else:
        yield _Lines()


class _Lines:
    """``trainer.reporting.bar.Bar`` without a bar, for a pipe."""

    def say(self, text: str) -> None:
        print(text, flush=True)

    def show(self, position: dict, metrics: dict[str, float]) -> None:
        self.say(position["message"])

    def set_status(self, text: str) -> None:
        pass


if __name__ == "__main__":
    sys.exit(main())
