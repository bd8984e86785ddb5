"""Train a CNN on handwritten digits, or any Keras model on your data, on one device or many.

    import trainer

    config = trainer.TrainConfig(epochs=2, output_dir="out")
    model, history = trainer.train(config)          # out/mnist.h5, out/report.html, …
    data = trainer.load_data("bundled")
    trainer.evaluate(model, data).accuracy
    model = trainer.load_model("out/mnist.h5")

    history = trainer.fit(your_model, (x, y), epochs=10, output_dir="out")  # for model.fit

Importing the package loads nothing else; each function loads what it needs. The first that needs
TensorFlow sets TF_ENABLE_ONEDNN_OPTS=1 before it imports it, unless the variable is set: it affects
the last bits of results, so it is the same here and in ``python -m trainer.task``. ``train`` sets
TensorFlow's threads (``config.threads``), its use of TensorFloat-32 (``config.precision``), its
visible GPUs and memory growth (``config.gpus``), and with ``config.deterministic`` op determinism,
for the whole process; ``fit`` sets none of them but the GPUs and their memory growth. While they
train in the main thread, they handle SIGINT, SIGTERM and SIGHUP. For other networks than that for
digits ``train`` sets the seeds of Python, NumPy and TensorFlow (``config.seed``). They change
nothing else in the process.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, cast, overload

# ``python -m trainer.task``, of which Python makes "-m" until the module is found, puts the current
# folder first in the path, and so a user's random.py or keras.py before Python's and Keras' own. It
# has found this package; nothing else is to be taken from there, pathlib included. (PYTHONSAFEPATH
# and -P do the same, and earlier.)
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:  # noqa: PTH109
    del sys.path[0]

from trainer.config import TrainConfig

if TYPE_CHECKING:
    from pathlib import Path

    import keras

    from trainer.data.dataset import Splits
    from trainer.data.digits import Digits
    from trainer.reporting.scores import Scores
    from trainer.training.feed import Data

__version__ = "0.1.0"

__all__ = ["TrainConfig", "evaluate", "fit", "is_chief", "load_data", "load_model", "train"]


def train(
    config: TrainConfig,
    data: "Digits | Splits | None" = None,
    *,
    callbacks: Sequence["keras.callbacks.Callback"] = (),
) -> tuple["keras.Model", dict[str, list[float]]]:
    """Trains as ``python -m trainer.task`` does, in this process: the same weights, bit for bit,
    and the same files in ``config.output_dir``. An unfinished run there is resumed.

    Args:
        config: The configuration of the run.
        data: The data set to train on; None: the one that ``config.data`` names.
        callbacks: Keras callbacks. Those of batches are called once per call of the compiled
            function, which runs several steps: at its beginning with the number of the first
            batch, at its end with that of the last. ``params["verbose"]`` is 0.

    Returns:
        The compiled model, and its history as ``History.history`` of Keras, with ``seconds``.

    Raises:
        ConfigurationError: The configuration cannot run here: for example, the environment
            describes several workers, each of which needs a parent process, as the command has.
        TrainerError: Any other error that the command would end with; see ``trainer.errors``.
        KeyboardInterrupt: Ctrl-C before the first step, or a second one.
    """
    from trainer.training import run

    _check_alone(config, "trainer.task")
    # None is for the pod of a Job that has finished already.
    trained = cast("run.Run", run.train(config, data=data, callbacks=callbacks))
    return trained.model, trained.history


def fit(
    model: "keras.Model",
    data: "Data",
    *,
    validation_data: "Data | None" = None,
    validation_split: float = 0.0,
    epochs: int = 1,
    batch_size: int = 32,
    shuffle: bool = True,
    class_weight: Mapping[int, float] | None = None,
    callbacks: Sequence["keras.callbacks.Callback"] = (),
    verbose: int | str = "auto",
    output_dir: "str | Path | None" = None,
    config: TrainConfig | None = None,
) -> "keras.callbacks.History":
    """Trains a compiled Keras model as ``model.fit`` does, on one device or several, so that it
    can be stopped at any step and resumed to the same bits.

    Losses, metrics, weights and optimizer are those of the model's ``compile``. On several devices
    each batch is divided among them; gradients are summed before the optimizer sees them.

    Args:
        model: Compiled. It may be made without any strategy.
        data: ``(x, y)`` or ``(x, y, sample_weight)``, each an array, or a list, tuple or dictionary
            of arrays for models of several inputs or outputs; the examples are the first axis. Or
            any object with ``__len__`` and ``__getitem__``, which returns such a tuple for the
            number of one example; a ``trainer.data.dataset.Dataset``, as
            ``trainer.data.folders.ImageFolder`` is; or a ``tf.data.Dataset`` of batches.
        validation_data: The same, evaluated after each epoch.
        validation_split: Share of the examples that is used as validation data in place of
            ``validation_data``: the last ones; of a folder of pictures, which is sorted by class,
            those that ``config.seed`` chooses.
        epochs: Number of epochs.
        batch_size: Examples in a step, over all devices together; not for a ``tf.data.Dataset``.
        shuffle: Whether each epoch has an order of its own, which ``config.seed`` and the number of
            the epoch decide; else it is that of the data.
        class_weight: Weight of each class in the loss, by its number, 1 where it is missing. As in
            Keras, only for a model of one output, without sample weights.
        callbacks: Keras callbacks. What they remember is in the checkpoints. Those of batches are
            called once per call of the compiled function, which runs several steps.
        verbose: As in ``model.fit``.
        output_dir: Folder for the checkpoints of a run that is not finished. The same call resumes
            it there. None: nothing is written, and nothing resumed.
        config: How to train: of its fields, ``seed``, ``strategy``, ``gpus``,
            ``steps_per_execution``, ``checkpoint_every``, ``keep_checkpoints``, ``resume`` and
            ``startup_timeout``.

    Returns:
        The history, as ``model.fit`` returns it.

    Raises:
        UsageError: An argument has a value that it cannot have.
        DataError: The data do not belong together.
        ConfigurationError: The model cannot be trained so; the unfinished run in ``output_dir`` is
            another one; the devices that were asked for do not exist.
        OutputError: A checkpoint cannot be written.
        StoppedError: SIGINT, SIGTERM or SIGHUP; with an ``output_dir``, the same call goes on.
        NotFiniteError: The loss or a weight became NaN or infinite.
    """
    from trainer.training import fitting

    config = config or TrainConfig()
    _check_alone(config, "trainer.script")
    return fitting.fit(
        model,
        data,
        validation_data=validation_data,
        validation_split=validation_split,
        epochs=epochs,
        batch_size=batch_size,
        shuffle=shuffle,
        class_weight=class_weight,
        callbacks=callbacks,
        verbose=verbose,
        output_dir=output_dir,
        config=config,
    )


@overload
def evaluate(model: "keras.Model", data: "Digits", *, batch_size: int = ...) -> "Scores": ...


@overload
def evaluate(
    model: "keras.Model",
    data: "Data",
    *,
    batch_size: int = ...,
    callbacks: Sequence["keras.callbacks.Callback"] = ...,
    verbose: int | str = ...,
    config: TrainConfig | None = ...,
) -> dict[str, float]: ...


def evaluate(
    model: "keras.Model",
    data: "Digits | Data",
    *,
    batch_size: int = 128,
    callbacks: Sequence["keras.callbacks.Callback"] = (),
    verbose: int | str = "auto",
    config: TrainConfig | None = None,
) -> "Scores | dict[str, float]":
    """Measures a model: on the test images of the digits, or as ``model.evaluate`` does.

    Args:
        model: From ``train`` or ``load_model``; or compiled, for data of your own.
        data: From ``load_data``; or whatever ``fit`` takes.
        batch_size: Examples that go through the model at once, over all devices together.
        callbacks: Keras callbacks, for data of your own.
        verbose: As in ``model.evaluate``, for data of your own.
        config: As in ``fit``, for data of your own: ``strategy``, ``gpus``,
            ``steps_per_execution`` and ``startup_timeout``.

    Returns:
        For the digits accuracy, loss, calibration, confusion matrix, and the mistakes. For data of
        your own, loss and metrics by name.

    Raises:
        NotFiniteError: The model gives NaN: its weights overflow.
        TrainerError: For data of your own, the errors of ``fit``.
    """
    from trainer.data.digits import Digits

    if isinstance(data, Digits):
        from trainer.models import cnn
        from trainer.reporting import scores

        probabilities = cnn.probabilities(model, data.x_test, batch_size=batch_size)
        return scores.score(data.y_test, probabilities)

    from trainer.training import fitting

    config = config or TrainConfig()
    _check_alone(config, "trainer.script")
    return fitting.evaluate(
        model,
        data,
        batch_size=batch_size,
        callbacks=callbacks,
        verbose=verbose,
        config=config,
    )


def load_data(source: "str | os.PathLike[str]" = "bundled") -> "Digits | Splits":
    """Loads a data set: ``bundled``, a path, ``keras`` or ``tfds:NAME``, as ``TrainConfig.data``.

    Returns:
        Images uint8 (n, 28, 28) and labels uint8 (n,), for training and for testing; of images
        that are no digits, data sets ``train``, ``test`` and ``validation``, which ``fit`` takes.

    Raises:
        InputError: The source is missing, unreadable or cannot be reached.
        DataError: Its content is not a valid data set.
        ConfigurationError: The package that the source needs is not installed.
    """
    from trainer.data import sources

    return sources.load(os.fspath(source))


def load_model(path: "str | Path") -> "keras.Sequential":
    """Loads the weights of an ``mnist.h5`` of unknown origin: no code in the file is run.

    Returns:
        The compiled model. Input: float32 (n, 28, 28, 1) from 0 to 1. Output: float32 (n, 10),
        probabilities.

    Raises:
        InputError: The file is missing or cannot be read.
        DataError: It is damaged, or a model of another network.
    """
    from pathlib import Path

    from trainer.inference import model_file

    return model_file.load(Path(path))


def is_chief() -> bool:
    """Tells whether this process is the one that writes files: alone, or worker 0 of several.

    It is for scripts that save or print on their own beside ``fit``.
    """
    from trainer.distributed import worker_context

    context = worker_context.current()
    return context is None or context.cluster.is_chief


def _check_alone(config: TrainConfig, command: str) -> None:
    """Raises ``ConfigurationError`` where the environment describes several workers, and this is
    none of those that a command connects.
    """
    from trainer.distributed import cluster, worker_context
    from trainer.errors import ConfigurationError

    if config.strategy == "one" or (command == "trainer.script" and worker_context.current()):
        return
    if workers := cluster.resolve(os.environ):
        raise ConfigurationError(
            "Expected one process: several workers need the parent processes that python -m "
            f"{command} and python -m trainer.launch start. Received: TF_CONFIG, "
            f"TRAINER_WORKERS or a Slurm step with {len(workers.workers)} workers. Use one of "
            "those commands, or strategy='one' to train in this process alone."
        )


class _Package(ModuleType):
    """Keeps ``evaluate`` a function when the command's module of that name is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "evaluate" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
