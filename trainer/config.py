"""The configuration of a run: a frozen dataclass; each field is a flag of ``trainer.task``.

    config = TrainConfig(epochs=2, learning_rate=0.001)

No other module has defaults for these settings; ``trainer.recipes`` has the values of the fields
that are left to the recipe.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, Union, get_args

from trainer import recipes
from trainer.errors import UsageError
from trainer.machine import available_cpus
from trainer.parameters import format_augmentation, parse, parse_augmentation
from trainer.recipes import LEARNING_RATES, RECIPES

Recipe = Literal["default", "fast", "best"]
# Names and what parameters they have; of optimizers those that Keras has.
SCHEDULES: Mapping[str, tuple[str, ...]] = {
    "constant": (),
    "one-cycle": (),
    "cosine": ("alpha", "warmup"),
    "exponential": ("decay_rate",),
    "polynomial": ("end", "power"),
}
Cache = Literal["auto", "memory", "none"]
Resume = Literal["auto", "never", "must"]
Strategy = Literal["auto", "one", "mirrored", "multiworker", "tpu"]
Collectives = Literal["tensorflow", "ring"]
LogFormat = Literal["auto", "plain", "json"]
Fast = Literal["auto", "off"]
Precision = Literal["float32", "tensorfloat32", "mixed_bfloat16"]

_LISTEN = re.compile(r"(?:(\*|\[[0-9a-fA-F:.]+\]|[\w.-]+):)?([1-9]\d{0,4})", re.ASCII)
_SIZE = re.compile(r"[1-9]\d{0,3}(x[1-9]\d{0,3})?")

# The type of a field that None leaves to the recipe. __post_init__ replaces None, so that no reader
# of the field meets it: to type checkers it is a T that None can be assigned to.
T = TypeVar("T")
if TYPE_CHECKING:
    OrRecipe: TypeAlias = Union[T, Any]  # noqa: UP007  (mypy 2.4 refuses T | Any)
else:
    OrRecipe = T | None

# Marks the settings that may differ between a checkpoint and the run that resumes it: those that
# change no result, or its last bits at most.
MAY_DIFFER: Mapping[str, bool] = {"may_differ": True}
# Marks those that may be several words of a command line: a name and its parameters, or a list.
PARAMETERS: Mapping[str, bool] = {"parameters": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Trains the digits CNN and writes mnist.h5, history.json, mnist.json, and a report.

    Raises:
        UsageError: A value is outside its range; the message names field, value and remedy.
    """

    # The lines are as long as the column of --help that shows them.

    # May differ, because resuming compares the SHA-256 of the data instead.
    data: str = dataclasses.field(default="bundled", metadata=MAY_DIFFER)
    """Where the images come from: bundled (MNIST, inside
    the package), a path (a folder of pictures in a
    folder for each class, of IDX or of .npy files, an
    .npz of Keras' layout, or a .csv), keras
    (keras.datasets.mnist), or tfds:NAME (TensorFlow
    Datasets, with the extra tfds)."""

    image_size: str | None = None
    """Resize the pictures of a folder to this height and
    width: 180, or 180x240. None: all have one size."""

    skip_bad: bool = False
    """Leave out pictures of a folder that cannot be read
    or have another size."""

    cache: Cache = dataclasses.field(default="auto", metadata=MAY_DIFFER)
    """Whether pictures that have been decoded stay in
    memory. auto: where they fit into half of what is
    free; memory: always; none: never."""

    validation_split: float = 0.0
    """Share of the training images that is measured after
    each epoch in place of the test images, which then
    judge the model once, at the end."""

    early_stopping: int | None = None
    """Stop after this many epochs without a better loss of
    the validation images, and keep the weights of the
    best epoch. It takes validation images, such as those
    of validation_split. None: train all epochs."""

    model: str = "cnn"
    """The network: cnn, resnet, or package.module:function
    for your own, which is called with the data's spec
    and this configuration, and returns a Keras model."""

    output_dir: Path = dataclasses.field(default=Path(), metadata=MAY_DIFFER)
    """Folder for mnist.h5, history.json, mnist.json,
    report.html and curves.png; created where it does
    not exist. (For other images or networks:
    model.keras and model.json.)"""

    recipe: Recipe = "default"
    """The values of epochs, batch size, optimizer,
    learning rate, schedule, label smoothing, both
    dropout rates and augment where they are not
    given. default: those of the notebook; fast: 99%
    in one epoch; best: the highest accuracy that ten
    epochs reach, with augmented images."""

    epochs: OrRecipe[int] = None
    """Number of epochs. None: the recipe's; 10, fast: 1."""

    batch_size: OrRecipe[int] = None
    """Images in one step, over all replicas together.
    None: the recipe's; 128, fast: 64."""

    optimizer: OrRecipe[str] = dataclasses.field(default=None, metadata=PARAMETERS)
    """Keras' optimizer of this name, and parameters of
    its: adamw weight_decay=0.05 global_clipnorm=1. Else
    they are Keras' defaults, but for the learning rate.
    None: the recipe's; adadelta, fast and best: adam."""

    learning_rate: OrRecipe[float] = None
    """The optimizer's learning rate, or the peak of a
    schedule. None: the recipe's, for its optimizer;
    else 1.0 for adadelta, Keras' default for the
    others. (0.001 with adadelta is the notebook as
    published, which ends at 58% after two epochs.)"""

    schedule: OrRecipe[str] = dataclasses.field(default=None, metadata=PARAMETERS)
    """How the learning rate changes from step to step.
    constant: not at all; one-cycle: it warms up from
    10% of the peak, then cosine-decays to 0 at the
    end of the last epoch; cosine warmup=0.1 alpha=0.01:
    it warms up from 0 over a tenth of the steps, and
    decays to a hundredth; exponential decay_rate=0.9:
    to nine tenths in each epoch; polynomial power=1
    end=0. None: the recipe's; constant, fast and best:
    one-cycle."""

    label_smoothing: OrRecipe[float] = None
    """Share of each label that is spread evenly over all
    classes, 0 to 1 (in the loss of the test images,
    too). None: the recipe's; 0, fast and best: 0.05."""

    pooling_dropout: OrRecipe[float] = None
    """Dropout rate after the pooling layer. None: the
    recipe's; 0.25, fast: 0."""

    dense_dropout: OrRecipe[float] = None
    """Dropout rate after the dense layer. None: the
    recipe's; 0.5, fast and best: 0.3."""

    augment: OrRecipe[str] = dataclasses.field(default=None, metadata=PARAMETERS)
    """Changes of each training image, each time anew, up
    to the amounts given: rotate=10 (degrees), shear=10,
    zoom=0.1, translate=0.1, elastic=0.1, flip=0.5 (the
    probability), vertical_flip, brightness, contrast,
    saturation, hue; affine: the first four. None: the
    recipe's; none, best: affine."""

    seed: int = 0
    """Seed of initial weights, dropout masks and the
    order of the images, 0 to 4294967295. On one
    machine the same seed and threads give the same
    weights, bit for bit."""

    strategy: Strategy = dataclasses.field(default="auto", metadata=MAY_DIFFER)
    """The tf.distribute strategy. auto: multiworker
    where TF_CONFIG, TRAINER_WORKERS or Slurm names
    several workers, else tpu, mirrored (several GPUs)
    or one device, whichever is available."""

    collectives: Collectives = dataclasses.field(default="tensorflow", metadata=MAY_DIFFER)
    """What all-reduces gradients over several workers.
    tensorflow: its own collectives, NCCL on GPUs and
    gRPC on CPUs; ring: this package's, over TCP, for
    workers that have CPUs only, where it takes a
    quarter of the CPU time."""

    gpus: int | None = dataclasses.field(default=None, metadata=MAY_DIFFER)
    """Number of GPUs to use; fewer are an error. None:
    all that are visible; 0: none of them."""

    threads: int = dataclasses.field(default_factory=available_cpus, metadata=MAY_DIFFER)
    """Threads inside one TensorFlow operation. Default:
    the CPUs that this process may use. Another number
    changes the last bits of a result."""

    fast: Fast = "auto"
    """auto: on CPUs, train with this package's kernels
    for this network, in half the time; off: with
    Keras' step. The mathematics is the same, the last
    bits differ."""

    precision: Precision = "tensorfloat32"
    """Precision of matrix products and convolutions.
    tensorfloat32: 10 bits of mantissa on GPUs from
    Ampere on, which is TensorFlow's default, and all
    23 elsewhere; float32: 23 everywhere;
    mixed_bfloat16: 7, and half the memory. The
    weights, and mnist.h5, are float32."""

    jit_compile: bool = False
    """Compile with XLA, for GPUs: on one device all steps
    of a call into one program. (On CPUs its convolutions
    take thirty times as long.)"""

    steps_per_execution: int | None = dataclasses.field(default=None, metadata=MAY_DIFFER)
    """Steps in one call of the compiled function. None:
    as many as take about a second. It changes how
    often progress is shown, and no result."""

    train_limit: int | None = None
    """Use the first N training images only."""

    test_limit: int | None = None
    """Use the first N test images only."""

    checkpoint_every: str = dataclasses.field(default="60s", metadata=MAY_DIFFER)
    """Interval between checkpoints, besides that at each
    epoch's end: seconds (90s), minutes (5m), hours
    (1h) or steps (200)."""

    keep_checkpoints: int = dataclasses.field(default=3, metadata=MAY_DIFFER)
    """Number of checkpoints to keep, the newest ones.
    One takes 29 MB with adadelta."""

    resume: Resume = dataclasses.field(default="auto", metadata=MAY_DIFFER)
    """auto: resume the unfinished run in output_dir, if
    there is one; never: start anew and remove its
    checkpoints; must: fail if there is none."""

    startup_timeout: int = dataclasses.field(default=300, metadata=MAY_DIFFER)
    """Seconds to wait at the start for other workers, or
    for the TPU."""

    step_timeout: int | None = dataclasses.field(default=None, metadata=MAY_DIFFER)
    """Seconds without progress after which a run of
    several workers ends, to be resumed (exit code
    75). None: 20 times the longest call of the step
    so far, at least 300, and 1200 before the first,
    which compiles."""

    deterministic: bool = False
    """Make results reproducible bit for bit on a GPU,
    too, at some cost in speed; on a CPU they always
    are. (The bits with and without it differ.)"""

    log_format: LogFormat = dataclasses.field(default="auto", metadata=MAY_DIFFER)
    """How progress is shown. auto: a bar on a terminal
    or in a notebook, plain lines elsewhere; plain: a
    line every ten seconds and one an epoch; json: the
    same as JSON objects, errors too."""

    report: bool = dataclasses.field(default=True, metadata=MAY_DIFFER)
    """Draw report.html and curves.png when the run is
    done, which takes some seconds."""

    tensorboard: bool = dataclasses.field(default=False, metadata=MAY_DIFFER)
    """Write event files for TensorBoard, too, one point
    an epoch: output_dir/tensorboard/train and
    validation."""

    metrics_port: str | None = dataclasses.field(default=None, metadata=MAY_DIFFER)
    """Serve Prometheus' metrics of the run at /metrics, and
    at /healthz whether its steps go on: 9090 on this
    machine alone, *:9090 on all its addresses. It takes
    the extra metrics."""

    tensorflow_logs: bool = dataclasses.field(default=False, metadata=MAY_DIFFER)
    """Show what TensorFlow logs while it starts. (A
    command hides it; a program that calls trainer.train
    decides by TF_CPP_MIN_LOG_LEVEL.)"""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        _check_choice("recipe", self.recipe, get_args(Recipe))
        # Resolved here, so that what is recorded about a run is what it used.
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) is None and name != "learning_rate":
                object.__setattr__(self, name, value)
        object.__setattr__(self, "data", _path("data", self.data, remedy="Use 'bundled'."))
        _refuse_url("data", self.data)
        folder = _path("output_dir", self.output_dir, remedy="Leave it out for the current folder.")
        object.__setattr__(self, "output_dir", local_path("output_dir", folder))
        for name, choices in (
            ("cache", Cache),
            ("resume", Resume),
            ("strategy", Strategy),
            ("collectives", Collectives),
            ("precision", Precision),
            ("fast", Fast),
            ("log_format", LogFormat),
        ):
            _check_choice(name, getattr(self, name), get_args(choices))
        for name, known in (("optimizer", LEARNING_RATES), ("schedule", SCHEDULES)):
            object.__setattr__(self, name, _named(name, getattr(self, name), known))
        _check_schedule(self.schedule)
        changes = format_augmentation(parse_augmentation(self.augment))
        object.__setattr__(self, "augment", changes)
        for name in ("epochs", "batch_size"):
            _check_whole(name, getattr(self, name), 1, remedy=self._remedy(name))
        _check_whole("seed", self.seed, 0, 2**32 - 1, remedy="Use 0, the default.")
        _check_whole("threads", self.threads, 1, remedy="Leave it out to use every CPU.")
        _check_whole("startup_timeout", self.startup_timeout, 1, remedy="Use 300, the default.")
        if self.gpus is not None:
            _check_whole("gpus", self.gpus, 0, remedy="Leave it out to use all that are visible.")
        _check_whole("keep_checkpoints", self.keep_checkpoints, 1, remedy="Use 3, the default.")
        if not isinstance(self.checkpoint_every, str) or not re.fullmatch(
            r"[1-9]\d*[smh]?", self.checkpoint_every
        ):
            raise UsageError(
                "checkpoint_every must be a time like 90s, 5m or 1h, or a number of steps like "
                f"200. Received: checkpoint_every={self.checkpoint_every!r}. Use 60s, the default."
            )
        optional = "steps_per_execution", "train_limit", "test_limit", "step_timeout"
        for name in (*optional, "early_stopping"):
            if (value := getattr(self, name)) is not None:
                _check_whole(name, value, 1, remedy="Leave it out for the default.")
        if self.learning_rate is None:
            rate = recipes.learning_rate(self.recipe, self.optimizer_name)
            object.__setattr__(self, "learning_rate", rate)
        if (
            not isinstance(self.learning_rate, int | float)
            or isinstance(self.learning_rate, bool)
            or not 0 < self.learning_rate <= sys.float_info.max  # As of NaN, too.
        ):
            raise UsageError(
                "learning_rate must be a finite number above 0. "
                f"Received: learning_rate={self.learning_rate!r}. Leave it out for "
                f"{recipes.learning_rate(self.recipe, self.optimizer_name)}, that of "
                f"{self.optimizer_name} in the recipe {self.recipe}."
            )
        for name in ("label_smoothing", "pooling_dropout", "dense_dropout"):
            _check_share(name, getattr(self, name), remedy=self._remedy(name))
        _check_share("validation_split", self.validation_split, remedy="Use 0, the default.")
        if not isinstance(self.model, str) or not re.fullmatch(
            r"cnn|resnet|[\w.]+:\w+", self.model
        ):
            raise UsageError(
                "model must be cnn, resnet or package.module:function. Received: "
                f"model={self.model!r}. Use cnn, the default."
            )
        if self.image_size is not None and not _SIZE.fullmatch(str(self.image_size)):
            raise UsageError(
                "image_size must be a number of pixels like 180, or height and width like 180x240. "
                f"Received: image_size={self.image_size!r}. Leave it out for pictures of one size."
            )
        if self.metrics_port is not None and (
            not _LISTEN.fullmatch(str(self.metrics_port)) or self.metrics_address[1] > 65535
        ):
            raise UsageError(
                "metrics_port must be a port from 1 to 65535 or an address and one, like 9090, "
                f"*:9090 or [::1]:9090. Received: metrics_port={self.metrics_port!r}. Leave it out "
                "to serve none."
            )
        for name in (
            "skip_bad",
            "jit_compile",
            "deterministic",
            "report",
            "tensorboard",
            "tensorflow_logs",
        ):
            if not isinstance(value := getattr(self, name), bool):
                raise UsageError(
                    f"{name} must be True or False. Received: {name}={value!r}. Leave it out for "
                    "the default."
                )
        if not self.data:
            raise UsageError(
                f"data must name a source. Received: data={self.data!r}. Use bundled, the default."
            )

    def as_dict(self) -> dict:
        """Returns the fields as JSON can hold them; ``TrainConfig(**fields)`` is equal to this."""
        return {**dataclasses.asdict(self), "output_dir": str(self.output_dir)}

    @property
    def optimizer_name(self) -> str:
        """The optimizer's name, without its parameters."""
        return parse(self.optimizer).name

    @property
    def metrics_address(self) -> tuple[str, int]:
        """``metrics_port`` as host and port; the host ``*`` is every address."""
        match = _LISTEN.fullmatch(str(self.metrics_port))
        if not match:
            raise ValueError("no metrics are served")
        return (match[1] or "127.0.0.1").strip("[]"), int(match[2])

    @property
    def height_and_width(self) -> tuple[int, int] | None:
        """``image_size`` in pixels."""
        if self.image_size is None:
            return None
        height, _, width = str(self.image_size).partition("x")
        return int(height), int(width or height)

    def _remedy(self, name: str) -> str:
        return f"Use {RECIPES[self.recipe][name]}, the value of the recipe {self.recipe}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScriptConfig:
    """Runs a script that calls trainer.fit; the script and its own flags follow --.

    Raises:
        UsageError: A value is outside its range.
    """

    threads: int = dataclasses.field(default_factory=available_cpus)
    """Threads inside one operation; default: the CPUs
    available. Results have the same bits only with the
    same number."""

    gpus: int | None = None
    """Number of GPUs that each worker must have;
    default: all that it sees; 0: none."""

    collectives: Collectives = TrainConfig.collectives
    """What several workers sum gradients with: ring is
    faster on CPUs."""

    startup_timeout: int = TrainConfig.startup_timeout
    """Seconds to wait for the other workers."""

    step_timeout: int | None = None
    """Seconds without a step after which a training has
    hung; default: 20 times the longest, at least 300."""

    def __post_init__(self) -> None:
        TrainConfig(  # Which checks them.
            threads=self.threads,
            gpus=self.gpus,
            startup_timeout=self.startup_timeout,
            step_timeout=self.step_timeout,
        )


