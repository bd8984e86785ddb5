"""What a run trains: data, and a network for them.

    workload.prepare(strategy)
    model, history = workload.fit(...)

``workloads`` makes one.
"""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trainer.config import TrainConfig
from trainer.errors import UsageError
from trainer.files import Names

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

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
    def augmented(self, count: int) -> Iterator[np.ndarray]:
        """Yields the first training images as the augmentation makes them in the first epoch, uint8
        (height, width[, channels]); none where there is no augmentation.
        """

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


def no_test_images(config: TrainConfig) -> UsageError:
    """Returns the error about data of which nothing is left to measure the model on."""
    return UsageError(
        f"Expected images to measure the model on, in {config.data}. Received: training images "
        "alone. Use validation_split=0.2 to keep a fifth of them for it."
    )
