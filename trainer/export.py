"""The command: writes a saved model in the format of another runtime.

    python -m trainer.export mnist.h5 --format onnx      # mnist.onnx, beside mnist.h5
    python -m trainer.export model.keras --format onnx   # model.onnx

``trainer.inference.formats`` has the formats, and what their inputs and outputs are.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from trainer import cli
from trainer.config import local_path
from trainer.errors import ConfigurationError, OutputError, UsageError
from trainer.files import place
from trainer.inference.formats import DIGITS, SUFFIXES, Input, convert
from trainer.signals import Signals

if TYPE_CHECKING:  # --help loads none of these.
    import keras

PROG = "python -m trainer.export"

# What TensorFlow writes into the folder of a SavedModel. A folder with anything else in it is never
# replaced.
_SAVEDMODEL = {"saved_model.pb", "fingerprint.pb", "variables", "assets"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Writes a saved model in the format of another runtime.

    Raises:
        UsageError: Flags that do not go together; the message names field, value and remedy.
    """

    model: Positional[Path]
    """An mnist.h5, as python -m trainer.task writes it; or
    a model.keras with its model.json beside it."""

    format: Literal["keras", "savedmodel", "onnx", "litert"]
    """keras: Keras' own, mnist.keras. savedmodel:
    TensorFlow's, a folder mnist_savedmodel. onnx:
    mnist.onnx. litert: LiteRT's, formerly TensorFlow
    Lite, mnist.tflite."""

    network: str | None = None
    """The package.module:function that has made the
    network of a model.keras, which is run to make it
    again. Not for the built-in ones."""

    quantize: bool = False
    """With --format litert: weights of 8 bits (dynamic
    range), a quarter of the size; mnist_quantized.tflite."""

    output: Path | None = None
    """File to write, with the format's suffix, or folder
    for savedmodel; its folder is created where it does not
    exist. None: beside the model."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", local_path("model", self.model))
        if self.output is not None:
            object.__setattr__(self, "output", local_path("output", self.output))
        is_of_digits = self.model.suffix != ".keras"
        if self.network is not None and is_of_digits:
            raise UsageError(
                f"network is for a model.keras. Received: network={self.network!r} and "
                f"{self.model.name}. Leave it out."
            )
        if self.format == "keras" and not is_of_digits:
            raise UsageError(
                f"format must be savedmodel, onnx or litert for a model in Keras' own. Received: "
                f"format='keras' and {self.model.name}. Copy that file."
            )
        if self.quantize and self.format != "litert":
            raise UsageError(
                "quantize is for format=litert alone. Received: quantize=True, "
                f"format={self.format}. Leave --quantize out, or use --format litert."
            )
        suffix = SUFFIXES[self.format]
        if self.output is not None and suffix and self.output.suffix != suffix:
            raise UsageError(
                f"output must end in {suffix} with format={self.format}. Received: "
                f"output={str(self.output)!r}. Leave --output out to write beside the model."
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (``trainer.errors`` lists them)."""
    return cli.run(PROG, ExportConfig, export, argv)


def export(config: ExportConfig) -> None:
    """Writes the model in another format, whole or not at all, and prints path, size and SHA-256.

    Raises:
        TrainerError: Any error that a user can cause or meet; ``trainer.errors`` lists them.
    """
    path = config.output or _beside(config)
    with _output_errors(path):
        target = Path(os.path.realpath(path))  # A link is followed, and stays.
        _check_target(path, target, folder=config.format == "savedmodel")
    if config.format == "onnx":
        _check_packages("onnx", "tf2onnx")

    with Signals() as signals:
        model, takes = _load(config)
        # A KeyboardInterrupt in the middle of a conversion, which is short, would come out of it
        # as another error.
        signals.defer()
        with tempfile.TemporaryDirectory(prefix="trainer-export-") as folder:
            converted = Path(folder) / f"mnist{SUFFIXES[config.format]}"
            convert(model, converted, config.format, takes, quantize=config.quantize)
            if signals.received:
                raise KeyboardInterrupt(signals.received)
            size = sum(
                file.stat().st_size for file in (converted, *converted.rglob("*")) if file.is_file()
            )
            line = f"{path}  {size / 1e6:.1f} MB  SHA-256 {sha256(converted)}"
            with _output_errors(path):
                place(converted, target)
    print(line, flush=True)


def _load(config: ExportConfig) -> "tuple[keras.Model, Input]":
    """Loads the model; returns what it takes, too."""
    if config.model.suffix != ".keras":
        from trainer.inference import model_file

        return model_file.load(config.model), DIGITS
    from trainer.runtime import keras_defaults
    from trainer.training import saved_model

    with keras_defaults():
        model, _, spec = saved_model.load_model(config.model, config.network)
    return model, Input("images", spec.shape, spec.dtype)


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, or of a folder: that of the lines which sha256sum prints of
    its files, in the order of their names' bytes.

        cd mnist_savedmodel && find . -type f | LC_ALL=C sort | xargs sha256sum | sha256sum
    """
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    names = sorted(
        f"./{file.relative_to(path).as_posix()}" for file in path.rglob("*") if file.is_file()
    )
    lines = "".join(f"{sha256(path / name)}  {name}\n" for name in names)
    return hashlib.sha256(lines.encode()).hexdigest()


def _beside(config: ExportConfig) -> Path:
    ending = {"savedmodel": "_savedmodel", "litert": "_quantized.tflite" * config.quantize}
    suffix = ending.get(config.format) or SUFFIXES[config.format]
    return config.model.parent / f"{config.model.stem}{suffix}"


def _check_target(path: Path, target: Path, *, folder: bool) -> None:
    """Checks that the target can be written, before anything is loaded."""
    kind, received = "a file", ""
    if folder:
        kind = "a SavedModel"
        if target.is_dir():
            others = sorted({file.name for file in target.iterdir()} - _SAVEDMODEL)
            received = f"a folder with {others[0]} in it" if others else ""
        elif target.exists():
            received = "a file"
    elif target.exists() and not target.is_file():
        received = "a folder" if target.is_dir() else "a device"
    if received:
        raise OutputError(
            f"Expected {kind} or nothing at {path}. Received: {received}. "
            "Move it away, or name another place with --output."
        )
    if target.parent.exists():
        with tempfile.TemporaryFile(dir=target.parent):
            pass  # It is writable.


def _check_packages(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"Expected the packages {' and '.join(names)}. Received: a Python without "
            f"{' and '.join(missing)}. Install them: pip install 'digits-trainer[export]'"
        )


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise OutputError(
            f"Expected to write {path}. Received: {reason}. "
            "Make room or permission there, or name another place with --output."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
