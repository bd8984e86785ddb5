"""The command: measures a saved model on the test images of a data set.

    python -m trainer.evaluate mnist.h5 --data bundled

It says what the model gets right and wrong: accuracy, loss, calibration, each digit's precision and
recall, and the confusion matrix; with ``--json`` as one JSON object.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from trainer import cli
from trainer.config import available_cpus
from trainer.errors import NotFiniteError, UsageError

if TYPE_CHECKING:  # --help loads none of these.
    import keras
    import numpy as np

    from trainer.reporting.scores import Scores

PROG = "python -m trainer.evaluate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measures a saved model on the test images of a data set.

    Raises:
        UsageError: A value is outside its range; the message names field, value and remedy.
    """

    model: Positional[Path]
    """An mnist.h5, as python -m trainer.task writes it."""

    data: str = "bundled"
    """Where the test images come from, as in
    python -m trainer.task."""

    test_limit: int | None = None
    """Use the first N test images only."""

    batch_size: int = 128
    """Images that go through the network at once. It
    changes memory and speed, and no result beyond its
    last bits."""

    threads: int = dataclasses.field(default_factory=available_cpus)
    """Threads inside one TensorFlow operation; as many as
    this process may use."""

    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        for name, remedy in (
            ("test_limit", "Leave it out to use them all."),
            ("batch_size", "Use 128, the default."),
            ("threads", "Leave it out to use every CPU."),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(
                    f"{name} must be a whole number of at least 1. Received: {name}={value!r}. "
                    f"{remedy}"
                )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (``trainer.errors`` lists them)."""
    return cli.run(PROG, EvaluateConfig, evaluate, argv)


def evaluate(config: EvaluateConfig) -> None:
    """Prints how good a model is.

    Raises:
        TrainerError: One of its kinds, for whatever a user can cause or meet.
    """
    from trainer.data import sources as data

    digits = data.load(config.data).first(None, config.test_limit)

    from trainer.inference import model_file as saved
    from trainer.reporting import scores

    cnn = saved.load(config.model, threads=config.threads)
    said = probabilities(cnn, digits.x_test, batch_size=config.batch_size)
    found = scores.score(digits.y_test, said)
    if config.json:
        facts = {"model": str(config.model), "data": config.data, **as_dict(found)}
        print(json.dumps(facts))
    else:
        print(f"{config.model} on {found.examples:,} test images ({config.data})")
        print(as_text(found))


def probabilities(
    cnn: "keras.Model",
    images: "np.ndarray",
    *,
    batch_size: int,
    after_batch: Callable[[], None] = lambda: None,
) -> "np.ndarray":
    """Passes images through the network.

    Args:
        cnn: A model of ``trainer.models.cnn``, under no strategy of several replicas.
        images: uint8 (n, 28, 28), 0 is background and 255 ink.
        batch_size: Images at once.
        after_batch: Called after each batch; what it raises ends the pass.

    Returns:
        float32 (n, 10), of each digit.

    Raises:
        NotFiniteError: The network gives something else: its weights overflow. What overflows in
            front of the pooling may stay unseen (see ``trainer.training.loop``).
    """
    import numpy as np

    from trainer.runtime import tf

    # Not model.predict, which compiles with XLA: the kernels, and so the bits, are those of the
    # evaluation in training.
    predict = tf.function(lambda inputs: cnn(inputs, training=False), autograph=False)
    parts = []
    for start in range(0, len(images), batch_size):
        inputs = np.float32(images[start : start + batch_size, ..., np.newaxis]) / 255
        parts.append(predict(inputs).numpy())
        after_batch()
    found = np.concatenate(parts)
    if not np.isfinite(found).all():
        raise NotFiniteError(
            "Expected probabilities. Received: NaN from the network, for "
            f"{len(found) - int(np.isfinite(found).all(axis=1).sum()):,} of {len(found):,} images. "
            "Train it anew, with a smaller --learning-rate."
        )
    return found


def as_dict(found: "Scores") -> dict:
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


def as_text(found: "Scores") -> str:
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


def _number(value: float) -> float | None:
    return None if value != value else float(value)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Puts the cells of each column under one another, at its right edge."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


if __name__ == "__main__":
    sys.exit(main())