def local_path(name: str, value: str | os.PathLike) -> Path:
    """Returns the path of a setting, with the home folder for a ``~`` at its beginning.

    Args:
        name: The setting, for the message.
        value: What was given.

    Raises:
        UsageError: It is a URL: ``Path`` would make a folder of the name ``gs:`` of it.
    """
    text = os.fsdecode(value)
    _refuse_url(name, text)
    try:
        return Path(text).expanduser()
    except RuntimeError:  # No such user, or no home folder.
        return Path(text)


def may_differ_fields() -> tuple[str, ...]:
    """Names the other fields."""
    fixed = fixed_fields()
    return tuple(field.name for field in dataclasses.fields(TrainConfig) if field.name not in fixed)


def fixed_fields() -> tuple[str, ...]:
    """Names the fields that must be equal in a checkpoint and the run that resumes it."""
    return tuple(
        field.name
        for field in dataclasses.fields(TrainConfig)
        if not field.metadata.get("may_differ")
    )


def _plain(value: object) -> object:
    """Returns a NumPy scalar as Python's own, which JSON can hold; anything else as it is."""
    numpy = sys.modules.get("numpy")  # Not imported for this: it takes a tenth of a second.
    return value.item() if numpy and isinstance(value, numpy.generic) else value


def _refuse_url(name: str, text: str) -> None:
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text):
        raise UsageError(
            f"{name} must be a path on this machine. Received: {name}={text!r}. Mount the "
            f"{match[1]} storage (gcsfuse, s3fs, rclone mount) and name the path there, or copy "
            "the files."
        )


