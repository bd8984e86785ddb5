"""Measures the data pipeline alone, beside the other ways to build it.

    make bench        or: python bench/pipeline.py

Every variant delivers the same batches of 128 training images, reshaped, divided by 255 and with
one-hot labels, for one epoch. The variants take turns. Shown, as medians over the rounds: images a
second; CPU seconds an epoch, which is what the pipeline takes away from training on a CPU that is
busy anyway; their ratio to the trainer's own pipeline in the same round; and the memory that the
process keeps.
"""

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 7
BATCH_SIZE = 128


def ours(tf, digits):
    """The trainer's: shuffled numbers, a gather a batch, division inside the step."""
    from trainer.data import pipeline
    from trainer.models import cnn

    epoch = 0

    def batches():
        nonlocal epoch
        epoch += 1
        return pipeline.train_batches(
            digits.x_train, digits.y_train, batch_size=BATCH_SIZE, seed=0, epoch=epoch
        )

    return batches, consumer(tf, lambda x, y, weight: cnn.preprocess(x, y))


def divided_in_the_pipeline(tf, digits):
    """The same, divided where the batch is made."""
    from trainer.models import cnn

    batches, _ = ours(tf, digits)

    def mapped():
        return batches().map(lambda x, y, weight: (*cnn.preprocess(x, y), weight)).prefetch(2)

    return mapped, consumer(tf, lambda x, y, *weight: (x, y))


def cached_elements(tf, digits):
    """tf.data's textbook chain on uint8: cache, shuffle the whole set, batch, divide."""
    from trainer.models import cnn

    chain = (
        tf.data.Dataset.from_tensor_slices((digits.x_train, digits.y_train))
        .cache()
        .shuffle(len(digits.x_train), seed=0)
        .batch(BATCH_SIZE)
        .map(cnn.preprocess, num_parallel_calls=tf.data.AUTOTUNE)
        .prefetch(tf.data.AUTOTUNE)
    )
    return lambda: chain, consumer(tf, lambda x, y, *weight: (x, y))


def cached_floats(tf, digits):
    """The same, each image divided before the cache, as many notebooks do."""
    from trainer.models import cnn

    def one(x, y):
        inputs, targets = cnn.preprocess(x[tf.newaxis], y[tf.newaxis])
        return inputs[0], targets[0]

    chain = (
        tf.data.Dataset.from_tensor_slices((digits.x_train, digits.y_train))
        .map(one, num_parallel_calls=tf.data.AUTOTUNE)
        .cache()
        .shuffle(len(digits.x_train), seed=0)
        .batch(BATCH_SIZE)
        .prefetch(tf.data.AUTOTUNE)
    )
    return lambda: chain, consumer(tf, lambda x, y, *weight: (x, y))


VARIANTS = {f.__name__: f for f in (ours, divided_in_the_pipeline, cached_elements, cached_floats)}


def consumer(tf, step):
    """Takes batches as the training loop does: many in one call of a tf.function."""

    @tf.function
    def consume(iterator, steps):
        total = 0.0
        for _ in tf.range(steps):
            x, y = step(*next(iterator))
            total += tf.reduce_sum(x) + tf.reduce_sum(y)  # or nothing would be computed
        return total

    return consume


def epoch_seconds(batches, consume) -> tuple[float, float]:
    """Goes through an epoch; returns its seconds, and the CPU seconds of all threads."""
    start, cpu_start = time.perf_counter(), time.process_time()
    total = float(consume(iter(batches()), 469))
    seconds = time.perf_counter() - start, time.process_time() - cpu_start
    expected = 60000 * (0.1306605 * 784 + 1)  # the mean of the images, and one hot label each
    if abs(total / expected - 1) > 1e-3:
        raise SystemExit(f"the batches add up to {total}, not {expected}: not an epoch of MNIST")
    return seconds


def kept_memory(name: str) -> float:
    """Returns by how many MB a variant makes the process grow, measured in one of its own."""
    shown = subprocess.run(
        [sys.executable, __file__, name], capture_output=True, text=True, check=True
    )
    return float(shown.stdout)


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def print_kept_memory(name: str) -> None:
    from trainer.data import sources
    from trainer.runtime import tf

    digits = sources.load("bundled")
    tf.reduce_sum(tf.ones(3))
    before = resident()
    batches, consume = VARIANTS[name](tf, digits)
    for _ in range(2):
        epoch_seconds(batches, consume)
    print(resident() - before)


def main() -> None:
    from trainer.data import sources
    from trainer.runtime import tf

    digits = sources.load("bundled")
    variants = {name: make(tf, digits) for name, make in VARIANTS.items()}
    times = {name: [] for name in variants}
    for number in range(ROUNDS + 1):
        for name, (batches, consume) in variants.items():
            seconds = epoch_seconds(batches, consume)
            if number:  # The first round fills caches and compiles.
                times[name].append(seconds)
    cpu = {name: [cpu for _, cpu in taken] for name, taken in times.items()}
    print(f"{'variant':24}{'images/s':>12}{'CPU s/epoch':>14}{'ratio':>8}{'kept MB':>10}")
    for name, taken in times.items():
        rate = 60000 / statistics.median(wall for wall, _ in taken)
        ratio = statistics.median(a / b for a, b in zip(cpu[name], cpu["ours"], strict=True))
        print(
            f"{name:24}{rate:12,.0f}{statistics.median(cpu[name]):14.2f}{ratio:8.2f}"
            f"{kept_memory(name):10.0f}"
        )


if __name__ == "__main__":
    print_kept_memory(sys.argv[1]) if len(sys.argv) > 1 else main()
