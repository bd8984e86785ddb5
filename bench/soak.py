"""What grows in a run of very many epochs: memory, open files, threads, the output folder.

    python bench/soak.py --epochs 2000 --workers 1,2 --output docs/images/soak.png

Each run is of short epochs, each with its checkpoint; every second its processes are looked at
(/proc, so Linux only). What grows is told by the least-squares line through the second half of the
samples, as the first has what fills caches.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
FLAGS = ("--train-limit", "256", "--test-limit", "100", "--no-report", "--threads", "1")
MEASURES = {
    "memory": "memory of all processes (MB)",
    "descriptors": "open files",
    "threads": "threads",
    "files": "files in the output folder",
    "disk": "size of the output folder (MB)",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--workers", default="1,2", help="numbers of workers, separated by commas")
    parser.add_argument("--output", type=Path, help="a PNG of the curves")
    parser.add_argument("--json", type=Path, help="the samples")
    options = parser.parse_args(argv)
    runs = {count: soak(count, options.epochs) for count in map(int, options.workers.split(","))}
    print("| workers | measure | median | growth over the second half |\n|---|---|---|---|")
    for count, samples in runs.items():
        for name, text in MEASURES.items():
            values = np.array(samples[name])
            half = len(values) // 2
            slope = np.polyfit(samples["seconds"][half:], values[half:], 1)[0]
            growth = slope * (samples["seconds"][-1] - samples["seconds"][half])
            print(f"| {count} | {text} | {np.median(values):,.0f} | {growth:+,.1f} |")
    if options.json:
        options.json.write_text(json.dumps(runs) + "\n")
    if options.output:
        draw(runs, options.output, options.epochs)


def soak(workers: int, epochs: int) -> dict[str, list[float]]:
    """Trains, and samples the run every second; returns the samples by measure."""
    flags = ["--epochs", str(epochs), *FLAGS]
    task = ["trainer.task", *flags]
    command = task if workers == 1 else ["trainer.launch", "--workers", str(workers), "--", *flags]
    samples: dict[str, list[float]] = {name: [] for name in ("seconds", *MEASURES)}
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        start = time.monotonic()
        run = subprocess.Popen(
            [sys.executable, "-m", *command, "--output-dir", folder],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1"},
            stdout=subprocess.DEVNULL,
        )
        # The folder has its usual content from the first checkpoint on.
        while run.poll() is None:
            if len(list(Path(folder, "checkpoints").glob("*.index"))) >= 3:
                samples["seconds"].append(time.monotonic() - start)
                for name, value in look(run.pid, Path(folder)).items():
                    samples[name].append(value)
            time.sleep(1)
    if run.returncode:
        raise SystemExit(f"The run ended with {run.returncode}.")
    return samples


def look(pid: int, folder: Path) -> dict[str, float]:
    """Returns the measures of a process, its descendants, and the folder."""
    found, seen = [pid], dict.fromkeys(MEASURES, 0.0)
    for process in found:
        with contextlib.suppress(OSError):  # It has ended.
            proc = Path(f"/proc/{process}")
            found.extend(map(int, Path(f"{proc}/task/{process}/children").read_text().split()))
            pages = int((proc / "statm").read_text().split()[1])
            seen["memory"] += pages * os.sysconf("SC_PAGE_SIZE") / 1e6
            seen["descriptors"] += len(list((proc / "fd").iterdir()))
            seen["threads"] += len(list((proc / "task").iterdir()))
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file():
                seen["files"] += 1
                seen["disk"] += path.stat().st_size / 1e6
    return seen


def draw(runs: dict[int, dict[str, list[float]]], path: Path, epochs: int) -> None:
    """Draws a curve for each measure and number of workers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 10), layout="constrained")
    axes = figure.subplots(len(MEASURES), 1)
    for axis, (name, text) in zip(axes, MEASURES.items(), strict=True):
        for count, samples in runs.items():
            share = np.array(samples["seconds"]) / samples["seconds"][-1] * epochs
            axis.plot(share, samples[name], label=f"{count} worker{'s' * (count > 1)}")
        axis.set_ylabel(text)
        axis.set_ylim(bottom=0)
    axes[0].legend()
    axes[-1].set_xlabel("epochs")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
