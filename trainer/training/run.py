"""One run from its configuration to its files: load, assemble, train, save, report.

    run = train(TrainConfig(epochs=2, output_dir="out"))
    run.model, run.history, run.manifest

``python -m trainer.task`` calls it in a process of its own for each worker, and ``trainer.train``
in the caller's.
"""

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from trainer import cli, files
from trainer.config import TrainConfig
from trainer.errors import StoppedError, UsageError
from trainer.signals import TERMINATING, Signals
from trainer.training import artifacts, workloads

if TYPE_CHECKING:
    import keras

    from trainer.data.dataset import Splits
    from trainer.data.digits import Digits
    from trainer.distributed.cluster import Cluster
    from trainer.distributed.collectives import Workers
    from trainer.distributed.worker import Link
    from trainer.reporting.metrics import Metrics
    from trainer.reporting.progress import Watcher
    from trainer.training.assembly import Assembly
    from trainer.training.session import Session
    from trainer.training.workload import Workload

TERMINATION_SECONDS = 60.0  # For a pod of an earlier Job, which is being deleted, to terminate.


class Run(NamedTuple):
    """A run that has ended.

    Attributes:
        model: The trained model, compiled.
        history: As ``History.history`` of Keras, and ``seconds``.
        manifest: As ``mnist.json`` has it; empty on workers other than the chief.
    """

    model: "keras.Model"
    history: dict[str, list[float]]
    manifest: dict


def train(
    config: TrainConfig,
    *,
    data: "Digits | Splits | None" = None,
    cluster: "Cluster | None" = None,
    link: "Link | None" = None,
    job: str | None = None,
    callbacks: Sequence["keras.callbacks.Callback"] = (),
    signals: Signals | None = None,
) -> Run | None:
    """Trains a model as configured, shows the progress, and saves model, history and manifest.

    While it runs in the main thread, the first SIGINT, SIGTERM or SIGHUP ends it after the current
    call of the step, with a checkpoint.

    Args:
        config: The configuration of the run.
        data: The images to train on; None: those that ``config.data`` names.
        cluster: The workers of the run; None: this process trains alone. The chief alone shows
            progress and writes files.
        link: To the parent process, which each of several workers has.
        job: UID of the Kubernetes Job whose pod this is; None outside one.
        callbacks: Keras callbacks, called as in ``loop.fit``.
        signals: Those that the caller has entered; None: they are handled here.

    Returns:
        What was trained; None where an earlier pod of the same Job had finished the run.

    Raises:
        TrainerError: Any error that a user can cause or meet; ``trainer.errors`` lists them.
    """
    start = time.monotonic()
    chief = cluster is None or cluster.is_chief
    if cluster is None and config.step_timeout is not None:
        raise UsageError(
            "step_timeout is for several workers, each of which has a parent process that watches "
            f"it. Received: step_timeout={config.step_timeout} and one process. Leave it out."
        )
    remains = _Remains(config)
    with contextlib.ExitStack() as held:
        signals = signals or held.enter_context(Signals())
        try:
            if chief:
                wait = TERMINATION_SECONDS if job else 0
                held.enter_context(files.lock_output_dir(config.output_dir, wait=wait, names=None))
                if _is_finished(config, job):
                    return None
            metrics = held.enter_context(_metrics(config, cluster))
            # The data first: its errors show before TensorFlow starts, which takes seconds.
            workload = workloads.load(config, data)
            if chief:
                files.check_replaceable(config.output_dir, workload.names)

            from trainer import runtime
            from trainer.distributed.worker import out_of_memory_errors, peer_errors
            from trainer.training.assembly import assemble
            from trainer.training.report import Report, augmented_images
            from trainer.training.session import Session

            configure_tensorflow(config)
            held.enter_context(runtime.keras_defaults())
            watcher = held.enter_context(_progress(config, cluster))
            exporters = _exporters(config, workload, metrics)
            if link:
                held.enter_context(peer_errors())
            held.enter_context(out_of_memory_errors())
            assembly = assemble(config, workload, cluster=cluster, link=link, job=job)
            signals.defer()
            _announce(config, workload, assembly, watcher)
            session = Session(config, workload, assembly, watcher, signals, link)
            remains.session = session
            if metrics:
                metrics.checkpoint_age.set_function(lambda: session.checkpoint_age)
                metrics.resumed.set_function(lambda: session.resumed)
            model, history = workload.fit(
                strategy=assembly.strategy.strategy,
                step=assembly.step,
                callbacks=[watcher, *exporters, *session.callbacks(), *callbacks],
                begin=session.begin,
                after_call=session.after_call,
                notify=lambda text: watcher.say(text, "notice"),
            )
            if session.best_epoch is not None:
                watcher.say(_stopped_early(config, history, session.best_epoch), "notice")
            augmented = augmented_images(config, workload) if chief else []
            workload.release()
            del data
            runtime.release_memory()
            _compare_weights(model, session.workers, watcher)
            if link:
                link.tell("trained")
            if not chief:
                return Run(model, history, {})
            replicas = session.manifest.environment["replicas"]
            report = Report(
                config, workload, model, replicas, lambda: signals.received, watcher, augmented
            )
            tested = workload.test(lambda: report.predictions)
            description = _save(config, workload, model, history, tested, session, start)
            session.checkpoints.delete_all()
            if metrics:
                metrics.done.set(1)
            report.draw(description, history)
            _report_result(config, description, watcher)
            return Run(model, history, description)
        except KeyboardInterrupt as interrupt:  # Before the first step, or a second signal.
            if str(interrupt) in TERMINATING:
                raise StoppedError(f"stopped by {interrupt}. {remains}") from None
            raise KeyboardInterrupt(str(remains)) from None


