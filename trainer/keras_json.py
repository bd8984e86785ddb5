"""Keras' configuration file, read as Keras and TensorFlow read it when they are imported.

    path, settings, fault = keras_json.read(os.environ)

With some contents their import fails, and with a pipe in its place it waits for ever.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from trainer import inputs

# What TensorFlow 2.21's own copy of Keras accepts; Keras 3.15 accepts more for floatx.
_FLOAT_TYPES = ("float16", "float32", "float64")
_IMAGE_DATA_FORMATS = ("channels_last", "channels_first")


class KerasJson(NamedTuple):
    """A keras.json.

    Attributes:
        path: Where Keras looks for it.
        settings: What it has; None where there is none, or none that Keras could read.
        fault: Why Keras and TensorFlow cannot be imported, to be put after the path; or "".
    """

    path: Path
    settings: dict | None
    fault: str


def read(environ: Mapping[str, str]) -> KerasJson:
    """Reads keras.json.

    Args:
        environ: The environment; its KERAS_HOME names the folder.
    """
    path = _folder(environ) / "keras.json"
    if not path.exists():
        return KerasJson(path, None, "")
    try:
        with inputs.open_file(path) as file:
            settings = json.load(file)
    except OSError as error:
        return KerasJson(path, None, f"cannot be read: {error.strerror}")
    except ValueError:
        return KerasJson(path, None, "")  # Keras ignores it.
    except RecursionError:
        return KerasJson(path, None, "is nested too deeply")
    if not isinstance(settings, dict):
        return KerasJson(path, None, "has no object")
    return KerasJson(path, settings, _wrong_settings(settings))


def _wrong_settings(settings: dict) -> str:
    expected = {
        "floatx": _FLOAT_TYPES.__contains__,
        "epsilon": lambda value: isinstance(value, float),
        "image_data_format": _IMAGE_DATA_FORMATS.__contains__,
    }
    wrong = [
        f"{name}={settings[name]!r}"
        for name, is_right in expected.items()
        if name in settings and not is_right(settings[name])
    ]
    return f"has {', '.join(wrong)}" if wrong else ""


def _folder(environ: Mapping[str, str]) -> Path:
    if "KERAS_HOME" in environ:
        return Path(environ["KERAS_HOME"]).expanduser()
    home = Path("~").expanduser()
    return (home if os.access(home, os.W_OK) else Path("/tmp")) / ".keras"  # noqa: S108
