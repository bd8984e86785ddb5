"""What Keras callbacks remember, so that a resumed run stops where an undisturbed one does.

    state = CallbackState(callbacks)
    content = state.dumps()
    state.resume(content, epochs=2)     # before training begins, with state among the callbacks

EarlyStopping counts the epochs since the best one and keeps its weights; ReduceLROnPlateau and
ModelCheckpoint remember the best value. Keras resets that where training begins. Every attribute of
a callback is taken that is a number, a text, an array, or a list or dictionary of them, but for the
arguments of its constructor: those are the new run's. No code can be in what is read back.
"""

import contextlib
import inspect
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.errors import ConfigurationError
from trainer.runtime import keras

_KERAS = ("_model", "_params", "model", "params", "validation_data")  # of keras.callbacks.Callback


class CallbackState(keras.callbacks.Callback):
    """The state of callbacks, itself one, which comes after them.

    Args:
        callbacks: Keras callbacks.

    Raises:
        ConfigurationError: One of them saves and restores the model itself.
    """

    def __init__(self, callbacks: Sequence[keras.callbacks.Callback]) -> None:
        super().__init__()
        self.callbacks = list(callbacks)
        self._resumed: tuple[dict, int] | None = None
        for callback in self.callbacks:
            if isinstance(callback, keras.callbacks.BackupAndRestore):
                raise ConfigurationError(
                    "Expected callbacks that leave resuming to output_dir. Received: "
                    "BackupAndRestore. Leave it out."
                )

    def dumps(self) -> bytes:
        """Returns the state, as NumPy's archive of arrays."""
        arrays: dict[str, np.ndarray] = {}
        states = []
        for number, callback in enumerate(self.callbacks):
            arguments = inspect.signature(type(callback).__init__).parameters
            state = {}
            for name, value in vars(callback).items():
                if name in _KERAS or name in arguments or _is_file(callback):
                    continue
                kept: dict[str, np.ndarray] = {}
                with contextlib.suppress(TypeError):
                    state[name] = _encode(value, kept, f"{number}/{name}")
                    arrays |= kept
            states.append({"class": type(callback).__name__, "state": state})
        # Keras' own has what callbacks have added to it, such as the learning rate.
        history = _encode(self.model.history.history, arrays, "history")
        stopped = bool(self.model.stop_training)
        text = json.dumps({"callbacks": states, "history": history, "stopped": stopped})
        content = io.BytesIO()
        arrays["state"] = np.frombuffer(text.encode(), np.uint8)
        np.savez(content, **arrays)  # type: ignore[arg-type]  # which could name its options
        return content.getvalue()

    def resume(self, content: bytes, epochs: int) -> None:
        """Has the callbacks go on from what ``dumps`` returned when training begins.

        Args:
            content: From ``dumps``.
            epochs: Number of the epochs before.

        Raises:
            ConfigurationError: They are other callbacks.
        """
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = dict(archive)
        state = json.loads(arrays.pop("state").tobytes())
        expected = [callback["class"] for callback in state["callbacks"]]
        received = [type(callback).__name__ for callback in self.callbacks]
        if expected != received:
            raise ConfigurationError(
                "Expected the callbacks of the unfinished run: "
                f"{', '.join(expected) or 'none'}. Received: {', '.join(received) or 'none'}. "
                "Use its callbacks, or resume='never' to start anew."
            )
        for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
            saved["state"] = {
                name: _decode(value, arrays) for name, value in saved["state"].items()
            }
            if _is_file(callback):
                callback.append = True  # Or it would begin its file anew.
        state["history"] = _decode(state["history"], arrays)
        self._resumed = state, epochs

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Sets the state that is resumed, after Keras has reset it."""
        if self._resumed is None:
            return
        state, epochs = self._resumed
        for callback, saved in zip(self.callbacks, state["callbacks"], strict=True):
            for name, value in saved["state"].items():
                setattr(callback, name, value)
        self.model.stop_training = state["stopped"]
        self.model.history.history = state["history"]
        self.model.history.epoch = list(range(epochs))


def _is_file(callback: keras.callbacks.Callback) -> bool:
    """Tells whether what a callback remembers is its file."""
    return isinstance(callback, keras.callbacks.CSVLogger)


def _encode(value: Any, arrays: dict[str, np.ndarray], key: str) -> Any:
    """Returns a value as JSON can hold it; arrays are added under names that begin with a key.

    Raises:
        TypeError: It is of another type.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf":
        arrays[key] = np.asarray(value)
        return {"array": key, "scalar": isinstance(value, np.generic)}
    if type(value) in (list, tuple):
        items = [_encode(item, arrays, f"{key}/{number}") for number, item in enumerate(value)]
        return {type(value).__name__: items}
    if type(value) is dict and all(type(name) is str for name in value):
        pairs = [
            [name, _encode(item, arrays, f"{key}/{number}")]
            for number, (name, item) in enumerate(value.items())
        ]
        return {"dict": pairs}
    raise TypeError(f"Expected a number, text, array or collection. Received: {type(value)}.")


def _decode(value: Any, arrays: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "array" in value:
        array = arrays[value["array"]]
        return array[()] if value["scalar"] else array
    if "dict" in value:
        return {name: _decode(item, arrays) for name, item in value["dict"]}
    (kind, items), *_ = value.items()
    decoded = [_decode(item, arrays) for item in items]
    return tuple(decoded) if kind == "tuple" else decoded
