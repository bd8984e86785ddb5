"""The command: trains the CNN and writes mnist.h5.

    python -m trainer.task --epochs 2 --output-dir out

Where TF_CONFIG or an Indexed Job's environment names several workers, the same command on each of
them trains one model together.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer import cli
from trainer.config import TrainConfig
from trainer.distributed import cluster
from trainer.errors import StoppedError, UsageError
from trainer.signals import Signals
from trainer.training import artifacts as output

if TYPE_CHECKING:  # --help loads none of these.
    import keras
    import tensorflow as tf

    from trainer.data.dataset import Digits
    from trainer.distributed import worker as child
    from trainer.distributed.collectives import Workers
    from trainer.distributed.strategy import StrategyChoice
    from trainer.models.fast_step import StepChoice
    from trainer.reporting import progress as report
    from trainer.training import checkpoint

PROG = "python -m trainer.task"
JOB = "TRAINER_JOB_UID"  # In a pod: what tells its Job from every other one.
LINGER = 60.0  # Seconds that a pod takes at most to end which is being deleted, of a Job before.


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (``trainer.errors`` lists them)."""
    flags = list(sys.argv[1:] if argv is None else argv)

    def command(config: TrainConfig) -> None:
        members = cluster.resolve(os.environ)
        if members is None:
            train(config)
            return
        from trainer.distributed import supervisor
        from trainer.distributed import worker as child

        if link := child.Link.find(os.environ):
            link.run(lambda: train(config, members=members, link=link))
        else:
            supervisor.run(
                [sys.executable, "-m", "trainer.task", *flags],
                members,
                startup_timeout=config.startup_timeout,
            )

    return cli.run(PROG, TrainConfig, command, flags)


def train(
    config: TrainConfig,
    *,
    members: cluster.Cluster | None = None,
    link: "child.Link | None" = None,
) -> None:
    """Trains as the configuration says, shows how it goes, and saves what comes out.

    Args:
        config: What to train.
        members: The workers of the run; None: this process alone. The chief alone shows progress
            and writes files.
        link: To the parent process, which a worker of several has.

    Raises:
        TrainerError: One of its kinds, for whatever a user can cause or meet.
    """
    start = time.monotonic()
    chief = members is None or members.is_chief
    with Signals() as signals, contextlib.ExitStack() as held:
        try:
            if chief:
                wait = LINGER if os.environ.get(JOB) else 0
                held.enter_context(output.claim(config.output_dir, wait=wait))
                if _is_done(config):
                    return
            # The data comes first: what is wrong with it shows before TensorFlow, which takes
            # seconds to start.
            source, digits = _load(config)
            if config.tensorflow_logs:
                os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0")

            from trainer import runtime
            from trainer.distributed.collectives import lost_peers
            from trainer.models import optimizers
            from trainer.reporting import progress as report
            from trainer.reporting.tensorboard import EpochEvents
            from trainer.training import report as run_report
            from trainer.training.manifest import gather, in_common

            facts = gather(config, source, digits, job=os.environ.get(JOB))
            if link:
                link.meet(in_common(facts))
            runtime.set_threads(config.threads)
            runtime.set_precision(config.precision)
            if config.deterministic:
                runtime.set_deterministic()
            with (
                report.progress(
                    config.log_format,
                    batch_size=config.batch_size,
                    worker=members.index if members else 0,
                ) as watcher,
                lost_peers() if link else contextlib.nullcontext(),
            ):
                chosen = _strategy(config, members)
                if link:
                    link.tell("connected")
                signals.defer()
                watcher.say(_announcement(config, digits), "start", **facts)
                replicas = chosen.strategy.num_replicas_in_sync
                watcher.say(chosen.reason, "strategy", replicas=replicas)
                step = _step(config, chosen.strategy)
                facts["environment"]["step"] = step.name
                if step.reason:
                    watcher.say(step.reason, "step")
                keeper = _keeper(config, facts, chosen.strategy, signals, watcher)
                callbacks = [watcher]
                if config.tensorboard and chief:
                    callbacks.append(
                        EpochEvents(
                            config.output_dir,
                            learning_rate=optimizers.learning_rate_by_epoch(
                                config, len(digits.x_train)
                            ),
                            before=lambda: keeper.saved.history,
                        )
                    )
                model, history = fit(
                    config, digits, callbacks=callbacks, keeper=keeper, strategy=chosen.strategy
                )
                images, labels = digits.x_test, digits.y_test
                del source, digits  # the training images, which nobody needs any more
                runtime.release_memory()
                _compare_weights(model, keeper.workers, watcher)
                if link:
                    link.tell("trained")
                if chief:
                    manifest = _save(config, model, history, facts, start)
                    keeper.finish()
                    run_report.draw(
                        config,
                        model,
                        manifest,
                        history,
                        images=images,
                        labels=labels,
                        stopped=lambda: signals.received,
                        watcher=watcher,
                    )
                    _say_result(config, manifest, watcher)
        except KeyboardInterrupt as interrupt:  # Nothing was under way, or it was the second one.
            left = f"What is in {config.output_dir} is as it was."
            if str(interrupt) == "SIGTERM":
                raise StoppedError(f"stopped by SIGTERM. {left}") from None
            raise KeyboardInterrupt(left) from None


