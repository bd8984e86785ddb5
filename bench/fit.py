"""Measures trainer.fit against model.fit, and a folder of pictures against tf.data, by make bench.

    python bench/fit.py [training] [reading] [--images 20000] [--rounds 5]

Both sides take turns in one process; figures are medians, and ratios of ours to theirs.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import trainer
from trainer.data import pipeline
from trainer.data.folders import ImageFolder
from trainer.runtime import keras, tf

layers = keras.layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["training", "reading"])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for part in options.parts:
        {"training": training, "reading": reading}[part](options.images, options.rounds)


# -- an epoch of training, the second of a call: the first compiles


def dense() -> keras.Model:
    hidden = layers.Dense(64, activation="relu")
    return keras.Sequential([layers.Flatten(), hidden, layers.Dense(10, activation="softmax")])


def convolutional() -> keras.Model:
    return keras.Sequential(
        [
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax"),
        ]
    )


def recurrent() -> keras.Model:
    return keras.Sequential(
        [layers.Reshape((28, 28)), layers.LSTM(32), layers.Dense(10, activation="softmax")]
    )


class Seconds(keras.callbacks.Callback):
    """Notes the duration of each call's second epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if epoch:
            self.noted.append(time.perf_counter() - self.start)


def training(images: int, rounds: int) -> None:
    digits = trainer.load_data("bundled")
    x = digits.x_train[:images, ..., None].astype("float32") / 255
    y = digits.y_train[:images].astype("int32")
    print(f"{len(x):,} images, an epoch: model, batch size, trainer.fit, model.fit, ratio")
    for kind in (dense, convolutional, recurrent):
        for batch_size in (32, 128):
            models, seconds = [], [Seconds(), Seconds()]
            for _ in seconds:
                keras.utils.set_random_seed(0)
                model = kind()
                model.compile("adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
                models.append(model)
            how = {"epochs": 2, "batch_size": batch_size, "verbose": 0}
            for _ in range(rounds):
                trainer.fit(models[0], (x, y), callbacks=[seconds[0]], **how)
                models[1].fit(x, y, callbacks=[seconds[1]], **how)
            ours, theirs = (statistics.median(noted.noted) for noted in seconds)
            print(
                f"{kind.__name__:15} {batch_size:4} {ours:8.3f} s {theirs:8.3f} s "
                f"{ours / theirs:6.2f}",
                flush=True,
            )


# -- an epoch of reading, in batches of 128


def reading(images: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), images)
        start = time.perf_counter()
        data = ImageFolder(folder)
        print(f"{images:,} JPEG pictures of 96×96: opened in {time.perf_counter() - start:.2f} s")
        sides = {
            "ImageFolder": lambda epoch: pipeline.shard_batches(
                data,
                np.random.default_rng(epoch).permutation(len(data)),
                batch_size=128,
                shard=pipeline.Shard(),
            ),
            "tf.data": chain(data),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for epoch in range(rounds + 1):  # The first fills the system's cache.
            for name, side in sides.items():
                start = time.perf_counter()
                read = sum(len(batch[0]) for batch in side(epoch))
                seconds[name].append(time.perf_counter() - start)
                if read != images:
                    raise ValueError(f"Expected {images} pictures. Received: {read}.")
        ours, theirs = (statistics.median(spent[1:]) for spent in seconds.values())
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"ImageFolder {images / ours:,.0f} images/s, tf.data {images / theirs:,.0f}, "
        f"{theirs / ours:.2f} times as many; {most:,.0f} MiB at most"
    )


def chain(data: ImageFolder):
    """The usual chain of tf.data for such files."""
    paths, labels = [str(file.path) for file in data.files], [file.label for file in data.files]

    def read(path: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return tf.io.decode_jpeg(tf.io.read_file(path), 3), label

    def batches(epoch: int) -> tf.data.Dataset:
        files = tf.data.Dataset.from_tensor_slices((paths, labels)).shuffle(len(paths), epoch)
        return files.map(read, tf.data.AUTOTUNE).batch(128).prefetch(tf.data.AUTOTUNE)

    return batches


def write_pictures(folder: Path, images: int) -> None:
    """Writes coloured clouds in ten classes, of 4 kB or so each."""
    from PIL import Image

    noise = np.random.default_rng(0)
    clouds = [
        np.asarray(Image.fromarray(noise.integers(0, 256, (12, 12, 3), np.uint8)).resize((96, 96)))
        for _ in range(200)
    ]
    for label in range(10):
        (folder / str(label)).mkdir()
    for number in range(images):
        picture = Image.fromarray(np.roll(clouds[number % 200], number % 96, axis=0))
        picture.save(folder / str(number % 10) / f"{number:07}.jpg", quality=85)


if __name__ == "__main__":
    sys.exit(main())
