"""One run from its configuration to its files: load, assemble, train, save, report.

    run = train(TrainConfig(epochs=2, output_dir="out"))
    run.model, run.history, run.manifest

``python -m trainer.task`` calls it in a process of its own for each worker, and ``trainer.train``
in the caller's.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from trainer import cli, files
from trainer.config import TrainConfig
from trainer.errors import StoppedError, UsageError
from trainer.signals import TERMINATING, Signals
from trainer.training import artifacts

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from trainer.data.digits import Digits
    from trainer.distributed.cluster import Cluster
    from trainer.distributed.collectives import Workers
    from trainer.distributed.worker import Link
    from trainer.models.fast_step import StepChoice
    from trainer.reporting.progress import Watcher
    from trainer.training.assembly import Assembly
    from trainer.training.manifest import RunManifest
    from trainer.training.position import Position
    from trainer.training.session import Session

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
    data: "Digits | None" = None,
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
                held.enter_context(files.lock_output_dir(config.output_dir, wait=wait))
                if _is_finished(config, job):
                    return None
            # The data first: its errors show before TensorFlow starts, which takes seconds.
            source, digits = load_data(config, data)

            from trainer import runtime
            from trainer.distributed.worker import out_of_memory_errors, peer_errors
            from trainer.training.assembly import assemble
            from trainer.training.session import Session

            configure_tensorflow(config)
            held.enter_context(runtime.keras_defaults())
            watcher = held.enter_context(_progress(config, cluster))
            if link:
                held.enter_context(peer_errors())
            held.enter_context(out_of_memory_errors())
            assembly = assemble(config, source, digits, cluster=cluster, link=link, job=job)
            signals.defer()
            _announce(config, digits, assembly, watcher)
            session = Session(config, assembly, watcher, signals, link)
            remains.session = session
            model, history = fit(
                config,
                digits,
                strategy=assembly.strategy.strategy,
                step=assembly.step,
                callbacks=[watcher, *session.callbacks(len(digits.x_train)), *callbacks],
                begin=session.begin,
                after_call=session.after_call,
                notify=lambda text: watcher.say(text, "notice"),
            )
            images, labels = digits.x_test, digits.y_test
            del source, digits, data  # the training images, no longer needed
            runtime.release_memory()
            _compare_weights(model, session.workers, watcher)
            if link:
                link.tell("trained")
            if not chief:
                return Run(model, history, {})
            description = _save(config, model, history, session.manifest, start)
            session.checkpoints.delete_all()

            from trainer.training import report

            report.draw(
                config,
                model,
                description,
                history,
                images=images,
                labels=labels,
                stopped=lambda: signals.received,
                watcher=watcher,
            )
            _report_result(config, description, watcher)
            return Run(model, history, description)
        except KeyboardInterrupt as interrupt:  # Before the first step, or a second signal.
            if str(interrupt) in TERMINATING:
                raise StoppedError(f"stopped by {interrupt}. {remains}") from None
            raise KeyboardInterrupt(str(remains)) from None


def fit(
    config: TrainConfig,
    digits: "Digits",
    *,
    strategy: "tf.distribute.Strategy | None" = None,
    step: "StepChoice | None" = None,
    callbacks: Sequence["keras.callbacks.Callback"] = (),
    begin: "Callable[[keras.Model], Position] | None" = None,
    after_call: "Callable[[Position], None]" = lambda position: None,
    notify: Callable[[str], None] = lambda text: None,
) -> tuple["keras.Model", dict[str, list[float]]]:
    """Builds the model of a configuration and trains it; writes no file.

    Args:
        config: The configuration.
        digits: The data set to train on.
        strategy: The strategy to train under; None: the one that ``config`` asks for, in this
            process.
        step: The training step; None: the one that ``config`` asks for.
        callbacks: Keras callbacks, called as in ``loop.fit``.
        begin: Called with the model; returns the position to resume from. None: start from the
            beginning.
        after_call: As that of ``loop.fit``.
        notify: Called with each sentence for the user.

    Returns:
        The compiled model, in float32, and its history as ``loop.fit`` returns it.

    Raises:
        UsageError: The batch size does not divide among the replicas.
        NotFiniteError: The loss or the weights became NaN or infinite.
    """
    from trainer.data import augment, pipeline
    from trainer.distributed.strategy import check_batch_size, has_accelerator
    from trainer.models import cnn
    from trainer.training import loop
    from trainer.training.assembly import choose_step, create_strategy

    strategy = strategy or create_strategy(config).strategy
    step = step or choose_step(config, strategy)
    check_batch_size(config.batch_size, strategy.num_replicas_in_sync)
    with strategy.scope():
        model = cnn.from_config(config, len(digits.x_train))
    position = begin(model) if begin else None
    dataset = pipeline.put_on_devices(
        digits,
        strategy=strategy if has_accelerator() else None,
        preprocess=cnn.preprocess,
        augment=augment.warp if config.augment == "affine" else None,
    )
    if dataset.notice:
        notify(dataset.notice)
    with step.step(model) as forward:
        history = loop.fit(
            model,
            lambda epoch: pipeline.train_batches(
                *dataset.train,
                batch_size=config.batch_size,
                seed=config.seed,
                epoch=epoch,
                augment=dataset.augment,
            ),
            pipeline.test_batches(*dataset.test, batch_size=config.batch_size),
            strategy=strategy,
            loss=cnn.loss(config.label_smoothing),
            metrics=cnn.METRICS,
            epochs=config.epochs,
            preprocess=dataset.preprocess,
            forward=forward,
            jit_compile=config.jit_compile,
            steps_per_execution=config.steps_per_execution,
            callbacks=callbacks,
            position=position,
            after_call=after_call,
        )
    if config.precision == "mixed_bfloat16":  # Saved as a plain float32 model.
        with strategy.scope():
            plain = cnn.from_config(
                dataclasses.replace(config, precision="float32"), len(digits.x_train)
            )
        plain.set_weights(model.get_weights())
        model = plain
    return model, history


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
    if not job or (manifest := files.read_manifest(config.output_dir)).get("job") != job:
        return False
    with _progress(config, None) as watcher:
        _report_result(config, manifest, watcher)
    return True


def load_data(config: TrainConfig, data: "Digits | None") -> tuple["Digits", "Digits"]:
    """Returns the whole data set, and what the run uses of it."""
    from trainer.data import sources

    source = sources.load(config.data) if data is None else data
    digits = source.first(config.train_limit, config.test_limit)
    if config.batch_size > len(digits.x_train):
        raise UsageError(
            f"batch_size must be at most the {len(digits.x_train)} training images. Received: "
            f"batch_size={config.batch_size}. Use batch_size={len(digits.x_train)} or less."
        )
    return source, digits


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


def _announce(
    config: TrainConfig, digits: "Digits", assembly: "Assembly", watcher: "Watcher"
) -> None:
    from trainer.data import plausibility

    schedule = "" if config.schedule == "constant" else f" ({config.schedule})"
    watcher.say(
        f"{len(digits.x_train):,} training and {len(digits.x_test):,} test images ({config.data}), "
        f"epochs {config.epochs}, batch size {config.batch_size}, {config.optimizer} "
        f"{config.learning_rate:g}{schedule}, seed {config.seed}, threads {config.threads}",
        "start",
        **assembly.manifest.as_dict(),
    )
    replicas = assembly.manifest.environment["replicas"]
    watcher.say(assembly.strategy.reason, "strategy", replicas=replicas)
    for notice in (assembly.strategy.notice, assembly.step.reason, *plausibility.notices(digits)):
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


def _save(
    config: TrainConfig,
    model: "keras.Model",
    history: dict[str, list[float]],
    manifest: "RunManifest",
    start: float,
) -> dict:
    """Writes the files; returns the content of mnist.json."""
    metrics = {name: values[-1] for name, values in history.items() if name != "seconds"}
    description = {
        **manifest.as_dict(),
        "metrics": metrics,
        "seconds": round(time.monotonic() - start, 3),
    }
    return artifacts.save(config.output_dir, model, history, description)


def _report_result(config: TrainConfig, manifest: dict, watcher: "Watcher") -> None:
    from trainer.reporting.bar import format_duration

    metrics = manifest["metrics"]
    text = (
        f"test accuracy {metrics['val_accuracy']:.2%}, loss {metrics['val_loss']:.4f}, "
        f"after {format_duration(manifest['seconds'])}\n"
        f"{config.output_dir / files.MODEL_FILE}  "
        f"{manifest['model']['bytes'] / 1e6:.1f} MB  "
        f"SHA-256 {manifest['model']['sha256']}"
    )
    cli.write_termination_message(text)
    watcher.say(
        text,
        "done",
        **{name: manifest[name] for name in ("model", "metrics", "seconds")},
    )
