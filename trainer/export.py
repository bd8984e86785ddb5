"""The command: writes a saved model in the format of another runtime.

    python -m trainer.export mnist.h5 --format onnx      # mnist.onnx, beside mnist.h5

Every format takes float32 (n, 28, 28, 1) from 0 to 1 under the name ``digits``, and gives float32
(n, 10) under the name ``probabilities``; n is any number. It holds what computes them and nothing
of training.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import secrets
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from trainer import cli
from trainer.errors import ConfigurationError, OutputError, UsageError
from trainer.files import flush
from trainer.signals import Signals

if TYPE_CHECKING:  # --help loads none of these.
    import keras

PROG = "python -m trainer.export"

SUFFIXES = {"keras": ".keras", "savedmodel": "", "onnx": ".onnx", "litert": ".tflite"}

INPUT, OUTPUT = "digits", "probabilities"

# tf2onnx 1.17's own choice, written out lest another version choose another.
OPSET = 15

# What TensorFlow writes into the folder of a SavedModel. A folder with anything else in it is
# someone's, and stays.
_SAVEDMODEL = {"saved_model.pb", "fingerprint.pb", "variables", "assets"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Writes a saved model in the format of another runtime.

    Raises:
        UsageError: Flags that do not go together; the message names field, value and remedy.
    """

    model: Positional[Path]
    """An mnist.h5, as python -m trainer.task writes it."""

    format: Literal["keras", "savedmodel", "onnx", "litert"]
    """keras: Keras' own, mnist.keras. savedmodel:
    TensorFlow's, a folder mnist_savedmodel. onnx:
    mnist.onnx. litert: once TensorFlow Lite, mnist.tflite."""

    quantize: bool = False
    """With --format litert: weights of 8 bits (dynamic
    range), a quarter of the size; mnist_quantized.tflite."""

    output: Path | None = None
    """File to write, with the format's suffix, or folder
    for savedmodel; its folder is created where it does not
    exist. None: beside the model."""

    def __post_init__(self) -> None:
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
    """Writes the model in another format, whole or not at all, and says what it has written.

    Raises:
        TrainerError: One of its kinds, for whatever a user can cause or meet.
    """
    place = config.output or _beside(config)
    with _output_errors(place):
        target = Path(os.path.realpath(place))  # What a link leads to is replaced, not the link.
        _check_target(place, target, folder=config.format == "savedmodel")
    if config.format == "onnx":
        _check_packages("onnx", "tf2onnx")

    with Signals() as signals:
        from trainer.inference import model_file

        cnn = model_file.load(config.model)
        # A KeyboardInterrupt in the middle of a conversion, which is short, would come out of it
        # as another error.
        signals.defer()
        with tempfile.TemporaryDirectory(prefix="trainer-export-") as folder:
            made = Path(folder) / f"mnist{SUFFIXES[config.format]}"
            convert(cnn, made, config.format, quantize=config.quantize)
            if signals.received:
                raise KeyboardInterrupt(signals.received)
            size = sum(path.stat().st_size for path in (made, *made.rglob("*")) if path.is_file())
            line = f"{place}  {size / 1e6:.1f} MB  SHA-256 {sha256(made)}"
            with _output_errors(place):
                _put(made, target)
    print(line, flush=True)


def convert(cnn: "keras.Sequential", path: Path, format: str, *, quantize: bool = False) -> None:
    """Writes a model in another format. What the converters say meanwhile is not shown.

    Args:
        cnn: A model of ``trainer.models.cnn``.
        path: A file that ends as SUFFIXES says, or a folder; there is none yet.
        format: One of SUFFIXES.
        quantize: Whether the weights of ``litert`` are to have 8 bits.

    Raises:
        OutputError: The disk is full, here or where temporary files go.
        ConfigurationError: These versions of the packages cannot convert it.
    """
    from trainer.runtime import tf

    convert = {
        "keras": _keras,
        "savedmodel": _savedmodel,
        "onnx": _onnx,
        "litert": _quantized_litert if quantize else _litert,
    }[format]
    try:
        with _quiet():
            convert(cnn, path)
    except (OSError, tf.errors.OpError) as error:
        # TensorFlow's message opens with the place in its graph.
        reason = str(error).rpartition("; ")[2] if isinstance(error, tf.errors.OpError) else error
        raise OutputError(
            f"Expected to write temporary files in {tempfile.gettempdir()}. Received: "
            f"{getattr(error, 'strerror', None) or reason}. Make room or permission there, or set "
            "TMPDIR to another folder."
        ) from error
    except Exception as error:  # A converter meets what it does not understand in many ways.
        raise ConfigurationError(
            f"Expected packages that can convert the model to {format}. Received: "
            f"{type(error).__name__}: {str(error).strip(' .')[:300]}. Install those that were "
            "tested: pip install 'digits-trainer[export]'"
        ) from error


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


