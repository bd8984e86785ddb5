"""Measures the test accuracy of augmentations and optimizers over several seeds.

    python bench/accuracy.py --output accuracy.json                 # hours: start it again to go on
    python bench/accuracy.py --output accuracy.json --show

Each run keeps a tenth of the training images for validation. An optimizer's learning rate is that
with the highest validation accuracy of RATES, around its default, with seed 0; then it is trained
with every seed. The test images judge each model once, at the end. A run whose figures are in the
file is not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from trainer.recipes import LEARNING_RATES

AUGMENTATIONS = (
    "none",
    "affine",
    "rotate=10",
    "shear=10",
    "zoom=0.1",
    "translate=0.07",
    "elastic=0.1",
    "affine elastic=0.1",
)
RATES = (0.3, 1.0, 3.0)  # Times the default.
OF_ALL = ("--validation-split", "0.1", "--no-report", "--log-format", "json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=["augmentations", "optimizers"])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train-limit", type=int, default=60_000)
    parser.add_argument("--show", action="store_true", help="print what has been measured so far")
    options = parser.parse_args()
    done = Runs(options.output, options.epochs, options.train_limit, run=not options.show)
    print(f"{options.epochs} epochs, {options.train_limit:,} images, a tenth for validation\n")
    print("| | test accuracy: mean | lowest | highest | seeds |\n|---|---|---|---|---|")
    for augment in AUGMENTATIONS if "augmentations" in options.parts else ():
        show(f"`--augment {augment}`", done.all(options.seeds, "--augment", *augment.split()))
    for name, default in LEARNING_RATES.items() if "optimizers" in options.parts else ():
        tried = {
            rate: found["val_accuracy"]
            for rate in (factor * default for factor in RATES)
            if (found := done.one(0, "--optimizer", name, "--learning-rate", f"{rate:g}"))
        }
        if tried:
            best = f"{max(tried, key=tried.__getitem__):g}"
            flags = "--optimizer", name, "--learning-rate", best
            show(f"`{name}`, {best}", done.all(options.seeds, *flags))


class Runs:
    """Runs whose figures are kept in a file.

    Args:
        path: The file.
        epochs: Epochs of each.
        images: Training images of each.
        run: Whether one that is not there is run.
    """

    def __init__(self, path: Path, epochs: int, images: int, *, run: bool) -> None:
        self.path = path
        self.flags = ("--epochs", str(epochs), "--train-limit", str(images), *OF_ALL)
        self.run = run
        self.kept = json.loads(path.read_text()) if path.exists() else {}

    def all(self, seeds: int, *flags: str) -> list[float]:
        """Returns the test accuracies of every seed."""
        found = (self.one(seed, *flags) for seed in range(seeds))
        return [metrics["test_accuracy"] for metrics in found if metrics]

    def one(self, seed: int, *flags: str) -> dict[str, float]:
        """Returns the metrics of a run; nothing, if it is not there and is not to be run."""
        argv = [*self.flags, "--seed", str(seed), *flags]
        name = " ".join(argv)
        if name not in self.kept and self.run:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "trainer.task", *argv, "--output-dir", folder]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode == 70:  # Its loss became NaN.
                    metrics = {"val_accuracy": 0.0, "test_accuracy": 0.0}
                elif done.returncode:
                    raise SystemExit(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
                else:
                    metrics = json.loads((Path(folder) / "mnist.json").read_text())["metrics"]
            self.kept[name] = metrics
            self.path.write_text(json.dumps(self.kept, indent=1) + "\n")
        return self.kept.get(name, {})


def show(name: str, accuracies: list[float]) -> None:
    """Prints a row of the table."""
    if accuracies:
        mean = statistics.mean(accuracies)
        print(
            f"| {name} | {mean:.2%} | {min(accuracies):.2%} | {max(accuracies):.2%} | "
            f"{len(accuracies)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
