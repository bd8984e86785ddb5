"""Metrics of a classifier, from labels and predicted probabilities.

    found = scores.score(labels, probabilities)
    found.accuracy, found.ece, found.worst[:10]

It needs neither Keras nor TensorFlow.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

MATRIX = 25  # classes of a confusion matrix in plain text, at most
BINS = 15  # as in Guo et al. (2017)
EPSILON = 1e-7  # the default of ``keras.config.epsilon()``


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Metrics over n examples of k classes. The predicted class is the most probable one, and its
    probability is the confidence of the prediction.

    Attributes:
        accuracy: Fraction of the examples whose class is predicted.
        loss: Mean of ``-log(p)``, where p is the probability of the true class, as Keras'
            ``categorical_crossentropy`` computes it from probabilities: divided by their sum and
            clipped to 1e-7 and 1 - 1e-7.
        ece: Expected calibration error over the bins below::

                ECE = sum over bins b of  |b| / n * | accuracy(b) - confidence(b) |

            where confidence(b) is the mean confidence in b: Guo et al. (2017), equation 3,
            https://arxiv.org/abs/1706.04599. It is 0 if of the predictions made with 90%
            confidence 90% are correct.
        confusion: Integers (k, k): number of examples by true class (row) and predicted class
            (column).
        precision: (k,), by predicted class; NaN where there is no prediction.
        recall: (k,), by true class; NaN where there is no example.
        bin_edges: (BINS + 1,), from 0 to 1 in equal steps. A bin is open at its lower edge and
            closed at its upper one.
        bin_counts: Integers (BINS,), number of examples.
        bin_accuracy: (BINS,), accuracy; NaN in an empty bin.
        bin_confidence: (BINS,), mean confidence; NaN in an empty bin.
        worst: Integers (mistakes,), indices of the misclassified examples by falling confidence.
    """

    accuracy: float
    loss: float
    ece: float
    confusion: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    bin_edges: np.ndarray
    bin_counts: np.ndarray
    bin_accuracy: np.ndarray
    bin_confidence: np.ndarray
    worst: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Integers (k,), number of examples by true class."""
        return self.confusion.sum(axis=1)

    @property
    def examples(self) -> int:
        """Number of examples."""
        return int(self.confusion.sum())


def score(labels: np.ndarray, probabilities: np.ndarray) -> Scores:
    """Computes the metrics of a classifier.

    Args:
        labels: True classes, integers (n,), 0 to k - 1, n at least 1.
        probabilities: Predicted probabilities, (n, k).

    Raises:
        ValueError: The shapes do not match.

    >>> found = score(np.array([0, 1]), np.array([[0.9, 0.1], [0.8, 0.2]]))
    >>> found.accuracy, round(found.loss, 4), found.worst.tolist(), found.confusion.tolist()
    (0.5, 0.8574, [1], [[1, 0], [1, 0]])
    """
    labels = np.asarray(labels).astype(np.intp)
    probabilities = np.asarray(probabilities, np.float64)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            "Expected labels (n,) and probabilities (n, k), n of at least 1. "
            f"Received: {labels.shape} and {probabilities.shape}."
        )
    n, k = probabilities.shape
    predicted = probabilities.argmax(axis=1)
    confidence = probabilities[np.arange(n), predicted]
    correct = predicted == labels
    confusion = np.zeros((k, k), np.int64)
    np.add.at(confusion, (labels, predicted), 1)

    edges = np.linspace(0, 1, BINS + 1)
    bins = np.digitize(confidence, edges[1:-1], right=True)
    bin_counts = np.bincount(bins, minlength=BINS)
    bin_accuracy = _ratio(np.bincount(bins, correct, minlength=BINS), bin_counts)
    bin_confidence = _ratio(np.bincount(bins, confidence, minlength=BINS), bin_counts)

    mistakes = np.flatnonzero(~correct)
    return Scores(
        accuracy=float(correct.mean()),
        loss=_cross_entropy(labels, probabilities),
        ece=float(np.nansum(bin_counts * np.abs(bin_accuracy - bin_confidence)) / n),
        confusion=confusion,
        precision=_ratio(confusion.diagonal(), confusion.sum(axis=0)),
        recall=_ratio(confusion.diagonal(), confusion.sum(axis=1)),
        bin_edges=edges,
        bin_counts=bin_counts,
        bin_accuracy=bin_accuracy,
        bin_confidence=bin_confidence,
        worst=mistakes[np.argsort(-confidence[mistakes], kind="stable")],
    )


def as_dict(found: Scores, classes: Sequence[str] | None = None) -> dict:
    """Returns the metrics for JSON; NaN becomes None.

    Args:
        found: The metrics.
        classes: Names of the classes; None: they are digits.
    """
    kinds, kind = ("classes", "class") if classes else ("digits", "digit")
    names: Sequence[object] = classes or range(len(found.counts))
    return {
        "examples": found.examples,
        "accuracy": found.accuracy,
        "loss": found.loss,
        "expected_calibration_error": found.ece,
        kinds: [
            {
                kind: name,
                "examples": int(found.counts[number]),
                "precision": _number(found.precision[number]),
                "recall": _number(found.recall[number]),
            }
            for number, name in enumerate(names)
        ],
        "confusion": found.confusion.tolist(),
    }


def as_text(found: Scores, classes: Sequence[str] | None = None) -> str:
    """Returns the metrics as tables of plain text; arguments as in ``as_dict``. Of more than 25
    classes the confusion matrix is left out, which no terminal is wide enough for.
    """
    wrong = len(found.worst)
    kind = "class" if classes else "digit"
    names = classes or [str(number) for number in range(len(found.counts))]
    table = [(kind, "images", "precision", "recall")]
    for number, name in enumerate(names):
        rates = (percent(found.precision[number]), percent(found.recall[number]))
        table.append((name, f"{found.counts[number]:,}", *rates))
    matrix = [("", *names)]
    for number, name in enumerate(names):
        matrix.append((name, *(f"{n:,}" if n else "." for n in found.confusion[number])))
    shown = [f"Rows: true {kind}. Columns: predicted {kind}.", *_aligned(matrix)]
    return "\n".join(
        (
            f"accuracy {found.accuracy:.2%} ({wrong:,} wrong), loss {found.loss:.4f}, "
            f"expected calibration error {found.ece:.4f}",
            "",
            *_aligned(table),
            *(("", *shown) if len(names) <= MATRIX else ()),
        )
    )


def percent(fraction: float) -> str:
    """Formats a fraction; NaN is a dash.

    >>> percent(0.99196), percent(float("nan"))
    ('99.20%', '-')
    """
    return "-" if fraction != fraction else f"{fraction:.2%}"


def _cross_entropy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    true = probabilities[np.arange(len(labels)), labels] / probabilities.sum(axis=1)
    return float(-np.log(np.clip(true, EPSILON, 1 - EPSILON)).mean())


def _ratio(parts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Divides; NaN where a total is 0."""
    return np.divide(parts, totals, out=np.full(len(parts), np.nan), where=totals > 0)


def _number(value: float) -> float | None:
    return None if value != value else float(value)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Aligns the cells of each column to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
