"""Conversions of a model to the formats of other runtimes.

    formats.convert(model, Path("mnist.onnx"), "onnx")

Every format takes float32 (n, 28, 28, 1) from 0 to 1 under the name ``digits``, and returns float32
(n, 10) under the name ``probabilities``; n is any number. It holds the forward pass alone: no
optimizer, no dropout.
"""

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import ConfigurationError, OutputError

if TYPE_CHECKING:  # --help loads none of these.
    import keras

SUFFIXES = {"keras": ".keras", "savedmodel": "", "onnx": ".onnx", "litert": ".tflite"}

INPUT, OUTPUT = "digits", "probabilities"

# tf2onnx 1.17's own choice, written out lest another version choose another.
OPSET = 15


def convert(model: "keras.Sequential", path: Path, format: str, *, quantize: bool = False) -> None:
    """Writes a model in another format. The converters' output is not shown.

    Args:
        model: As ``trainer.models.cnn.build`` returns it.
        path: The file to create, with the format's suffix in SUFFIXES, or the folder.
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
            convert(model, path)
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


def _keras(model: "keras.Sequential", path: Path) -> None:
    from trainer.runtime import keras

    # Not compiled: its optimizer's accumulators would be two thirds of the file, and zeros.
    plain = keras.Sequential.from_config(model.get_config())
    plain.set_weights(model.get_weights())
    plain.save(path)


def _savedmodel(model: "keras.Sequential", path: Path) -> None:
    from trainer.runtime import keras, tf

    named = _named(model)
    # Not model.export, which in Keras 3.15 writes every weight twice: as a variable of Keras and
    # as one of TensorFlow.
    archive = keras.export.ExportArchive()
    archive.add_endpoint(
        "serve",
        tf.function(
            lambda digits: named(digits, training=False),
            input_signature=[tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, name=INPUT)],
            autograph=False,
        ),
    )
    archive.write_out(path, verbose=False)


def _onnx(model: "keras.Sequential", path: Path) -> None:
    import onnx

    from trainer.runtime import keras

    # Without its signature Keras wants a model that has been called.
    signature = [keras.InputSpec(shape=model.input_shape, dtype="float32", name=INPUT)]
    _named(model).export(
        path, format="onnx", input_signature=signature, opset_version=OPSET, verbose=False
    )
    exported = onnx.load(path)
    for value in (*exported.graph.input, *exported.graph.output):
        # tf2onnx calls it unk__ and a number.
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    onnx.checker.check_model(exported, full_check=True)
    onnx.save(exported, path)


def _litert(model: "keras.Sequential", path: Path, **options: object) -> None:
    _named(model).export(path, format="litert", verbose=False, **options)


def _quantized_litert(model: "keras.Sequential", path: Path) -> None:
    # Dynamic range: no calibration, and better than full int8 with any of 100 to 1,000 training
    # images (the figures are in docs/using.md).
    from trainer.runtime import tf

    _litert(model, path, optimizations=[tf.lite.Optimize.DEFAULT])


def _named(model: "keras.Sequential") -> "keras.Model":
    """Returns the network with the names that the formats carry."""
    from trainer.runtime import keras

    digits = keras.Input(model.input_shape[1:], dtype="float32", name=INPUT)
    return keras.Model(digits, {OUTPUT: model(digits, training=False)}, name="mnist")
