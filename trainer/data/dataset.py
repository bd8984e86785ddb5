"""What a data set is: examples by number, so that any order, any share of an epoch, and a run that
goes on in the middle of one, read only what they use.

    dataset = arrays.ArrayDataset((x, y))
    len(dataset), dataset.spec, dataset.digest
    for x, y in dataset.batches(np.array([7, 3, 5]), batch_size=2): ...

``trainer.data.examples`` makes one of what a user gives.
"""

import abc
import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from trainer.data.order import count_kept, split_numbers
from trainer.errors import UsageError
from trainer.runtime import keras, tf


class Dataset(abc.ABC):
    """Examples by number.

    Attributes:
        classes: Names of the classes, in the order of their numbers; None where they have none.
        notice: A sentence for the user about what this kind of data cannot do; or empty.
        sorted_by_class: Whether the first or the last examples may be of one class alone.
    """

    classes: Sequence[str] | None = None
    notice: ClassVar[str] = ""
    sorted_by_class: bool = False

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns the number of examples."""

    @property
    @abc.abstractmethod
    def spec(self) -> tuple:
        """Shapes and dtypes of one example: ``(x, y)`` or ``(x, y, sample_weight)``, each a
        ``tf.TensorSpec``, or a tuple or dictionary of them.
        """

    @property
    @abc.abstractmethod
    def digest(self) -> str:
        """What is equal for equal data, and changes with them, as hexadecimal digits."""

    @abc.abstractmethod
    def batches(self, numbers: np.ndarray, batch_size: int) -> tf.data.Dataset:
        """Returns examples in batches, read as they are iterated over.

        Args:
            numbers: Numbers of the examples, int64 (n,), in the order to return them.
            batch_size: Examples in a batch; the last one may have fewer.

        Returns:
            Batches of the structure of ``spec``, each component (batch_size, ...).
        """

    def explain(self, error: Exception) -> Exception:
        """Returns the reason for an error of reading that TensorFlow has raised."""
        return error


@dataclasses.dataclass(frozen=True)
class Splits:
    """The parts of a data set.

    Attributes:
        train: What is trained on; None where there is nothing of the kind.
        validation: What is measured after each epoch; None: there is none.
        test: What the trained model is judged on; None: there is none.
    """

    train: "Dataset | None"
    test: "Dataset | None"
    validation: "Dataset | None" = None


class Derived(Dataset):
    """A data set that is made of another one, whose properties it has.

    Args:
        dataset: The other one.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.classes = dataset.classes
        self.sorted_by_class = dataset.sorted_by_class

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def spec(self) -> tuple:
        """That of the other one."""
        return self.dataset.spec

    @property
    def digest(self) -> str:
        """That of the other one."""
        return self.dataset.digest

    def explain(self, error: Exception) -> Exception:
        """Returns the reason that the other one has for an error."""
        return self.dataset.explain(error)


