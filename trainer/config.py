"""What a run is: one frozen dataclass, every field of it a flag of ``python -m trainer.task``.

    config = TrainConfig(epochs=2, learning_rate=0.001)

No other module has a default of its own for anything that is named here.
"""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Literal, get_args

from trainer.errors import UsageError

Optimizer = Literal["adadelta", "adagrad", "adam", "adamw", "lion", "nadam", "rmsprop", "sgd"]
Recipe = Literal["default", "fast", "best"]
Schedule = Literal["constant", "one-cycle"]
Augment = Literal["none", "affine"]
Resume = Literal["auto", "never", "must"]
Strategy = Literal["auto", "one", "mirrored", "multiworker", "tpu"]
LogFormat = Literal["auto", "plain", "json"]
Fast = Literal["auto", "off"]
Precision = Literal["float32", "tensorfloat32", "mixed_bfloat16"]

# Keras' own defaults, but for Adadelta: Keras 3 has 0.001 there, with which two epochs end at 58%.
# 1.0 is the rate of Zeiler (2012), https://arxiv.org/abs/1212.5701, and of the first Keras example.
LEARNING_RATES: dict[str, float] = {
    "adadelta": 1.0,
    "adagrad": 0.001,
    "adam": 0.001,
    "adamw": 0.001,
    "lion": 0.001,
    "nadam": 0.001,
    "rmsprop": 0.001,
    "sgd": 0.01,
}

# What a recipe says of the fields that are None. docs/performance.md has what each reaches.
RECIPES: dict[str, dict] = {
    "default": {
        "epochs": 10,
        "batch_size": 128,
        "optimizer": "adadelta",
        "schedule": "constant",
        "label_smoothing": 0.0,
        "pooling_dropout": 0.25,
        "dense_dropout": 0.5,
        "augment": "none",
    },
    "fast": {
        "epochs": 1,
        "batch_size": 64,
        "optimizer": "adam",
        "learning_rate": 0.004,
        "schedule": "one-cycle",
        "label_smoothing": 0.05,
        "pooling_dropout": 0.0,
        "dense_dropout": 0.3,
        "augment": "none",
    },
    "best": {
        "epochs": 10,
        "batch_size": 128,
        "optimizer": "adam",
        "learning_rate": 0.002,
        "schedule": "one-cycle",
        "label_smoothing": 0.05,
        "pooling_dropout": 0.25,
        "dense_dropout": 0.3,
        "augment": "affine",
    },
}


