"""What the programs for GPUs beside this file have in common: their flags, the data, what they say.

Each trains the notebook's network with its data on the device, as a user of its framework would
write it well, and times its own epochs when the device has finished them; ``bench/gpu.py`` reads
the JSON lines.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

PRECISIONS = ("float32", "tensorfloat32", "mixed_bfloat16")


def arguments() -> argparse.Namespace:
    """Reads the flags, which are the same for all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", help="an .npz of Keras' layout")
    parser.add_argument("part", nargs="?", default="steps", help="of the trainer's own program")
    parser.add_argument("--batch-sizes", type=_numbers, default=[128, 512, 2048, 8192])
    parser.add_argument("--precisions", type=_words, default=list(PRECISIONS))
    parser.add_argument("--epochs", type=int, default=3, help="of each combination")
    parser.add_argument("--train-limit", type=int, help="training images; all there are")
    parser.add_argument("--seeds", type=int, default=3, help="of each recipe")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _words(text: str) -> list[str]:
    return text.split(",")


def load(flags: argparse.Namespace) -> list[np.ndarray]:
    """Returns x_train, y_train, x_test, y_test: uint8 (n, 28, 28) and (n,)."""
    with np.load(flags.data) as data:
        arrays = [data[name] for name in ("x_train", "y_train", "x_test", "y_test")]
    n = flags.train_limit
    return [*(array[:n] for array in arrays[:2]), *(array[: n and n // 2] for array in arrays[2:])]


def say(event: str, **facts: object) -> None:
    """Prints an event."""
    print(json.dumps({"event": event, **facts}), flush=True)


def time_epochs(
    name: str, batch_size: int, precision: str, steps: int, epochs: int, epoch: Callable[[], object]
) -> None:
    """Runs epochs and says what they take.

    Args:
        name: Of the program, and how it is set.
        batch_size: Rows in a batch.
        precision: One of ``PRECISIONS``.
        steps: Number of steps in an epoch.
        epochs: Number of epochs; the first one compiles.
        epoch: Trains one, and returns when the device has finished.
    """
    seconds = []
    for _ in range(epochs):
        start = time.perf_counter()
        epoch()
        seconds.append(time.perf_counter() - start)
    say(
        "step",
        name=name,
        batch_size=batch_size,
        precision=precision,
        us=statistics.median(seconds[1:] or seconds) / steps * 1e6,
        first_epoch_s=seconds[0],
    )