class Subset(Derived):
    """Some examples of a data set.

    Args:
        dataset: The whole.
        numbers: Numbers of the examples, int64 (n,).
    """

    def __init__(self, dataset: Dataset, numbers: np.ndarray) -> None:
        super().__init__(dataset)
        self.numbers = np.asarray(numbers, np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    @functools.cached_property
    def digest(self) -> str:
        """Of the whole, and which part it is."""
        return _combined(self.dataset.digest, hashlib.sha256(self.numbers.tobytes()).hexdigest())

    def batches(self, numbers: np.ndarray, batch_size: int) -> tf.data.Dataset:
        """Returns batches of the whole."""
        return self.dataset.batches(self.numbers[numbers], batch_size)


class ClassWeighted(Derived):
    """A data set whose sample weights are those of the classes.

    Args:
        dataset: Of examples ``(x, y)``, y one output: a class number, or one-hot.
        class_weight: Weights by class number; 1 where it is missing.

    Raises:
        UsageError: There are several outputs, or sample weights.
    """

    def __init__(self, dataset: Dataset, class_weight: Mapping[int, float]) -> None:
        spec = dataset.spec
        if len(spec) != 2 or isinstance(spec[1], (tuple, dict)):
            raise UsageError(
                "class_weight is for one output, without sample weights. Received: "
                f"{'sample weights, too' if len(spec) > 2 else 'several outputs'}. Multiply the "
                "weights yourself, and give them as sample_weight."
            )
        super().__init__(dataset)
        self.class_weight = dict(class_weight)

    @property
    def spec(self) -> tuple:
        """That without weights, and a number."""
        return (*self.dataset.spec, tf.TensorSpec((), keras.config.floatx()))

    @property
    def digest(self) -> str:
        """Of the examples and the weights."""
        return _combined(self.dataset.digest, sorted(self.class_weight.items()))

    def batches(self, numbers: np.ndarray, batch_size: int) -> tf.data.Dataset:
        """Returns batches with weights."""

        def add_weights(x: Any, y: tf.Tensor) -> tuple:
            label = y
            if y.shape.rank > 1 and y.shape[-1] > 1:
                label = tf.argmax(y, axis=-1)
            label = tf.reshape(label, (tf.shape(y)[0], -1))[:, 0]
            if label.dtype.is_floating:
                label = tf.round(label)
            weight = tf.ones(tf.shape(label), keras.config.floatx())
            for number, value in self.class_weight.items():
                chosen = tf.equal(label, tf.cast(number, label.dtype))
                weight = tf.where(chosen, tf.cast(value, weight.dtype), weight)
            return x, y, weight

        return self.dataset.batches(numbers, batch_size).map(add_weights)


class Renumbered(Derived):
    """A data set with the class numbers of another one.

    Args:
        dataset: Of examples ``(x, y)``, y a class number.
        classes: Names of the other's classes, among which are this one's.
    """

    def __init__(self, dataset: Dataset, classes: Sequence[str]) -> None:
        super().__init__(dataset)
        self.classes = list(classes)
        self.numbers = [self.classes.index(name) for name in dataset.classes or ()]

    @property
    def digest(self) -> str:
        """Of the data and the numbers."""
        return _combined(self.dataset.digest, self.numbers)

    def batches(self, numbers: np.ndarray, batch_size: int) -> tf.data.Dataset:
        """Returns batches with the other numbers."""
        numbers_of = tf.constant(self.numbers, tf.int32)
        return self.dataset.batches(numbers, batch_size).map(
            lambda x, y: (x, tf.gather(numbers_of, y))
        )


class OneHot(Derived):
    """A data set whose class numbers are one-hot, as a loss with label smoothing wants them.

    Args:
        dataset: Of examples ``(x, y)``, y a class number.
        classes: Number of classes.
    """

    def __init__(self, dataset: Dataset, classes: int) -> None:
        super().__init__(dataset)
        self.depth = classes

    @property
    def spec(self) -> tuple:
        """That of the class numbers, but for y: (classes,), of Keras' type."""
        return self.dataset.spec[0], tf.TensorSpec((self.depth,), keras.config.floatx())

    def batches(self, numbers: np.ndarray, batch_size: int) -> tf.data.Dataset:
        """Returns batches with one-hot labels."""
        dtype = keras.config.floatx()
        return self.dataset.batches(numbers, batch_size).map(
            lambda x, y: (x, tf.one_hot(y, self.depth, dtype=dtype))
        )


def split(dataset: Dataset, share: float, *, seed: int | None = None) -> tuple[Dataset, Dataset]:
    """Returns a data set without some of its examples, and those.

    Args:
        dataset: The whole.
        share: Share of the examples in the second part.
        seed: Of the choice, in which every class of a sorted data set has its share; None: they are
            the last ones, as ``validation_split`` of Keras' ``fit`` takes them.

    Raises:
        UsageError: One part would be empty.
    """
    if seed is not None:
        kept, held = split_numbers(len(dataset), share, seed)
    else:
        kept, held = np.split(np.arange(len(dataset)), [count_kept(len(dataset), share)])
    return Subset(dataset, kept), Subset(dataset, held)


def _combined(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
