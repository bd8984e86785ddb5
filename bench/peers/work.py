"""What the programs beside this file have in common: their flags, the data, and what they say.

Each trains the notebook's network, on the same images, as a user of its framework would write it
well, and says in JSON lines where it is; ``bench/compare.py`` reads them and takes the times.
"""

import argparse
import json

import numpy as np


def arguments() -> argparse.Namespace:
    """Reads the flags, which are the same for all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", help="an .npz of Keras' layout")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, help="in an epoch; all there are")
    parser.add_argument("--fast", default="auto", help="the trainer's flag; others have none")
    parser.add_argument("--output", help="where the weights go; nowhere")
    return parser.parse_args()


def load(flags: argparse.Namespace) -> list[np.ndarray]:
    """Returns x_train, y_train, x_test, y_test: uint8 (n, 28, 28) and (n,)."""
    with np.load(flags.data) as data:
        x_train, y_train, x_test, y_test = (
            data[name] for name in ("x_train", "y_train", "x_test", "y_test")
        )
    if flags.steps:
        n = flags.steps * flags.batch_size
        x_train, y_train = x_train[:n], y_train[:n]
        x_test, y_test = x_test[: flags.batch_size], y_test[: flags.batch_size]
    return [x_train, y_train, x_test, y_test]


def say(event: str, **facts: object) -> None:
    """Prints an event; whoever reads it looks at the clock."""
    print(json.dumps({"event": event, **facts}), flush=True)