def _is_done(config: TrainConfig) -> bool:
    """Whether this is a pod in place of one that was lost after it had written its Job's files:
    then says once more what came out.
    """
    job = os.environ.get(JOB)
    if not job or (manifest := output.read_manifest(config.output_dir)).get("job") != job:
        return False
    from trainer.reporting import progress as report

    with report.progress(config.log_format, batch_size=config.batch_size) as watcher:
        _say_result(config, manifest, watcher)
    return True


def fit(
    config: TrainConfig,
    digits: "Digits",
    *,
    callbacks: Sequence["keras.callbacks.Callback"] = (),
    keeper: "checkpoint.Keeper | None" = None,
    strategy: "tf.distribute.Strategy | None" = None,
) -> tuple["keras.Model", dict[str, list[float]]]:
    """Trains a model on the digits.

    Args:
        config: How; what it says of files is not looked at.
        digits: On what.
        callbacks: Keras callbacks, as ``loop.fit`` calls them.
        keeper: Restores and saves the position of the run; None: nothing is written.
        strategy: Under which; None: what ``distributed.strategy`` chooses.

    Returns:
        The compiled model, and its history as ``loop.fit`` gives it.

    Raises:
        UsageError: The batch size does not divide among the replicas.
        NotFiniteError: The loss or the weights became NaN or infinite.
        StoppedError: The keeper was asked to stop, and has saved where the run is.
    """
    from trainer.data import augment, pipeline
    from trainer.distributed.strategy import check_batch_size, has_accelerator
    from trainer.models import cnn
    from trainer.training import loop

    if strategy is None:
        strategy = _strategy(config, cluster.resolve(os.environ)).strategy
    check_batch_size(config.batch_size, strategy.num_replicas_in_sync)
    with strategy.scope():
        model = cnn.from_config(config, len(digits.x_train))
    hooks = {"position": keeper.restore(model), "after_call": keeper.after_call} if keeper else {}
    dataset = pipeline.put_on_devices(
        digits,
        strategy=strategy if has_accelerator() else None,
        preprocess=cnn.preprocess,
        augment=augment.warp if config.augment == "affine" else None,
    )
    with _step(config, strategy).step(model) as forward:
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
            **hooks,
        )
    if config.precision == "mixed_bfloat16":  # The file is for everybody: of plain float32.
        with strategy.scope():
            plain = cnn.from_config(
                dataclasses.replace(config, precision="float32"), len(digits.x_train)
            )
        plain.set_weights(model.get_weights())
        model = plain
    return model, history


def _step(config: TrainConfig, strategy: "tf.distribute.Strategy") -> "StepChoice":
    from trainer.distributed.collectives import Workers
    from trainer.distributed.strategy import has_accelerator
    from trainer.models import fast_step

    return fast_step.choose(
        "off" if config.jit_compile else config.fast,  # XLA cannot compile the fast step.
        accelerator=has_accelerator(),
        optimizer=config.optimizer,
        threads=config.threads,
        replicas=Workers(strategy).local_replicas,
    )