def available_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Counts the CPUs this process may use: its affinity, and its container's quota rounded up.

    Args:
        cgroup: Where the control group file system is mounted; version 2 (``cpu.max``) and
            version 1 (``cpu/cpu.cfs_quota_us``) are understood.

    Returns:
        At least 1.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:  # macOS and Windows have no affinity to ask for.
        count = os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in files).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            count = min(count, math.ceil(int(quota) / int(period)))
    return max(count, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Trains the digits CNN and writes mnist.h5, history.json, mnist.json, and a report.

    Raises:
        UsageError: A value is outside its range; the message names field, value and remedy.
    """

    # The lines are as long as the column of --help that shows them.

    data: str = "bundled"
    """Where the images come from: bundled (MNIST, inside
    the package), a path (an .npz of Keras' layout, or a
    folder of the four IDX files, gzipped or not), keras
    (keras.datasets.mnist), or tfds:NAME (TensorFlow
    Datasets, with the extra tfds)."""

    output_dir: Path = Path()
    """Folder for mnist.h5, history.json, mnist.json,
    report.html and curves.png; created where it does not
    exist."""

    recipe: Recipe = "default"
    """What epochs, batch size, optimizer, learning rate,
    schedule, label smoothing, both dropouts and augment
    are where they are not given. default: those of the
    notebook; fast: 99% in one epoch; best: the most that
    ten epochs reach, with augmented images."""

    epochs: int | None = None
    """Passes over the training images. None: the
    recipe's; 10, fast: 1."""

    batch_size: int | None = None
    """Images in one step, on all devices together. None:
    the recipe's; 128, fast: 64."""

    optimizer: Optimizer | None = None
    """Keras' optimizer of this name, with Keras' defaults
    for everything but the learning rate. None: the
    recipe's; adadelta, fast and best: adam."""

    learning_rate: float | None = None
    """The optimizer's learning rate, or the highest of a
    schedule. None: the recipe's, for its optimizer; else
    1.0 for adadelta, Keras' default for the others.
    (0.001 with adadelta is the notebook as published,
    which ends at 58% after two epochs.)"""

    schedule: Schedule | None = None
    """How the learning rate changes. constant: not at
    all; one-cycle: it rises from a tenth and falls to
    nothing, over all epochs. None: the recipe's;
    constant, fast and best: one-cycle."""

    label_smoothing: float | None = None
    """Share of each label that is spread over all digits,
    0 to 1 (in the loss of the test images, too). None:
    the recipe's; 0, fast and best: 0.05."""

    pooling_dropout: float | None = None
    """Share that is dropped behind the pooling. None: the
    recipe's; 0.25, fast: 0."""

    dense_dropout: float | None = None
    """Share that is dropped behind the dense layer. None:
    the recipe's; 0.5, fast and best: 0.3."""

    augment: Augment | None = None
    """affine: turn, shear, size and move each training
    image a little, each time in another way. None: the
    recipe's; none, best: affine."""

    seed: int = 0
    """Seed of weights, dropout and the order of the
    images, 0 to 4294967295. On one machine the same seed
    and threads give the same weights, bit for bit."""

    strategy: Strategy = "auto"
    """How the devices share the work. auto: multiworker
    where TF_CONFIG or TRAINER_WORKERS names several
    workers, else tpu, mirrored (several GPUs) or one
    device, by what is there."""

    gpus: int | None = None
    """GPUs that this process must have, and uses. None:
    all that are seen; 0: none of them."""

    threads: int = dataclasses.field(default_factory=available_cpus)
    """Threads inside one TensorFlow operation; as many as
    this process may use. Another number changes the last
    bits of a result."""

    fast: Fast = "auto"
    """auto: on CPUs, train by this package's own arithmetic
    for this network, in half the time; off: by Keras'.
    The mathematics is the same, the last bits differ."""

    precision: Precision = "tensorfloat32"
    """Of products and convolutions. tensorfloat32: 10 bits
    of the factors count on GPUs from Ampere on, which is
    TensorFlow's default, all 23 elsewhere; float32: all,
    everywhere; mixed_bfloat16: 7 bits, and half the
    memory. The weights, and mnist.h5, are float32."""

    jit_compile: bool = False
    """Compile the step with XLA, for GPUs. (On CPUs its
    convolutions take thirty times as long.)"""

    steps_per_execution: int | None = None
    """Steps inside one call of the compiled function.
    None: as many as take about a second. It changes how
    often progress shows, and no result."""

    train_limit: int | None = None
    """Use the first N training images only."""

    test_limit: int | None = None
    """Use the first N test images only."""

    checkpoint_every: str = "60s"
    """How often the position of the run is saved, apart
    from each epoch's end: seconds (90s), minutes (5m),
    hours (1h) or steps (200)."""

    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay. One takes
    29 MB with adadelta."""

    resume: Resume = "auto"
    """auto: go on with the unfinished run in output_dir,
    if there is one; never: start anew and remove its
    checkpoints; must: fail if there is none."""

    startup_timeout: int = 300
    """Seconds that several workers wait for one another
    at the start, or one for its TPU."""

    deterministic: bool = False
    """Make a GPU repeat the same bits too, at some cost
    in speed; a CPU always does. (It has other bits with
    it than without.)"""

    log_format: LogFormat = "auto"
    """How progress shows. auto: a bar on a terminal or in
    a notebook, plain lines elsewhere; plain: a line every
    ten seconds and one an epoch; json: the same as JSON
    objects."""

    report: bool = True
    """report.html and curves.png, which are drawn when the
    run is done, and take some seconds."""

    tensorboard: bool = False
    """Write event files for TensorBoard, too, one point an
    epoch: output_dir/tensorboard/train and validation."""

    tensorflow_logs: bool = False
    """Show what TensorFlow logs while it starts."""

    def __post_init__(self) -> None:
        _check_choice("recipe", self.recipe, get_args(Recipe))
        recipe = RECIPES[self.recipe]
        # Resolved here, so that what is recorded about a run is what it used.
        for name, value in recipe.items():
            if getattr(self, name) is None and name != "learning_rate":
                object.__setattr__(self, name, value)
        _check_choice("optimizer", self.optimizer, get_args(Optimizer))
        _check_choice("schedule", self.schedule, get_args(Schedule))
        _check_choice("augment", self.augment, get_args(Augment))
        _check_choice("resume", self.resume, get_args(Resume))
        _check_choice("strategy", self.strategy, get_args(Strategy))
        _check_choice("precision", self.precision, get_args(Precision))
        _check_choice("fast", self.fast, get_args(Fast))
        _check_choice("log_format", self.log_format, get_args(LogFormat))
        _check_whole("epochs", self.epochs, 1, remedy="Use 10, the recipe's number.")
        _check_whole("batch_size", self.batch_size, 1, remedy="Use 128, the recipe's size.")
        _check_whole("seed", self.seed, 0, 2**32 - 1, remedy="Use 0, the default.")
        _check_whole("threads", self.threads, 1, remedy="Leave it out to use every CPU.")
        _check_whole("startup_timeout", self.startup_timeout, 1, remedy="Use 300, the default.")
        if self.gpus is not None:
            _check_whole("gpus", self.gpus, 0, remedy="Leave it out to use all that are seen.")
        _check_whole("keep_checkpoints", self.keep_checkpoints, 1, remedy="Use 3, the default.")
        if not isinstance(self.checkpoint_every, str) or not re.fullmatch(
            r"[1-9]\d*[smh]?", self.checkpoint_every
        ):
            raise UsageError(
                "checkpoint_every must be a time like 90s, 5m or 1h, or a number of steps like "
                f"200. Received: checkpoint_every={self.checkpoint_every!r}. Use 60s, the default."
            )
        for name in ("steps_per_execution", "train_limit", "test_limit"):
            if (value := getattr(self, name)) is not None:
                _check_whole(name, value, 1, remedy="Leave it out for the default.")
        if self.learning_rate is None:
            rate = LEARNING_RATES[self.optimizer]
            if self.optimizer == recipe["optimizer"]:
                rate = recipe.get("learning_rate", rate)
            object.__setattr__(self, "learning_rate", rate)
        if (
            not isinstance(self.learning_rate, int | float)
            or not math.isfinite(self.learning_rate)
            or self.learning_rate <= 0
        ):
            raise UsageError(
                "learning_rate must be a finite number above 0. "
                f"Received: learning_rate={self.learning_rate!r}. "
                f"Leave it out for {self.optimizer}'s own, {LEARNING_RATES[self.optimizer]}."
            )
        _check_share("label_smoothing", self.label_smoothing, remedy="Use 0 for none.")
        _check_share("pooling_dropout", self.pooling_dropout, remedy="Use 0.25, the notebook's.")
        _check_share("dense_dropout", self.dense_dropout, remedy="Use 0.5, the notebook's.")
        if not self.data:
            raise UsageError(
                "data must name a source. Received: data=''. Use bundled, the default."
            )

    def as_dict(self) -> dict:
        """Returns the fields as JSON can hold them."""
        return {**dataclasses.asdict(self), "output_dir": str(self.output_dir)}


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}. Received: {name}={value!r}.")


def _check_share(name: str, value: object, *, remedy: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        raise UsageError(f"{name} must be from 0 to below 1. Received: {name}={value!r}. {remedy}")


def _check_whole(
    name: str, value: object, least: int, most: int | None = None, *, remedy: str
) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        span = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise UsageError(
            f"{name} must be a whole number {span}. Received: {name}={value!r}. {remedy}"
        )
