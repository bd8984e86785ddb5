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
from typing import TYPE_CHECKING

from tyro.conf import Positional

from trainer import cli
from trainer.config import local_path
from trainer.errors import DataError, UsageError
from trainer.machine import available_cpus

if TYPE_CHECKING:
    from trainer.reporting.scores import Scores

PROG = "python -m trainer.evaluate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measures a saved model on the test images of a data set.

    Raises:
        UsageError: A value is outside its range; the message names field, value and remedy.
    """

    model: Positional[Path]
    """An mnist.h5, as python -m trainer.task writes it; or
    a model.keras with its model.json beside it."""

    network: str | None = None
    """The package.module:function that has made the
    network of a model.keras, which is run to make it
    again. Not for the built-in ones."""

    data: str | None = None
    """Where the test images come from, as in
    python -m trainer.task; of a folder without test,
    all. None: bundled; of a model.keras the data of
    its run."""

    image_size: str | None = None
    """Resize the pictures of a folder, as in
    python -m trainer.task. None: as in the run of a
    model.keras."""

    skip_bad: bool = False
    """Leave out pictures of a folder that cannot be read
    or have another size."""

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
    from trainer.data.digits import Digits

    if config.model.suffix == ".keras":
        _evaluate_other(config)
        return
    source = config.data or "bundled"
    digits = sources.load(source)
    if not isinstance(digits, Digits) or not len(digits.x_test):
        received = "training images alone" if isinstance(digits, Digits) else "other images"
        raise DataError(
            f"Expected test images of digits, grey and of 28×28 pixels, in {source}. Received: "
            f"{received}. Use data='bundled', or the model.keras that was trained on such images."
        )
    digits = digits.first(None, config.test_limit)

    from trainer.inference import model_file
    from trainer.models import cnn
    from trainer.reporting import scores

    model = model_file.load(config.model, threads=config.threads)
    predicted = cnn.probabilities(model, digits.x_test, batch_size=config.batch_size)
    _print(config, source, scores.score(digits.y_test, predicted))


def _evaluate_other(config: EvaluateConfig) -> None:
    """Prints the scores of a model of other images: its network is built as its run has built it,
    and its weights are read from the file, which may hold code that is never run.
    """
    from trainer import runtime

    runtime.set_threads(config.threads)

    from trainer.reporting import scores
    from trainer.training import model_workload, saved_model

    with runtime.keras_defaults():
        model, run, spec = saved_model.load_model(config.model, config.network)
        size = config.image_size or run.image_size
        run = dataclasses.replace(
            run, data=config.data or run.data, image_size=size, skip_bad=config.skip_bad
        )
        data = saved_model.open_for(run, spec, limit=config.test_limit)
        predicted = model_workload.predict(model, data, batch_size=config.batch_size)
    _print(config, run.data, scores.score(predicted.labels, predicted.probabilities), spec.classes)


def _print(
    config: EvaluateConfig, source: str, result: "Scores", classes: Sequence[str] | None = None
) -> None:
    from trainer.reporting import scores

    if config.json:
        found = scores.as_dict(result, classes)
        print(json.dumps({"model": str(config.model), "data": source, **found}))
    else:
        print(f"{config.model} on {result.examples:,} test images ({source})")
        print(scores.as_text(result, classes))


if __name__ == "__main__":
    sys.exit(main())
