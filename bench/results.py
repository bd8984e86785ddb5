"""Keeps in results.json what ``bench/compare.py`` has measured; makes a page and a plot of it."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
KEPT = FOLDER / "results.json"

STEP_GFLOP = 10.07  # products of a step at batch 128, forward and backward, without Winograd

TITLES = {
    "step": "A step, batch 128: milliseconds",
    "start": "From the command to the first step: seconds",
    "pipeline": "Images a second: the pipeline alone, and the step",
    "whole": "The default run, ten epochs, from the command to the file",
    "recipe-fast": "`--recipe fast`: from the command to the file",
    "recipe-best": "`--recipe best`: from the command to the file",
    "paths": "Test accuracy after two epochs, by the fast step and by Keras'",
    "batch": "An image, by batch size: microseconds",
    "data": "An epoch of this trainer on 60,000 images, and on ten times as many",
    "workers": "One core, and two: images a second",
}
# What the first of each pair is divided by the second.
RATIOS = {
    "step": [
        ("Keras fit", "this trainer"),
        ("Keras fit, same settings", "this trainer"),
        ("this trainer, --fast off", "this trainer"),
        ("PyTorch", "this trainer"),
        ("JAX", "this trainer"),
    ],
    "pipeline": [("delivered", "consumed")],
    "whole": [
        ("this trainer, s", "Keras fit, s"),
        ("this trainer, MB", "Keras fit, MB"),
    ],
    "data": [("10x, s an epoch", "1x, s an epoch")],
    "workers": [
        ("two workers", "one worker"),
        ("MirroredStrategy, two logical devices", "one worker"),
    ],
}


def write(part: str, rounds: Sequence[dict[str, float]], machine: str) -> None:
    """Keeps the rounds of a part, in place of those before."""
    kept = _read()
    kept[part] = {"machine": machine, "rounds": list(rounds)}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")


def render() -> None:
    """Writes results.md and results.png of all that is kept."""
    kept = _read()
    lines = ["# Measured", "", "Written by `make bench`; `bench/compare.py` says how.", ""]
    for part, title in TITLES.items():
        if part in kept:
            lines += _section(part, title, **kept[part])
    # The image is built elsewhere, and its size written down by hand.
    lines.append((FOLDER / "image.md").read_text())
    (FOLDER / "results.md").write_text("\n".join(lines))
    if "step" in kept:
        _plot(kept["step"]["rounds"])


def _read() -> dict:
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def _section(part: str, title: str, *, machine: str, rounds: list[dict[str, float]]) -> list[str]:
    lines = [f"## {title}", "", f"{machine}; {len(rounds)} rounds.", ""]
    lines += ["| what | median | least | most |", "|---|---|---|---|"]
    for name in rounds[0]:
        values = [one[name] for one in rounds if not math.isnan(one[name])]
        if values:
            shown = (statistics.median(values), min(values), max(values))
            if name.endswith("accuracy") or part == "paths":
                mean = f"; mean {statistics.mean(values):.2%}"
                lines.append(f"| {name}{mean} | " + " | ".join(f"{v:.2%}" for v in shown) + " |")
            else:
                lines.append(f"| {name} | " + " | ".join(f"{v:,.1f}" for v in shown) + " |")
    lines.append("")
    for first, second in RATIOS.get(part, []):
        ratios = [one[first] / one[second] for one in rounds]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"- {first} / {second}: **{statistics.median(ratios):.2f}** ({spread})")
    if part == "step":
        shares = [
            STEP_GFLOP / one["matrix product, GFLOP/s"] * 1000 / one["this trainer"]
            for one in rounds
        ]
        lines.append(
            f"- {STEP_GFLOP} GFLOP at the speed of the matrix product / this trainer: "
            f"**{statistics.median(shares):.2f}** ({min(shares):.2f} to {max(shares):.2f}); "
            "above 1 where Winograd's fewer products make up for all the rest"
        )
    return [*lines, ""]


def _plot(rounds: list[dict[str, float]]) -> None:
    from matplotlib.figure import Figure

    names = [name for name in rounds[0] if not name.startswith("matrix")]
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.subplots()
    medians = [statistics.median(one[name] for one in rounds) for name in names]
    bars = axes.barh(names, medians, color=["#1f77b4", *["#b0b0b0"] * (len(names) - 1)])
    axes.bar_label(bars, fmt="%.0f ms", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(medians))
    axes.set_xlabel("milliseconds a step of 128 images")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / "results.png", dpi=150, metadata={"Software": None})
