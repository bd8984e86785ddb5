"""Measures data sets of 60,000 to 6,000,000 images on disk, by make bench.

    python bench/large.py [npy] [array_record] [--images 60000 600000 6000000]

Each data set is written to a temporary folder: images of 32×32, random, so that none is compressed
well. Each side reads it in a process of its own: the time to open it, to the first batch of an
epoch, and to the first one from the middle, as a run does that is resumed; then images a second in
batches of 128, over an epoch or 2,000 batches; and by how much its own memory has grown (RssAnon:
pages of mapped files are the system's to take back).

Beside them stands the chain of tf.data that is usual for such files, in turn: for .npy files
``FixedLengthRecordDataset``, for array_record what ``tfds.load`` gives for the same examples as
tfrecord files; both with a shuffle buffer of 10,000, where ours shuffles the whole set.
(``bench/fit.py reading`` does the same for a folder of JPEG files.)
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = (32, 32, 1)
BATCH_SIZE, BATCHES, BUFFER = 128, 2_000, 10_000
CLASSES = 10
WRITTEN = 10_000  # Images at a time.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--images", nargs="*", type=int, default=[60_000, 600_000, 6_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)  # kind, side, folder
    options = parser.parse_args()
    if options.side:
        kind, side, folder = options.side
        measure(KINDS[kind][side], Path(folder))
        return
    print(
        f"{'files':14}{'images':>10}  {'side':8}{'open s':>8}{'first s':>9}{'middle s':>10}"
        f"{'images/s':>10}{'ratio':>7}{'MiB':>7}"
    )
    for kind in options.kinds:
        for count in options.images:
            with tempfile.TemporaryDirectory(prefix="bench-large-") as folder:
                KINDS[kind]["write"](Path(folder), count)
                compare(kind, count, folder, options.rounds)


def compare(kind: str, count: int, folder: str, rounds: int) -> None:
    """Has both sides read a data set in turn, and prints the medians."""
    found: dict[str, list[dict]] = {"ours": [], "tf.data": []}
    for _ in range(rounds):
        for side, results in found.items():
            command = [sys.executable, __file__, "--side", kind, side, folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    ratios = [a["rate"] / b["rate"] for a, b in zip(*found.values(), strict=True)]
    for side, results in found.items():
        middle = {
            name: np.median([result[name] for result in results]) if results[0][name] else None
            for name in results[0]
        }
        resumed = "-" if middle["middle"] is None else f"{middle['middle']:.2f}"
        ratio = f"{np.median(ratios):.2f}" if side == "ours" else ""
        print(
            f"{kind:14}{count:10,}  {side:8}{middle['open']:8.2f}{middle['first']:9.2f}"
            f"{resumed:>10}{middle['rate']:10,.0f}{ratio:>7}{middle['memory']:7,.0f}",
            flush=True,
        )


def measure(opened: Callable[[Path], tuple[Any, Callable]], folder: Path) -> None:
    """Reads a data set, and prints what that took as JSON."""
    from trainer.runtime import tf

    tf.zeros(1)
    before, start = anonymous_memory(), time.perf_counter()
    steps, batches = opened(folder)
    result: dict[str, float | None] = {"open": time.perf_counter() - start, "middle": None}
    start = time.perf_counter()
    iterator = iter(batches(0))
    next(iterator)
    result["first"] = time.perf_counter() - start
    start, count = time.perf_counter(), min(BATCHES, steps - 1)
    for _ in range(count):
        next(iterator)
    result["rate"] = count * BATCH_SIZE / (time.perf_counter() - start)
    result["memory"] = (anonymous_memory() - before) / 2**20
    if batches.__name__ == "ours":
        start = time.perf_counter()
        next(iter(batches(steps // 2)))
        result["middle"] = time.perf_counter() - start
    print(json.dumps(result))


def anonymous_memory() -> int:
    """Returns the bytes of memory that are this process' own."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def ours(data) -> tuple[int, Callable]:
    """Returns a data set's batches as a training reads them."""
    from trainer.data.pipeline import Shard
    from trainer.training.feed import Feed

    feed = Feed(data, BATCH_SIZE, Shard(), seed=0)

    def ours(first_step: int):
        return feed(0, first_step)

    return feed.steps, ours


