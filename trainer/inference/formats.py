"""Conversions of a model to the formats of other runtimes.

    formats.convert(model, Path("mnist.onnx"), "onnx", DIGITS)

Every format takes float32 (n, height, width, channels) and returns float32 (n, classes) under the
name ``probabilities``; n is any number. The input is called ``digits`` and is from 0 to 1 where it
is (n, 28, 28, 1) of the network for digits; else it is called ``images`` and is from 0 to 255. It
holds the forward pass alone: no optimizer, no dropout.
"""

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from trainer.errors import ConfigurationError, OutputError

if TYPE_CHECKING:  # --help loads none of these.
    import keras

SUFFIXES = {"keras": ".keras", "savedmodel": "", "onnx": ".onnx", "litert": ".tflite"}

OUTPUT = "probabilities"


class Input(NamedTuple):
    """What a model takes.

    Attributes:
        name: As the formats call it.
        shape: Of an image.
        dtype: Of the images that it was trained on; the formats take float32, and cast.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


DIGITS = Input("digits", (28, 28, 1))

# tf2onnx 1.17's own choice, written out lest another version choose another.
OPSET = 15


def convert(
    model: "keras.Model",
    path: Path,
    format: str,
    takes: Input = DIGITS,
    *,
    quantize: bool = False,
) -> None:
    """Writes a model in another format. The converters' output is not shown.

    Args:
        model: Of one input and one output.
        path: The file to create, with the format's suffix in SUFFIXES, or the folder.
        format: One of SUFFIXES; ``keras`` for a ``keras.Sequential``.
        takes: What the model takes.
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
            convert(model, path, takes)
    except (OSError, tf.errors.OpError) as error:
        # TensorFlow's message begins with the location in its graph.
        reason = str(error).rpartition("; ")[2] if isinstance(error, tf.errors.OpError) else error
        raise OutputError(
            f"Expected to write temporary files in {tempfile.gettempdir()}. Received: "
            f"{getattr(error, 'strerror', None) or reason}. Make room or permission there, or set "
            "TMPDIR to another folder."
        ) from error
    except Exception as error:  # Converters raise errors of many types.
        raise ConfigurationError(
            f"Expected packages that can convert the model to {format}. Received: "
            f"{type(error).__name__}: {str(error).strip(' .')[:300]}. Install those that were "
            "tested: pip install 'digits-trainer[export]'"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discards what is written to stdout and stderr, by C++ too; errors are raised."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(number, os.dup(number)) for number in (1, 2)]
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        for number, _ in saved:
            os.dup2(null, number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in saved:
            os.dup2(copy, number)
            os.close(copy)
        os.close(null)


def _keras(model: "keras.Model", path: Path, takes: Input) -> None:
    from trainer.runtime import keras

    del takes
    # Not compiled: its optimizer's accumulators would be two thirds of the file, and zeros.
    plain = keras.Sequential.from_config(model.get_config())
    plain.set_weights(model.get_weights())
    plain.save(path)


def _savedmodel(model: "keras.Model", path: Path, takes: Input) -> None:
    from trainer.runtime import keras, tf

    named = _named(model, takes)
    # Not model.export, which in Keras 3.15 writes every weight twice: as a variable of Keras and
    # as one of TensorFlow.
    archive = keras.export.ExportArchive()
    archive.add_endpoint(
        "serve",
        tf.function(
            lambda images: named(images, training=False),
            input_signature=[tf.TensorSpec((None, *takes.shape), tf.float32, name=takes.name)],
            autograph=False,
        ),
    )
    archive.write_out(path, verbose=False)


def _onnx(model: "keras.Model", path: Path, takes: Input) -> None:
    import onnx

    from trainer.runtime import keras

    # Without its signature Keras wants a model that has been called.
    signature = [keras.InputSpec(shape=(None, *takes.shape), dtype="float32", name=takes.name)]
    _named(model, takes).export(
        path, format="onnx", input_signature=signature, opset_version=OPSET, verbose=False
    )
    exported = onnx.load(path)
    for value in (*exported.graph.input, *exported.graph.output):
        # tf2onnx calls it unk__ and a number.
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    onnx.checker.check_model(exported, full_check=True)
    onnx.save(exported, path)


def _litert(model: "keras.Model", path: Path, takes: Input, **options: object) -> None:
    _named(model, takes).export(path, format="litert", verbose=False, **options)


def _quantized_litert(model: "keras.Model", path: Path, takes: Input) -> None:
    # Dynamic range: no calibration, and better than full int8 with any of 100 to 1,000 training
    # images (the figures are in docs/using.md).
    from trainer.runtime import tf

    _litert(model, path, takes, optimizations=[tf.lite.Optimize.DEFAULT])


def _named(model: "keras.Model", takes: Input) -> "keras.Model":
    """Returns the network with the names that the formats carry, float32 in and out."""
    from trainer.runtime import keras

    images = keras.Input(takes.shape, dtype="float32", name=takes.name)
    cast = images if takes.dtype == "float32" else keras.ops.cast(images, takes.dtype)
    output = model(cast, training=False)
    if output.dtype != "float32":
        output = keras.ops.cast(output, "float32")
    return keras.Model(images, {OUTPUT: output}, name="mnist")
