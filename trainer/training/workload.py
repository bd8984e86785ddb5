"""What a run trains: data, and a network for them.

    workload = load(config)             # starts TensorFlow for images that are no digits
    workload.prepare(strategy)
    model, history = workload.fit(...)

``Digits`` on the network for digits have a training step and kernels of their own
(``digits_workload``); all else is trained as ``trainer.fit`` does it (``model_workload``).
"""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trainer.config import TrainConfig
from trainer.data.digits import Digits
from trainer.errors import UsageError
from trainer.files import Names

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from trainer.data.dataset import Splits
    from trainer.models.fast_step import StepChoice
    from trainer.reporting.charts import Pictures
    from trainer.training.position import Position


class Predictions(NamedTuple):
    """What a model predicts for the images that judge it.

    Attributes:
        labels: Their class numbers, integers (n,).
        probabilities: float32 (n, classes).
        images: Those images, uint8 (k, height, width[, channels]) for an array of k numbers.
        classes: Names of the classes.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    images: "Pictures"
    classes: Sequence[str]


class Workload(abc.ABC):
    """Data and a network.

    Attributes:
        names: Names of the files of the trained model.
        train_examples: Number of examples that are trained on.
        judged: What ``predictions`` are of: ``test`` or ``validation``.
    """

    names: Names
    train_examples: int
    judged: str = "test"

    @property
    @abc.abstractmethod
    def data(self) -> dict:
        """The data, as the run manifest describes them."""

    @abc.abstractmethod
    def summary(self) -> str:
        """Returns the numbers of examples, for the line with which a run begins."""

    @abc.abstractmethod
    def notices(self) -> Iterator[str]:
        """Yields sentences for the user about the data."""

    @property
    @abc.abstractmethod
    def bytes_in_memory(self) -> int:
        """What the data take of the memory, beside what is read as it is needed."""

    @abc.abstractmethod
    def build(self) -> "keras.Model":
        """Returns the network, compiled and with all its variables.

        Raises:
            UsageError: There is none of its name, or a setting is not for it.
            ConfigurationError: It cannot be trained.
        """

    @abc.abstractmethod
    def find_step(self, *, accelerator: bool) -> "StepChoice":
        """Tells which training step is used, before it is verified."""

    @abc.abstractmethod
    def prepare(self, strategy: "tf.distribute.Strategy") -> None:
        """Makes what takes TensorFlow's devices, once the strategy is constructed.

        Raises:
            ConfigurationError: The model cannot be trained, or another worker has another one.
        """

    @abc.abstractmethod
    def fit(
        self,
        *,
        strategy: "tf.distribute.Strategy",
        step: "StepChoice",
        callbacks: Sequence["keras.callbacks.Callback"],
        begin: "Callable[[keras.Model], Position]",
        after_call: "Callable[[Position], None]",
        notify: Callable[[str], None],
    ) -> tuple["keras.Model", dict[str, list[float]]]:
        """Trains the network; returns it, compiled, and its history as ``loop.fit`` returns it."""

    @abc.abstractmethod
    def release(self) -> None:
        """Forgets the training data."""

    @abc.abstractmethod
    def predictions(
        self, model: "keras.Model", *, batch_size: int, after_batch: Callable[[], None]
    ) -> Predictions:
        """Returns what a trained model, on one device, predicts for the images that judge it."""

    def test(self, predict: Callable[[], Predictions]) -> Mapping[str, float]:
        """Returns the metrics of the test images, where they were not measured in training."""
        if "validation_examples" not in self.data or self.judged != "test":
            return {}
        from trainer.reporting import scores

        predicted = predict()
        found = scores.score(predicted.labels, predicted.probabilities)
        return {"test_loss": found.loss, "test_accuracy": found.accuracy}


def load(config: TrainConfig, data: "Digits | Splits | None" = None) -> Workload:
    """Loads the data of a run.

    Args:
        config: The run's.
        data: Images to train on; None: those that ``config.data`` names.

    Raises:
        UsageError: A limit, a split or the batch size does not fit their number.
        TrainerError: As ``sources.load`` raises it.
    """
    from trainer.data import sources

    source: Digits | Splits = (
        sources.load(config.data, image_size=config.height_and_width, skip_bad=config.skip_bad)
        if data is None
        else data
    )
    workload: Workload
    if isinstance(source, Digits) and config.model == "cnn":
        from trainer.training.digits_workload import DigitsWorkload

        workload = DigitsWorkload(config, source)
    else:
        from trainer.training.model_workload import ModelWorkload

        workload = ModelWorkload(config, source)
    if config.early_stopping and "validation_examples" not in workload.data:
        raise UsageError(
            "early_stopping takes validation images: the test images judge the model afterwards. "
            f"Received: {config.data}, without any. Use validation_split=0.1, for example."
        )
    if config.batch_size > workload.train_examples:
        raise UsageError(
            f"batch_size must be at most the {workload.train_examples} training images. Received: "
            f"batch_size={config.batch_size}. Use batch_size={workload.train_examples} or less."
        )
    return workload


def no_test_images(config: TrainConfig) -> UsageError:
    """Returns the error about data of which nothing is left to measure the model on."""
    return UsageError(
        f"Expected images to measure the model on, in {config.data}. Received: training images "
        "alone. Use validation_split=0.2 to keep a fifth of them for it."
    )
