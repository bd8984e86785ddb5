"""The command: trains the CNN and writes mnist.h5.

python -m trainer.task --epochs 2 --output-dir out
"""

import os
import platform
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import trainer
from trainer import cli, export
from trainer.config import TrainConfig
from trainer.errors import StoppedError, UsageError

if TYPE_CHECKING:  # --help loads none of these.
    import keras

    from trainer import checkpoint, data

PROG = "python -m trainer.task"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (``trainer.errors`` lists them)."""
    return cli.run(PROG, TrainConfig, train, argv)


def train(config: TrainConfig) -> dict:
    """Trains as the configuration says, shows how it goes, and saves what comes out.

    Returns:
        The manifest, as in mnist.json: ``model``, ``metrics``, ``config``, ``data``, ``versions``.

    Raises:
        TrainerError: One of its kinds, for whatever a user can cause or meet.
    """
    start = time.monotonic()
    with export.claim(config.output_dir), cli.Signals() as signals:
        try:
            # The data comes first: what is wrong with it shows before TensorFlow, which takes
            # seconds to start.
            source, digits = _load(config)
            if config.tensorflow_logs:
                os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0")

            from trainer import checkpoint, report, runtime

            runtime.set_threads(config.threads)
            facts = _facts(config, source, digits)
            with report.progress(config.log_format, batch_size=config.batch_size) as watcher:
                keeper = checkpoint.Keeper(
                    config.output_dir,
                    facts,
                    finished_run=export.finished_run(config.output_dir),
                    resume=config.resume,
                    every=config.checkpoint_every,
                    keep=config.keep_checkpoints,
                    stop=lambda: signals.received,
                    warn=lambda text: watcher.say(text, "notice", message=text),
                )
                signals.defer()
                watcher.say(_announcement(config, digits), "start", **facts)
                model, history = fit(config, digits, callbacks=[watcher], keeper=keeper)
                metrics = {name: values[-1] for name, values in history.items()}
                del metrics["seconds"]
                facts |= {"metrics": metrics, "seconds": round(time.monotonic() - start, 3)}
                manifest = export.save(config.output_dir, model, history, facts)
                keeper.finish()
                watcher.say(
                    f"test accuracy {metrics['val_accuracy']:.2%}, loss {metrics['val_loss']:.4f}, "
                    f"after {report.span(facts['seconds'])}\n"
                    f"{config.output_dir / export.MODEL_FILE}  "
                    f"{manifest['model']['bytes'] / 1e6:.1f} MB  "
                    f"SHA-256 {manifest['model']['sha256']}",
                    "done",
                    **{name: manifest[name] for name in ("model", "metrics", "seconds")},
                )
        except KeyboardInterrupt as interrupt:  # Nothing was under way, or it was the second one.
            left = f"What is in {config.output_dir} is as it was."
            if str(interrupt) == "SIGTERM":
                raise StoppedError(f"stopped by SIGTERM. {left}") from None
            raise KeyboardInterrupt(left) from None
    return manifest


def fit(
    config: TrainConfig,
    digits: "data.Digits",
    *,
    callbacks: Sequence["keras.callbacks.Callback"] = (),
    keeper: "checkpoint.Keeper | None" = None,
) -> tuple["keras.Model", dict[str, list[float]]]:
    """Trains a model on the digits.

    Args:
        config: How; what it says of files is not looked at.
        digits: On what.
        callbacks: Keras callbacks, as ``loop.fit`` calls them.
        keeper: Restores and saves the position of the run; None: nothing is written.

    Returns:
        The compiled model, and its history as ``loop.fit`` gives it.

    Raises:
        NotFiniteError: The loss became NaN or infinite.
        StoppedError: The keeper was asked to stop, and has saved where the run is.
    """
    from trainer import loop, model, pipeline
    from trainer.runtime import tf

    strategy = tf.distribute.get_strategy()
    with strategy.scope():
        cnn = model.build(
            optimizer=config.optimizer, learning_rate=config.learning_rate, seed=config.seed
        )
    hooks = {"position": keeper.restore(cnn), "after_call": keeper.after_call} if keeper else {}
    history = loop.fit(
        cnn,
        lambda epoch: pipeline.train_batches(
            digits.x_train,
            digits.y_train,
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=epoch,
        ),
        pipeline.test_batches(digits.x_test, digits.y_test, batch_size=config.batch_size),
        strategy=strategy,
        loss=model.LOSS,
        metrics=model.METRICS,
        epochs=config.epochs,
        preprocess=model.preprocess,
        steps_per_execution=config.steps_per_execution,
        callbacks=callbacks,
        **hooks,
    )
    return cnn, history


def _load(config: TrainConfig) -> tuple["data.Digits", "data.Digits"]:
    """Returns the source, and of it what the run uses."""
    from trainer import data

    source = data.load(config.data)
    digits = source.first(config.train_limit, config.test_limit)
    if config.batch_size > len(digits.x_train):
        raise UsageError(
            f"batch_size must be at most the {len(digits.x_train)} training images. Received: "
            f"batch_size={config.batch_size}. Use --batch-size {len(digits.x_train)} or less."
        )
    return source, digits


def _facts(config: TrainConfig, source: "data.Digits", digits: "data.Digits") -> dict:
    """Returns what decides the outcome of a run, for its manifest."""
    import numpy as np

    from trainer.runtime import keras, tf

    return {
        "run": uuid.uuid4().hex,
        "config": config.as_dict(),
        "data": {
            "source": config.data,
            "sha256": source.sha256,
            "train_examples": len(digits.x_train),
            "test_examples": len(digits.x_test),
        },
        "versions": {
            "digits-trainer": trainer.__version__,
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
        },
        # What else changes the last bits of a result.
        "environment": {
            "processor": _processor(),
            "threads": config.threads,
            "TF_ENABLE_ONEDNN_OPTS": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "the processor's"),
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _announcement(config: TrainConfig, digits: "data.Digits") -> str:
    return (
        f"{len(digits.x_train):,} training and {len(digits.x_test):,} test images ({config.data}), "
        f"epochs {config.epochs}, batch size {config.batch_size}, {config.optimizer} "
        f"{config.learning_rate:g}, seed {config.seed}, threads {config.threads}"
    )


if __name__ == "__main__":
    sys.exit(main())
