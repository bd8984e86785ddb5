"""The command: measures a saved model on the test images of a data set.

    python -m trainer.evaluate mnist.h5 --data bundled

It prints accuracy, loss, expected calibration error, precision and recall of each digit, and the
confusion matrix; with ``--json`` as one JSON object.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from trainer import cli
from trainer.config import local_path
from trainer.errors import UsageError
from trainer.machine import available_cpus

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
    """Images in one forward pass. It changes memory and
    speed, and results by rounding alone."""

    threads: int = dataclasses.field(default_factory=available_cpus)
    """Threads inside one TensorFlow operation; as many as
    this process may use."""

    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", local_path("model", self.model))
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
    """Prints the scores of a model.

    Raises:
        TrainerError: Any error that a user can cause or meet; ``trainer.errors`` lists them.
    """
    from trainer.data import sources

    digits = sources.load(config.data).first(None, config.test_limit)

    from trainer.inference import model_file
    from trainer.models import cnn
    from trainer.reporting import scores

    model = model_file.load(config.model, threads=config.threads)
    predicted = cnn.probabilities(model, digits.x_test, batch_size=config.batch_size)
    result = scores.score(digits.y_test, predicted)
    if config.json:
        fields = {"model": str(config.model), "data": config.data, **scores.as_dict(result)}
        print(json.dumps(fields))
    else:
        print(f"{config.model} on {result.examples:,} test images ({config.data})")
        print(scores.as_text(result))


if __name__ == "__main__":
    sys.exit(main())