def _path(name: str, value: object, *, remedy: str) -> str:
    """Returns a path as a string, in which bytes that are not UTF-8 are surrogates, as everywhere
    in Python.
    """
    path = None
    if isinstance(value, str | os.PathLike):
        path = os.fsdecode(value)
    if path is None or "\0" in path:
        raise UsageError(f"{name} must be a string or a path. Received: {name}={value!r}. {remedy}")
    return path


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}. Received: {name}={value!r}.")


def _named(setting: str, value: object, known: Mapping[str, object]) -> str:
    """Returns a name and its parameters in their one spelling."""
    if not isinstance(value, str) or parse(value).name not in known:
        raise UsageError(
            f"{setting} must be one of {', '.join(known)}. Received: {setting}={value!r}."
        )
    return str(parse(value))


def _check_schedule(value: str) -> None:
    name, parameters = parse(value)
    for parameter, number in parameters.items():
        if parameter not in SCHEDULES[name]:
            known = ", ".join(SCHEDULES[name]) or "none"
            raise UsageError(
                f"schedule={name} has the parameters: {known}. Received: {parameter}={number}. "
                "Leave it out."
            )
        least = 0 if parameter == "power" else None
        if (
            not isinstance(number, (int, float))
            or isinstance(number, bool)
            or not (number > least if least is not None else 0 <= number <= 1)
            or number == float("inf")
        ):
            raise UsageError(
                f"{parameter} of schedule={name} must be "
                f"{'above 0' if least is not None else 'from 0 to 1'}. Received: "
                f"{parameter}={number}. Leave it out for the default."
            )


def _check_share(name: str, value: object, *, remedy: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise UsageError(f"{name} must be from 0 to below 1. Received: {name}={value!r}. {remedy}")


def _check_whole(
    name: str, value: object, least: int, most: int | None = None, *, remedy: str
) -> None:
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or value < least
        or (most is not None and value > most)
    ):
        span = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise UsageError(
            f"{name} must be a whole number {span}. Received: {name}={value!r}. {remedy}"
        )