class _Remains:
    """What an interrupted run leaves in its output folder, as a sentence for the user."""

    session: "Session | None" = None

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def __str__(self) -> str:
        if self.session and (saved := self.session.last_checkpoint):
            return (
                f"The checkpoint at {saved} is in {self.config.output_dir}: the same command "
                "resumes the run."
            )
        return f"The files in {self.config.output_dir} are unchanged."


def _is_finished(config: TrainConfig, job: str | None) -> bool:
    """Tells whether this is a pod in place of one that was lost after it had written its Job's
    files; then shows the result once more.
    """
    for names in files.KINDS if job else ():
        if (manifest := files.read_manifest(config.output_dir, names)).get("job") == job:
            with _progress(config, None) as watcher:
                _report_result(config, manifest, watcher)
            return True
    return False


def configure_tensorflow(config: TrainConfig) -> None:
    """Sets TensorFlow's process-wide options."""
    from trainer import runtime

    runtime.set_threads(config.threads)
    runtime.set_precision(config.precision)
    if config.deterministic:
        runtime.set_deterministic()


@contextlib.contextmanager
def _progress(config: TrainConfig, cluster: "Cluster | None") -> "Iterator[Watcher]":
    from trainer.reporting.progress import progress

    with progress(
        config.log_format,
        batch_size=config.batch_size,
        worker=cluster.index if cluster else 0,
    ) as watcher:
        yield watcher


@contextlib.contextmanager
def _metrics(config: TrainConfig, cluster: "Cluster | None") -> "Iterator[Metrics | None]":
    """Serves the metrics that the configuration asks for; of workers on one machine the chief's."""
    if config.metrics_port is None or (cluster and cluster.index and cluster.is_local):
        yield None
        return
    from trainer.distributed.parent import step_deadline
    from trainer.reporting.metrics import Metrics

    deadline = functools.partial(step_deadline, config.step_timeout)
    metrics = Metrics(*config.metrics_address, deadline=deadline)
    with metrics.serve():
        yield metrics


def _exporters(
    config: TrainConfig, workload: "Workload", metrics: "Metrics | None"
) -> "list[Watcher]":
    if metrics is None:
        return []
    from trainer.reporting.exporter import Exporter

    return [Exporter(metrics, config.batch_size, workload.train_examples, time.monotonic)]


