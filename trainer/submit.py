"""The command: trains in a Kubernetes cluster, and fetches the model.

    python -m trainer.submit --image registry.example/digits-trainer:0.1.0 --workers 2 -- --epochs 2

    python -m trainer.submit --as jobset --queue research --workers 4 --gpus 1 -- train.py --lr 0.1

The flags after ``--`` are those of ``python -m trainer.task``, or a script and its own. The objects
are those of ``k8s/``. After Ctrl-C the run continues in the cluster, and ``--attach`` follows it
again.
"""

import contextlib
import dataclasses
import re
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from trainer import cli
from trainer.config import TrainConfig, local_path
from trainer.errors import InputError, UsageError
from trainer.files import lock_output_dir
from trainer.k8s import manifests, objects
from trainer.k8s.api import Server
from trainer.k8s.follow import Screen
from trainer.k8s.patches import apply_patches
from trainer.k8s.run import ClusterRun
from trainer.k8s.settings import REPEATABLE, PodSettings, config_arguments
from trainer.signals import Signals

PROG = "python -m trainer.submit"

_SET_BY_MANIFESTS = (
    "--output-dir",
    "--log-format",
    "--metrics-port",
    "--gpus",
)  # flags of trainer.task


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubmitConfig(PodSettings):
    """Trains in a Kubernetes cluster; after -- follow the flags of python -m trainer.task, or a
    script that calls trainer.fit, and its own.

    Raises:
        UsageError: A value is outside its range.
    """

    as_: Annotated[manifests.Kind, tyro.conf.arg(name="as")] = "job"
    """What trains. job: a Job, or two for several workers;
    jobset: a JobSet, whose pods restart together;
    trainjob: a TrainJob of Kubeflow Trainer, with the
    runtime of k8s/kubeflow/runtime."""

    module: tuple[Path, ...] = dataclasses.field(default=(), metadata=REPEATABLE)
    """Python files that the pods can import, such as that
    of --model; 1 MB together."""

    patch: Path | None = None
    """YAML file with changes to the objects, as kubectl
    patch takes them, each with its kind."""

    config: Path | None = None
    """YAML file with values of these flags, and of the
    training's under the key training. A flag of the
    command line goes before it."""

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
        super().__post_init__()
        object.__setattr__(self, "output_dir", local_path("output_dir", self.output_dir))
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
    own, program = cli.split(argv)

    def command(config: SubmitConfig) -> None:
        if config.config:
            flags, training = config_arguments(_read_yaml(config.config))
            # An argument of the command line is later, and so goes before.
            config = cli.parse(PROG, SubmitConfig, [*flags, *own])
            program[:0] = training if not _is_script(program) else []
        submit(config, program)

    return cli.run(PROG, SubmitConfig, command, own)


def submit(config: SubmitConfig, arguments: Sequence[str]) -> None:
    """Starts a run in the cluster or attaches to one, follows it to its end and fetches its files.

    Args:
        config: Which run, and where.
        arguments: Flags of ``python -m trainer.task``; or a script, and its arguments.

    Raises:
        UsageError: A flag is wrong; nothing is started.
        ConfigurationError: The cluster cannot be reached, or refuses a request.
        StoppedError: A signal was received; the run continues without this command.
        TrainerError: The run failed; the exit code is that of its pod.
    """
    program, downloads = _check(config, arguments)
    name = config.attach or config.name or f"digits-{secrets.token_hex(3)}"
    found: list[dict] = []
    if not config.attach:
        found = objects.build(
            name,
            config,
            program,
            kind=config.as_,
            token=secrets.token_hex(32),
            downloads=downloads,
        )
        if config.patch:
            found = apply_patches(found, _read_text(config.patch))
    if config.dry_run:
        for one in found if config.namespace else ():
            one["metadata"]["namespace"] = config.namespace
        print(manifests.dump(found), end="")
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
                run.start(found, config.as_)


def _check(config: SubmitConfig, arguments: Sequence[str]) -> tuple[objects.Program, bool]:
    """Checks what the pods are to run before anything is started; returns it, and whether they need
    the internet.
    """
    if config.attach and (arguments or config.name or config.dry_run):
        raise UsageError(
            "Expected --attach without --name, --dry-run and flags of the training: the run has "
            f"started. Received: {' '.join(arguments) or '--name or --dry-run'}. Leave them out."
        )
    modules = _read_modules(config.module)
    if _is_script(arguments):
        script = cli.find_script(arguments)
        modules |= _read_modules([script])
        return objects.Program(script=[script.name, *arguments[1:]], modules=modules), False
    for flag in arguments:
        word = flag.split("=")[0].replace("_", "-")  # The parser accepts both.
        if word in _SET_BY_MANIFESTS:
            raise UsageError(
                f"Expected {word} before --: it is a flag of this command. Received: it among the "
                "flags of the training. --output-dir is the folder on this machine, --gpus the "
                "number of GPUs per pod; the log format is always json, the port of metrics 9090."
            )
    from trainer.data import sources  # Here, for --help: it takes NumPy's time.

    data = cli.parse(cli.TASK, TrainConfig, arguments).data
    return objects.Program(flags=arguments, modules=modules), sources.downloads(data)


def _is_script(arguments: Sequence[str]) -> bool:
    return bool(arguments) and not arguments[0].startswith("-")


def _read_modules(paths: Sequence[Path]) -> dict[str, str]:
    """Returns the texts of Python files by their names."""
    found: dict[str, str] = {}
    for path in paths:
        if path.suffix != ".py" or not re.fullmatch(r"[\w.-]+", path.name, re.ASCII):
            raise UsageError(
                f"Expected a Python file with a plain name, such as network.py. Received: {path}. "
                "Rename it."
            )
        if path.name in found:
            raise UsageError(
                f"Expected files of different names. Received: {path.name} twice. Rename one."
            )
        found[path.name] = _read_text(path)
    return found


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise InputError(
            f"Expected a text file at {path}. Received: {error}. Correct the path."
        ) from None


def _read_yaml(path: Path) -> object:
    documents = manifests.parse_yaml(_read_text(path), "config")
    return documents[0] if documents else {}


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
