"""Measures what augmentation adds to the training on the digits' CPU path.

    make bench        or: python bench/augmentation.py --rounds 3

Every variant trains the first 12,800 images, 100 steps an epoch, and counts the epochs after the
first. The variants take turns. Shown, as medians over the rounds: milliseconds a step, and their
ratio to those without augmentation in the same round.
"""

import argparse
import statistics

VARIANTS = (
    "none",
    "affine",
    "rotate=15",
    "translate=0.1",
    "elastic",
    "flip",
    "brightness contrast",
    "affine elastic",
    "affine elastic flip brightness contrast",
)
EPOCHS, STEPS, BATCH_SIZE = 4, 100, 128


def step_milliseconds(augment: str) -> float:
    """Trains; returns the median time of a step in the epochs after the first."""
    from trainer.config import TrainConfig
    from trainer.data import sources
    from trainer.training import digits_workload

    digits = sources.load("bundled").first(STEPS * BATCH_SIZE, 1)
    config = TrainConfig(epochs=EPOCHS, augment=augment)
    _, history = digits_workload.fit(config, digits)
    return 1000 * statistics.median(history["seconds"][1:]) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    times = {augment: [] for augment in VARIANTS}
    for _ in range(rounds):
        for augment, taken in times.items():
            taken.append(step_milliseconds(augment))
    print(f"{'--augment':42}{'ms a step':>10}{'ratio':>8}")
    for augment, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, times["none"], strict=True))
        print(f"{augment:42}{statistics.median(taken):10.1f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