def _announce(
    config: TrainConfig, workload: "Workload", assembly: "Assembly", watcher: "Watcher"
) -> None:
    optimizer = config.optimizer + (", learning rate" if " " in config.optimizer else "")
    schedule = "" if config.schedule == "constant" else f" ({config.schedule})"
    watcher.say(
        f"{workload.summary()} ({config.data}), "
        f"epochs {config.epochs}, batch size {config.batch_size}, {optimizer} "
        f"{config.learning_rate:g}{schedule}, seed {config.seed}, threads {config.threads}",
        "start",
        **assembly.manifest.as_dict(),
    )
    replicas = assembly.manifest.environment["replicas"]
    watcher.say(assembly.strategy.reason, "strategy", replicas=replicas)
    for notice in (assembly.strategy.notice, assembly.step.reason, *workload.notices()):
        if notice:
            watcher.say(notice, "notice")


def _compare_weights(model: "keras.Model", workers: "Workers", watcher: "Watcher") -> None:
    """Reports the SHA-256 of this worker's final weights, and whether all workers' are equal."""
    if workers.count == 1:
        return
    sha256 = artifacts.weights_sha256(model)
    same = not workers.differing(bytes.fromhex(sha256))
    others = "the same weights as the others, bit for bit"
    if not same:
        others = "other weights than the others: their processors round differently"
    text = f"worker {workers.index} of {workers.count} has {others}: SHA-256 {sha256}"
    cli.write_termination_message(text)
    watcher.say(text, "weights", workers=workers.count, same=same, weights_sha256=sha256)


def _stopped_early(config: TrainConfig, history: dict[str, list[float]], best: int) -> str:
    """Returns the sentence about a run with early stopping that has ended."""
    epochs = len(history["loss"])
    ended = "All epochs are trained"
    if epochs < config.epochs:
        ended = (
            f"Stopped after epoch {epochs}: the validation loss was lower {epochs - best - 1} ago"
        )
    return f"{ended}. The weights are those of epoch {best + 1}"


def _save(
    config: TrainConfig,
    workload: "Workload",
    model: "keras.Model",
    history: dict[str, list[float]],
    test: Mapping[str, float],
    session: "Session",
    start: float,
) -> dict:
    """Writes the files; returns the content of the manifest."""
    epoch = -1 if session.best_epoch is None else session.best_epoch
    metrics = {name: values[epoch] for name, values in history.items() if name != "seconds"}
    best = {} if session.best_epoch is None else {"best_epoch": session.best_epoch + 1}
    description = {
        **session.manifest.as_dict(),
        **best,
        "metrics": {**metrics, **test},
        "seconds": round(time.monotonic() - start, 3),
    }
    return artifacts.save(config.output_dir, model, history, description, names=workload.names)


def _report_result(config: TrainConfig, manifest: dict, watcher: "Watcher") -> None:
    from trainer.reporting.bar import format_duration

    text = (
        f"{_judgement(manifest)}, after {format_duration(manifest['seconds'])}\n"
        f"{config.output_dir / manifest['model']['file']}  "
        f"{manifest['model']['bytes'] / 1e6:.1f} MB  "
        f"SHA-256 {manifest['model']['sha256']}"
    )
    cli.write_termination_message(text)
    watcher.say(
        text,
        "done",
        **{name: manifest[name] for name in ("model", "metrics", "seconds")},
    )


def _judgement(manifest: dict) -> str:
    """Returns accuracy and loss of the images that judge the model, as a phrase."""
    metrics, data = manifest["metrics"], manifest["data"]
    part, prefix = "test", "val_"
    if "validation_examples" in data:
        part, prefix = ("test", "test_") if data["test_examples"] else ("validation", "val_")
    accuracy = metrics.get(f"{prefix}accuracy")
    shown = f"{part} accuracy {accuracy:.2%}, " if isinstance(accuracy, float) else f"{part} "
    return f"{shown}loss {metrics[f'{prefix}loss']:.4f}"