# -- .npy files


def write_npy(folder: Path, count: int) -> None:
    noise = np.random.default_rng(0)
    x = np.lib.format.open_memmap(folder / "x_train.npy", "w+", np.uint8, (count, *SHAPE))
    for start in range(0, count, WRITTEN):
        part = x[start : start + WRITTEN]
        part[:] = noise.integers(0, 256, part.shape, np.uint8)
    x.flush()
    np.save(folder / "y_train.npy", np.arange(count) % CLASSES)
    np.save(folder / "x_test.npy", np.zeros((CLASSES, *SHAPE), np.uint8))
    np.save(folder / "y_test.npy", np.arange(CLASSES))


def our_npy(folder: Path):
    from trainer.data import sources

    return ours(sources.load(str(folder)).train)


def their_npy(folder: Path):
    from trainer.runtime import tf

    path, size = folder / "x_train.npy", int(np.prod(SHAPE))
    count = path.stat().st_size // size
    header = path.stat().st_size - count * size
    images = tf.data.FixedLengthRecordDataset(str(path), size, header_bytes=header)
    labels = tf.data.Dataset.from_tensor_slices(np.load(folder / "y_train.npy"))

    def decoded(image, label):
        return tf.reshape(tf.io.decode_raw(image, tf.uint8), (-1, *SHAPE)), label

    def theirs(_: int):
        pairs = tf.data.Dataset.zip(images, labels).shuffle(BUFFER, seed=0).batch(BATCH_SIZE)
        return pairs.map(decoded, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)

    return -(-count // BATCH_SIZE), theirs


# -- array_record and tfrecord files of TensorFlow Datasets


def write_records(folder: Path, count: int) -> None:
    for kind in ("array_record", "tfrecord"):
        program = f"import large; large.write_one({str(folder)!r}, {count}, {kind!r})"
        here = Path(__file__).parent
        subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, check=True)


def write_one(folder: str, count: int, kind: str) -> None:
    import tensorflow as tf
    import tensorflow_datasets as tfds

    noise = np.random.default_rng(0)

    def part(count: int) -> tf.data.Dataset:
        def examples():
            for number in range(count):
                image = noise.integers(0, 256, SHAPE, np.uint8)
                yield {"image": image, "label": number % CLASSES}

        spec = {"image": tf.TensorSpec(SHAPE, tf.uint8), "label": tf.TensorSpec((), tf.int64)}
        return tf.data.Dataset.from_generator(examples, output_signature=spec)

    tfds.dataset_builders.store_as_tfds_dataset(
        name="noise",
        version="1.0.0",
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=SHAPE),
                "label": tfds.features.ClassLabel(num_classes=CLASSES),
            }
        ),
        split_datasets={"train": part(count), "test": part(CLASSES)},
        data_dir=f"{folder}/{kind}",
        disable_shuffling=True,
        file_format=kind,
    )


def our_records(folder: Path):
    import tensorflow_datasets as tfds

    from trainer.data.records import Records

    builder = tfds.builder_from_directory(folder / "array_record" / "noise" / "1.0.0")
    return ours(Records(builder, "train", None))


def their_records(folder: Path):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder / "tfrecord" / "noise" / "1.0.0")

    def theirs(_: int):
        examples = builder.as_dataset(split="train")
        pairs = examples.map(lambda one: (one["image"], one["label"]), tf.data.AUTOTUNE)
        return pairs.shuffle(BUFFER, seed=0).batch(BATCH_SIZE).prefetch(tf.data.AUTOTUNE)

    return -(-builder.info.splits["train"].num_examples // BATCH_SIZE), theirs


KINDS: dict[str, dict[str, Callable]] = {
    "npy": {"write": write_npy, "ours": our_npy, "tf.data": their_npy},
    "array_record": {"write": write_records, "ours": our_records, "tf.data": their_records},
}

if __name__ == "__main__":
    main()