def _load(config: TrainConfig) -> tuple["Digits", "Digits"]:
    """Returns the source, and of it what the run uses."""
    from trainer.data import sources

    source = sources.load(config.data)
    digits = source.first(config.train_limit, config.test_limit)
    if config.batch_size > len(digits.x_train):
        raise UsageError(
            f"batch_size must be at most the {len(digits.x_train)} training images. Received: "
            f"batch_size={config.batch_size}. Use --batch-size {len(digits.x_train)} or less."
        )
    return source, digits


def _strategy(config: TrainConfig, members: cluster.Cluster | None) -> "StrategyChoice":
    from trainer.distributed.strategy import create

    return create(
        config.strategy,
        cluster=members,
        gpus=config.gpus,
        startup_timeout=config.startup_timeout,
    )


def _announcement(config: TrainConfig, digits: "Digits") -> str:
    schedule = "" if config.schedule == "constant" else f" ({config.schedule})"
    return (
        f"{len(digits.x_train):,} training and {len(digits.x_test):,} test images ({config.data}), "
        f"epochs {config.epochs}, batch size {config.batch_size}, {config.optimizer} "
        f"{config.learning_rate:g}{schedule}, seed {config.seed}, threads {config.threads}"
    )


def _keeper(
    config: TrainConfig,
    facts: dict,
    strategy: "tf.distribute.Strategy",
    signals: Signals,
    watcher: "report.Watcher",
) -> "checkpoint.Keeper":
    from trainer.distributed.collectives import Workers
    from trainer.training.checkpoint import Keeper

    workers = Workers(strategy)
    facts["environment"] |= {
        "workers": workers.count,
        "replicas": strategy.num_replicas_in_sync,
    }
    return Keeper(
        config.output_dir,
        facts,
        finished_run=output.read_manifest(config.output_dir).get("run"),
        resume=config.resume,
        every=config.checkpoint_every,
        keep=config.keep_checkpoints,
        stop=lambda: signals.received,
        workers=workers,
        warn=lambda text: watcher.say(text, "notice"),
    )


def _compare_weights(model: "keras.Model", workers: "Workers", watcher: "report.Watcher") -> None:
    """Says what weights this worker has ended with, and whether all have the same."""
    if workers.count == 1:
        return
    sha256 = output.weights_sha256(model)
    same = workers.all_equal(bytes.fromhex(sha256))
    others = "the same weights as the others, bit for bit"
    if not same:
        others = "other weights than the others: their processors round differently"
    text = f"worker {workers.index} of {workers.count} has {others}: SHA-256 {sha256}"
    cli.write_termination_message(text)
    watcher.say(
        text,
        "weights",
        workers=workers.count,
        same=same,
        weights_sha256=sha256,
    )


def _save(
    config: TrainConfig,
    model: "keras.Model",
    history: dict[str, list[float]],
    facts: dict,
    start: float,
) -> dict:
    """Writes the files; returns the manifest."""
    metrics = {name: values[-1] for name, values in history.items() if name != "seconds"}
    facts |= {"metrics": metrics, "seconds": round(time.monotonic() - start, 3)}
    return output.save(config.output_dir, model, history, facts)


def _say_result(config: TrainConfig, manifest: dict, watcher: "report.Watcher") -> None:
    from trainer.reporting.bar import span

    metrics = manifest["metrics"]
    text = (
        f"test accuracy {metrics['val_accuracy']:.2%}, loss {metrics['val_loss']:.4f}, "
        f"after {span(manifest['seconds'])}\n"
        f"{config.output_dir / output.MODEL_FILE}  "
        f"{manifest['model']['bytes'] / 1e6:.1f} MB  "
        f"SHA-256 {manifest['model']['sha256']}"
    )
    cli.write_termination_message(text)
    watcher.say(
        text,
        "done",
        **{name: manifest[name] for name in ("model", "metrics", "seconds")},
    )


if __name__ == "__main__":
    sys.exit(main())
