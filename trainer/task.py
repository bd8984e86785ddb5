"""The command: trains the CNN and writes mnist.h5.

python -m trainer.task --epochs 2 --output-dir out
"""

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import trainer
from trainer import cli, export
from trainer.config import TrainConfig
from trainer.errors import UsageError

if TYPE_CHECKING:  # --help loads none of these.
    import keras

    from trainer import data

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
    # Folder and data come first: what is wrong with them shows before TensorFlow, which takes
    # seconds to start.
    with export.claim(config.output_dir):
        try:
            source, digits = _load(config)
            if config.tensorflow_logs:
                os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0")

            from trainer import report, runtime

            runtime.set_threads(config.threads)
            facts = _facts(config, source, digits)
            with (
                report.progress(config.log_format, batch_size=config.batch_size) as watcher,
                cli.deferred_interrupt() as check_interrupt,
            ):
                watcher.say(_announcement(config, digits), "start", **facts)
                model, history = fit(
                    config, digits, callbacks=[watcher], after_call=check_interrupt
                )
                metrics = {name: values[-1] for name, values in history.items()}
                del metrics["seconds"]
                facts |= {"metrics": metrics, "seconds": round(time.monotonic() - start, 3)}
                manifest = export.save(config.output_dir, model, history, facts)
                watcher.say(
                    f"test accuracy {metrics['val_accuracy']:.2%}, loss {metrics['val_loss']:.4f}, "
                    f"after {report.span(facts['seconds'])}\n"
                    f"{config.output_dir / export.MODEL_FILE}  "
                    f"{manifest['model']['bytes'] / 1e6:.1f} MB  "
                    f"SHA-256 {manifest['model']['sha256']}",
                    "done",
                    **{name: manifest[name] for name in ("model", "metrics", "seconds")},
                )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"Nothing was written to {config.output_dir}, and what was there is as it was."
            ) from None
    return manifest


def fit(
    config: TrainConfig,
    digits: "data.Digits",
    *,
    callbacks: Sequence["keras.callbacks.Callback"] = (),
    after_call: Callable[[], None] = lambda: None,
) -> tuple["keras.Model", dict[str, list[float]]]:
    """Trains a new model on the digits; writes nothing. The last two arguments are ``loop.fit``'s.

    Returns:
        The compiled model, and its history as ``loop.fit`` gives it.

    Raises:
        NotFiniteError: The loss became NaN or infinite.
    """
    from trainer import loop, model, pipeline
    from trainer.runtime import tf

    strategy = tf.distribute.get_strategy()
    with strategy.scope():
        cnn = model.build(
            optimizer=config.optimizer, learning_rate=config.learning_rate, seed=config.seed
        )
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
        after_call=after_call,
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
    }


def _announcement(config: TrainConfig, digits: "data.Digits") -> str:
    return (
        f"{len(digits.x_train):,} training and {len(digits.x_test):,} test images ({config.data}), "
        f"epochs {config.epochs}, batch size {config.batch_size}, {config.optimizer} "
        f"{config.learning_rate:g}, seed {config.seed}, threads {config.threads}"
    )


if __name__ == "__main__":
    sys.exit(main())
