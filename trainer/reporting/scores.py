"""How good a classifier is: what labels and the probabilities it gave them say of it.

    found = scores.score(labels, probabilities)
    found.accuracy, found.ece, found.worst[:10]

It knows neither Keras nor TensorFlow: where the probabilities come from does not matter.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

BINS = 15  # Guo et al.'s number.
EPSILON = 1e-7  # Keras' default (``keras.config.epsilon()``).


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What is found in n examples of k classes, where the class *said* is the most probable one.

    Attributes:
        accuracy: Share of the examples whose class is said.
        loss: Mean of ``-log(p)``, where p is the probability of the right class, as Keras'
            ``categorical_crossentropy`` computes it from probabilities: divided by their sum and
            clipped to 1e-7 and 1 - 1e-7.
        ece: The expected calibration error, over the bins below::

                ECE = sum over bins b of  |b| / n * | accuracy(b) - confidence(b) |

            where confidence(b) is the mean of the probabilities of what was said in the examples
            of b: Guo et al. (2017), equation 3, https://arxiv.org/abs/1706.04599. 0: of what is
            said with 90%, 90% is right.
        confusion: Integers (k, k): examples of the class of the row that were said to be that of
            the column.
        precision: (k,), of what was said to be a class, the share that is; NaN where none was.
        recall: (k,), of what is of a class, the share that was said to be; NaN where none is.
        bin_edges: (BINS + 1,), from 0 to 1 in equal steps. A bin holds the examples where the
            probability of what was said lies above its lower edge and up to its upper one.
        bin_counts: Integers (BINS,), examples in each.
        bin_accuracy: (BINS,), accuracy of those; NaN in an empty bin.
        bin_confidence: (BINS,), their mean probability of what was said; NaN in an empty bin.
        worst: Integers (mistakes,), which examples are mistakes: first the one where the wrong
            class got the most probability.
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
        """Integers (k,), how many examples of each class there are."""
        return self.confusion.sum(axis=1)

    @property
    def examples(self) -> int:
        """How many there are."""
        return int(self.confusion.sum())


def score(labels: np.ndarray, probabilities: np.ndarray) -> Scores:
    """Compares what a classifier says with what is right.

    Args:
        labels: Integers (n,), 0 to k - 1, n at least 1.
        probabilities: (n, k), of each class.

    Raises:
        ValueError: The shapes do not fit together.

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
    said = probabilities.argmax(axis=1)
    confidence = probabilities[np.arange(n), said]
    right = said == labels
    confusion = np.zeros((k, k), np.int64)
    np.add.at(confusion, (labels, said), 1)

    edges = np.linspace(0, 1, BINS + 1)
    bins = np.digitize(confidence, edges[1:-1], right=True)
    bin_counts = np.bincount(bins, minlength=BINS)
    bin_accuracy = _share(np.bincount(bins, right, minlength=BINS), bin_counts)
    bin_confidence = _share(np.bincount(bins, confidence, minlength=BINS), bin_counts)

    mistakes = np.flatnonzero(~right)
    return Scores(
        accuracy=float(right.mean()),
        loss=_cross_entropy(labels, probabilities),
        ece=float(np.nansum(bin_counts * np.abs(bin_accuracy - bin_confidence)) / n),
        confusion=confusion,
        precision=_share(confusion.diagonal(), confusion.sum(axis=0)),
        recall=_share(confusion.diagonal(), confusion.sum(axis=1)),
        bin_edges=edges,
        bin_counts=bin_counts,
        bin_accuracy=bin_accuracy,
        bin_confidence=bin_confidence,
        worst=mistakes[np.argsort(-confidence[mistakes], kind="stable")],
    )


def as_dict(found: Scores) -> dict:
    """Returns scores as JSON can hold them; None where there was nothing to divide by."""
    return {
        "examples": found.examples,
        "accuracy": found.accuracy,
        "loss": found.loss,
        "expected_calibration_error": found.ece,
        "digits": [
            {
                "digit": digit,
                "examples": int(found.counts[digit]),
                "precision": _number(found.precision[digit]),
                "recall": _number(found.recall[digit]),
            }
            for digit in range(len(found.counts))
        ],
        "confusion": found.confusion.tolist(),
    }


def as_text(found: Scores) -> str:
    """Returns scores as tables."""
    wrong = len(found.worst)
    digits = range(len(found.counts))
    table = [("digit", "images", "precision", "recall")]
    for digit in digits:
        rates = (percent(found.precision[digit]), percent(found.recall[digit]))
        table.append((str(digit), f"{found.counts[digit]:,}", *rates))
    matrix = [("", *map(str, digits))]
    for digit in digits:
        matrix.append((str(digit), *(f"{n:,}" if n else "." for n in found.confusion[digit])))
    return "\n".join(
        (
            f"accuracy {found.accuracy:.2%} ({wrong:,} wrong), loss {found.loss:.4f}, "
            f"expected calibration error {found.ece:.4f}",
            "",
            *_aligned(table),
            "",
            "Rows: what an image is. Columns: what was said.",
            *_aligned(matrix),
        )
    )


def percent(share: float) -> str:
    """Writes a share as people do; a dash where there is none.

    >>> percent(0.99196), percent(float("nan"))
    ('99.20%', '-')
    """
    return "-" if share != share else f"{share:.2%}"


def _cross_entropy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    right = probabilities[np.arange(len(labels)), labels] / probabilities.sum(axis=1)
    return float(-np.log(np.clip(right, EPSILON, 1 - EPSILON)).mean())


def _share(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Divides, where there is something to divide by; NaN elsewhere."""
    return np.divide(parts, wholes, out=np.full(len(parts), np.nan), where=wholes > 0)


def _number(value: float) -> float | None:
    return None if value != value else float(value)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Puts the cells of each column under one another, at its right edge."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