def _check_target(place: Path, target: Path, *, folder: bool) -> None:
    """Finds what is in the way before anything is loaded."""
    kind, received = "a file", ""
    if folder:
        kind = "a SavedModel"
        if target.is_dir():
            others = sorted({path.name for path in target.iterdir()} - _SAVEDMODEL)
            received = f"a folder with {others[0]} in it" if others else ""
        elif target.exists():
            received = "a file"
    elif target.exists() and not target.is_file():
        received = "a folder" if target.is_dir() else "a device"
    if received:
        raise OutputError(
            f"Expected {kind} or nothing at {place}. Received: {received}. "
            "Move it away, or name another place with --output."
        )
    if target.parent.exists():
        with tempfile.TemporaryFile(dir=target.parent):
            pass  # It can be written to.


def _check_packages(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"Expected the packages {' and '.join(names)}. Received: a Python without "
            f"{' and '.join(missing)}. Install them: pip install 'digits-trainer[export]'"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what is written to stdout and stderr, by C++ too, from being shown. An error is an
    exception, and says what there is to say.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        for number, _ in kept:
            os.dup2(nothing, number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
        os.close(nothing)


def _keras(cnn: "keras.Sequential", path: Path) -> None:
    from trainer.runtime import keras

    # Not compiled: its optimizer's accumulators would be two thirds of the file, and zeros.
    plain = keras.Sequential.from_config(cnn.get_config())
    plain.set_weights(cnn.get_weights())
    plain.save(path)


def _savedmodel(cnn: "keras.Sequential", path: Path) -> None:
    from trainer.runtime import keras, tf

    named = _named(cnn)
    # Not model.export, which in Keras 3.15 writes every weight twice: as a variable of Keras and
    # as one of TensorFlow.
    archive = keras.export.ExportArchive()
    archive.add_endpoint(
        "serve",
        tf.function(
            lambda digits: named(digits, training=False),
            input_signature=[tf.TensorSpec((None, *cnn.input_shape[1:]), tf.float32, name=INPUT)],
            autograph=False,
        ),
    )
    archive.write_out(path, verbose=False)


def _onnx(cnn: "keras.Sequential", path: Path) -> None:
    import onnx

    from trainer.runtime import keras

    # Without its signature Keras wants a model that has been called.
    signature = [keras.InputSpec(shape=cnn.input_shape, dtype="float32", name=INPUT)]
    _named(cnn).export(
        path, format="onnx", input_signature=signature, opset_version=OPSET, verbose=False
    )
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        # tf2onnx calls it unk__ and a number.
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _litert(cnn: "keras.Sequential", path: Path, **options: object) -> None:
    _named(cnn).export(path, format="litert", verbose=False, **options)


def _quantized_litert(cnn: "keras.Sequential", path: Path) -> None:
    # Dynamic range: no calibration, and better than full int8 with any of 100 to 1,000 training
    # images (README.md has the figures).
    from trainer.runtime import tf

    _litert(cnn, path, optimizations=[tf.lite.Optimize.DEFAULT])


def _named(cnn: "keras.Sequential") -> "keras.Model":
    """Returns the network with the names that the formats carry."""
    from trainer.runtime import keras

    digits = keras.Input(cnn.input_shape[1:], dtype="float32", name=INPUT)
    return keras.Model(digits, {OUTPUT: cnn(digits, training=False)}, name="mnist")


def _put(made: Path, target: Path) -> None:
    """Copies a file or folder to where it is to be, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: two commands may write the same file.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        _copy(made, temporary)
        if made.is_dir() and target.exists():
            _exchange(temporary, target)
        else:
            temporary.replace(target)
        flush(target.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    """Copies a file or folder, onto the disk; with the permissions that new files get."""
    if source.is_dir():
        target.mkdir()
        for path in source.iterdir():
            _copy(path, target / path.name)
    else:
        shutil.copyfile(source, target)
    flush(target)


def _exchange(new: Path, old: Path) -> None:
    """Puts a folder in the place of another, which has afterwards its name."""
    former = new.with_suffix(".old")
    old.rename(former)  # No system call that Python has replaces a folder that is not empty.
    try:
        new.rename(old)
    except BaseException:
        former.rename(old)
        raise
    former.rename(new)


@contextlib.contextmanager
def _output_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise OutputError(
            f"Expected to write {place}. Received: {reason}. "
            "Make room or permission there, or name another place with --output."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
