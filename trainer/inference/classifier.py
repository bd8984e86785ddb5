"""From pictures to predictions: decode each picture, find its digits, classify them.

    with classifier.start(load_digits(Path("mnist.h5")), processes=2) as classifier:
        for answer in classifier.classify([("seven.jpg", Path("seven.jpg"))]):
            print(answer.name, answer.error or answer.predictions[0].label)

Or classify whole pictures, where a shape is given. ``trainer.predict`` and ``trainer.serve`` are
built on it. ``trainer.evaluate``, whose images have their size already, needs the model alone.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from trainer.errors import TrainerError
from trainer.inference import decoders, model_file, sandbox
from trainer.inference.digit import SIZE, Digit, DigitCount

# Pictures in one group, whose digits are classified together: few at first, for an early answer.
FIRST_GROUP, GROUP = 16, 64

BATCH = 256  # Digits in one forward pass, which takes 60 MB of memory.

Picture = tuple[str, Path | bytes]  # Its name in errors; its file, or that file's content.

# From uint8 (n, 28, 28), n at least 1, 0 for background and 255 for ink, to float32 (n, 10); or
# from uint8 (n, height, width, channels) to float32 (n, classes).
Predict = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the model predicts for a digit, or a picture.

    Attributes:
        digit: Its pixels, and where it was found.
        probabilities: float32 (classes,).
    """

    digit: Digit
    probabilities: np.ndarray

    @property
    def label(self) -> int:
        """The most probable class."""
        return int(np.argmax(self.probabilities))

    @property
    def probability(self) -> float:
        """The probability of that class."""
        return float(self.probabilities.max())


def _no_picture() -> np.ndarray:
    return np.empty((0, 0), np.uint8)


@dataclasses.dataclass(frozen=True)
class Answer:
    """The result for a picture: an error, or predictions.

    Attributes:
        name: Its name in errors, control characters escaped.
        error: Why there are no predictions.
        picture: uint8 (h, w), the picture as it was searched for digits, or (h, w, channels), as a
            whole; (0, 0) with an error.
        predictions: One for each digit; at least one where there is no error.
    """

    name: str
    error: TrainerError | None = None
    picture: np.ndarray = dataclasses.field(default_factory=_no_picture)
    predictions: tuple[Prediction, ...] = ()


@contextlib.contextmanager
def start(
    load: Callable[[], Predict], *, processes: int, shape: decoders.Shape | None = None
) -> Iterator["Classifier"]:
    """Starts the processes that decode pictures, and ends them with the block.

    Args:
        load: As ``Classifier`` takes it: ``load_digits(path)``, for example.
        processes: Pictures decoded at a time (``decoders.start``).
        shape: As ``Classifier`` takes it.
    """
    with decoders.start(processes) as decode:
        yield Classifier(decode, load, shape)


class Classifier:
    """Classifies the digits in pictures, or whole pictures.

    Args:
        decode: As ``decoders.start`` yields it.
        load: Loads the model; called once, before the first prediction.
        shape: Height, width and channels that whole pictures are read with; None: their digits are
            searched for.
    """

    def __init__(
        self,
        decode: decoders.Decode,
        load: Callable[[], Predict],
        shape: decoders.Shape | None = None,
    ) -> None:
        self._decode = decode
        self._load = load
        self._shape = shape

    def load(self) -> None:
        """Loads and compiles the model now, rather than with the first picture.

        Raises:
            TrainerError: The model cannot be loaded.
        """
        self._predict(np.zeros((1, *(self._shape or (SIZE, SIZE))), np.uint8))

    def classify(
        self, pictures: Iterable[Picture], *, digits: DigitCount = "one"
    ) -> Iterator[Answer]:
        """Yields an answer for each picture, in their order. The first pictures are decoded while
        the model is loaded, and the next ones while it classifies those before.

        Args:
            pictures: Names and files, or their content.
            digits: How many digits a picture shows, where no shape was given.

        Raises:
            TrainerError: The model cannot be loaded, as in ``load``.
            NotFiniteError: The model's probabilities are not finite.
        """
        remaining = iter(pictures)
        group = self._submit(itertools.islice(remaining, FIRST_GROUP), digits)
        while group:
            predict = self._predict
            decoded = [(name, *_result(future)) for name, future in group]
            group = self._submit(itertools.islice(remaining, GROUP), digits)
            pixels = [digit.pixels for *_, found in decoded for digit in found]
            probabilities = iter(predict(np.stack(pixels)) if pixels else ())
            for name, error, picture, found in decoded:
                yield Answer(name, error, picture, tuple(map(Prediction, found, probabilities)))

    def _submit(
        self, pictures: Iterable[Picture], digits: DigitCount
    ) -> list[tuple[str, Future[decoders.Decoded]]]:
        return [
            (sandbox.printable(name), self._decode(source, name, self._shape or digits))
            for name, source in pictures
        ]

    @functools.cached_property
    def _predict(self) -> Predict:
        return self._load()


def load_digits(path: Path, threads: int | None = None) -> Callable[[], Predict]:
    """Returns what loads a model of digits.

    Args:
        path: An ``mnist.h5``.
        threads: Threads inside one TensorFlow operation (``runtime.set_threads``); None: unchanged.

    Returns:
        A function for ``Classifier``, which raises:

        - InputError: the file is missing or cannot be read;
        - DataError: it is not a model of the digits CNN, or damaged;
        - ConfigurationError: there is no TensorFlow, or it runs with another number of threads.
    """

    def load() -> Predict:
        model = model_file.load(path, threads=threads)

        from trainer.models import cnn

        predict = cnn.predictor(model)

        def predict_in_batches(images: np.ndarray) -> np.ndarray:
            starts = range(0, len(images), BATCH)
            return np.concatenate([predict(images[start : start + BATCH]) for start in starts])

        return predict_in_batches

    return load


def _result(
    future: Future[decoders.Decoded],
) -> tuple[TrainerError | None, np.ndarray, list[Digit]]:
    try:
        return None, *future.result()
    except TrainerError as error:
        return error, _no_picture(), []
