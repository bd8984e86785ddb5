"""Charts of a run and of its model's predictions, as Matplotlib figures.

    figure = charts.curves(history)
    content = charts.png(figure)

Only Matplotlib's object-oriented interface is used, never pyplot: no window, and no global state
shared with a notebook or another thread. Figures are at most 9.6 inches wide, 960 CSS pixels.
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from trainer.files import MARK
from trainer.reporting.scores import Scores

if TYPE_CHECKING:  # Imported by the functions that draw: it takes a second.
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From the palette of Okabe and Ito (2008), https://jfly.uni-koeln.de/color/, for colour-blind
# readers too.
BLUE, ORANGE, RED = "#0072b2", "#e69f00", "#b03a00"
INK, GREY, PALE, PALER = "#24292f", "#6e7781", "#d0d7de", "#eaeef2"

TILES = 24  # images in a grid, at most
AUGMENTED = 64  # augmented images, at most
PIXELS = 120  # along a side of one of them, before every second one is left out
NUMBERS = 20  # classes of a confusion matrix with numbers in its cells, at most
NAMES = 40  # classes that are named along its sides, at most

_STYLE = {
    "font.family": ["DejaVu Sans"],  # part of Matplotlib
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "figure.facecolor": "white",
    "savefig.dpi": 200,  # two pixels per CSS pixel
}


class Pictures(Protocol):
    """Images by their numbers: an array, or what reads them as they are asked for."""

    def __getitem__(self, numbers: np.ndarray, /) -> np.ndarray:
        """Returns images, uint8 (k, height, width) or (k, height, width, channels)."""


def curves(
    history: Mapping[str, Sequence[float]], *, measured: str = "test", metric: str = "accuracy"
) -> "Figure":
    """Draws the loss and a metric by epoch, for training images and for others.

    Args:
        history: As ``history.json`` has it: ``loss``, ``accuracy``, ``val_loss``, ``val_accuracy``.
        measured: What the others are called.
        metric: The metric; ``loss`` where there is none.
    """
    with _style():
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        figure = _figure(9.6, 3.6)
        figure.get_layout_engine().set(wspace=0.08)
        left, right = figure.subplots(1, 2)
        epochs = np.arange(1, len(history["loss"]) + 1)
        # A single epoch has no line, and many markers hide it.
        size = 7 if len(epochs) == 1 else 4 if len(epochs) <= 30 else 0
        for axes, name in ((left, "loss"), (right, metric)):
            for part, prefix, colour in (("training", "", ORANGE), (measured, "val_", BLUE)):
                values = history[f"{prefix}{name}"]
                axes.plot(
                    epochs,
                    values,
                    color=colour,
                    label=part,
                    marker="o",
                    markersize=size,
                    clip_on=False,
                )
            axes.set_xlabel("epoch")
            axes.set_xlim(0.5, len(epochs) + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
            axes.margins(y=0.12)
            axes.grid(axis="y")
            axes.legend()
        left.set_ylabel("loss (cross-entropy)")
        left.set_ylim(bottom=0)
        right.set_ylabel(metric)
        if metric == "accuracy":
            right.set_ylim(top=min(right.get_ylim()[1], 1))
            right.yaxis.set_major_formatter(PercentFormatter(1))
        return figure


def confusion(matrix: np.ndarray, classes: Sequence[str]) -> "Figure":
    """Draws a confusion matrix with its counts. The colour scale covers the mistakes alone: on one
    scale with the diagonal they would all look the same.

    Args:
        matrix: Integers (k, k), true class by row and predicted class by column.
        classes: Names of the k classes.
    """
    with _style():
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import MaxNLocator

        figure = _figure(6.0, 5.0)
        axes = figure.subplots()
        k = len(matrix)
        wrong = np.ma.masked_equal(np.where(np.eye(k, dtype=bool), 0, matrix), 0)
        most = int(wrong.max()) if wrong.count() else 1
        # Not imshow, which temporarily takes six times the memory of the image.
        places = np.arange(k)
        lines = {"edgecolors": "white", "linewidth": 1.5 if k <= NUMBERS else 0.0}
        cells = axes.pcolormesh(places, places, wrong, cmap="Oranges", vmin=0, vmax=most, **lines)
        axes.set(aspect="equal", ylim=(k - 0.5, -0.5))
        for (row, column), count in np.ndenumerate(matrix):
            if row == column:
                axes.add_patch(Rectangle((row - 0.5, row - 0.5), 1, 1, color=PALER, zorder=0.4))
            if k > NUMBERS:
                continue
            dark = row != column and count > 0.6 * most
            axes.text(
                column,
                row,
                f"{count:,}" if count else "·",
                ha="center",
                va="center",
                fontsize=9 if count < 10_000 else 7,
                color="white" if dark else INK if count else GREY,
                fontweight="bold" if row == column else "normal",
            )
        if k <= NAMES:
            long = max(map(len, classes)) > 2
            axes.set_xticks(places, classes, rotation=90 if long else 0)
            axes.set_yticks(places, classes)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(cells, ax=axes, shrink=0.6, aspect=22, label="mistakes")
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(6, integer=True)
        bar.update_ticks()
        return figure


def mistakes(
    images: Pictures,
    labels: np.ndarray,
    probabilities: np.ndarray,
    worst: np.ndarray,
    classes: Sequence[str],
) -> "Figure":
    """Draws the worst mistakes, at most TILES, with predicted class, confidence and true class.

    Args:
        images: n images, of which these alone are read.
        labels: True classes, integers (n,).
        probabilities: Predicted probabilities, (n, k).
        worst: Indices of the mistakes, the most confident first (``Scores.worst``).
        classes: Names of the k classes.
    """
    empty = "No image is misclassified."
    return _grid(images, labels, probabilities, worst[:TILES], classes, empty)


def samples(
    images: Pictures,
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    count: int = TILES,
) -> "Figure":
    """Draws the first images, classified correctly or not, in the form of ``mistakes``."""
    first = np.arange(min(count, len(labels)))
    return _grid(images, labels, probabilities, first, classes, "")


def augmented(images: Sequence[np.ndarray]) -> "Figure":
    """Draws images alone.

    Args:
        images: uint8 (height, width) or (height, width, channels), at most AUGMENTED.
    """
    columns, side = 16, 0.6  # inches, of a cell
    with _style():
        from matplotlib.figure import Figure

        rows = -(-len(images) // columns)
        size = columns * side, rows * side
        figure = Figure(figsize=size)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        for place, image in enumerate(images):
            left, top = place % columns * side, place // columns * side
            _show(axes, image, (left, left + 0.94 * side, top + 0.94 * side, top))
        axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
        return figure


def reliability(found: Scores) -> "Figure":
    """Draws accuracy by confidence, the reliability diagram of Guo et al. (2017),
    https://arxiv.org/abs/1706.04599, above a histogram of the confidence.
    """
    with _style():
        from matplotlib.ticker import NullLocator, PercentFormatter, StrMethodFormatter

        figure = _figure(6.4, 5.0)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        some = found.bin_counts > 0
        middles = (found.bin_edges[:-1] + found.bin_edges[1:])[some] / 2
        width = 0.92 * found.bin_edges[1]
        above.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.2, label="calibrated")
        above.bar(middles, found.bin_accuracy[some], width, color=BLUE, label="accuracy")
        above.hlines(
            found.bin_confidence[some],
            middles - width / 2,
            middles + width / 2,
            color=ORANGE,
            label="mean confidence",
        )
        above.set_ylim(0, 1.02)
        above.set_ylabel("accuracy")
        above.yaxis.set_major_formatter(PercentFormatter(1))
        above.grid(axis="y")
        figure.legend(loc="outside upper center", ncols=3)
        below.bar(middles, found.bin_counts[some], width, color=GREY)
        below.set_yscale("log")
        below.set_ylim(0.7, 3 * found.bin_counts.max())
        below.yaxis.set_minor_locator(NullLocator())
        below.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        below.set_ylabel("images")
        below.grid(axis="y")
        below.set_xlim(0, 1)
        below.set_xlabel("confidence")
        below.xaxis.set_major_formatter(PercentFormatter(1))
        return figure


def png(figure: "Figure") -> bytes:
    """Returns a figure as a PNG file, two pixels per CSS pixel."""
    with _style():
        figure.savefig(content := io.BytesIO(), format="png", metadata={"Software": MARK})
    return content.getvalue()


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Sets the style of these charts, whatever a matplotlibrc sets, and mutes the warning that
    Matplotlib uses a temporary cache folder where HOME is read-only.
    """
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import matplotlib
        import matplotlib.figure

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            yield
    finally:
        logger.setLevel(level)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _grid(
    images: Pictures,
    labels: np.ndarray,
    probabilities: np.ndarray,
    which: np.ndarray,
    classes: Sequence[str],
    empty: str,
) -> "Figure":
    """Draws images with their predictions; without images, the text ``empty``."""
    columns, width, height, side = 8, 1.2, 1.6, 1.08  # inches, of a cell and of the image in it
    with _style():
        from matplotlib.figure import Figure

        rows = -(-len(which) // columns) or 0.4
        figure = Figure(figsize=(columns * width, rows * height))
        # One Axes for all, in inches from the upper left: 24 Axes take seconds to draw.
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, columns * width), ylim=(rows * height, 0))
        axes.set_axis_off()
        if not len(which):
            axes.text(columns * width / 2, rows * height / 2, empty, ha="center", color=GREY)
        for place, (index, image) in enumerate(zip(which, images[which], strict=True)):
            predicted = int(probabilities[index].argmax())
            correct = predicted == labels[index]
            middle = (place % columns + 0.5) * width
            top = place // columns * height + 0.27
            extent = (middle - side / 2, middle + side / 2, top + side, top)
            _show(axes, image, extent)
            left, end, bottom, top = extent
            colour = PALE if correct else RED
            axes.plot([left, end, end, left, left], [top, top, bottom, bottom, top], colour, lw=1)
            axes.text(
                middle,
                top - 0.07,
                f"{_short(classes[predicted])}  {probabilities[index, predicted]:.1%}",
                ha="center",
                color=INK if correct else RED,
                fontweight="bold",
            )
            axes.text(
                middle,
                bottom + 0.06,
                f"#{index}" if correct else f"is {_short(classes[labels[index]])}   #{index}",
                ha="center",
                va="top",
                fontsize=8,
                color=GREY,
            )
        axes.set(xlim=(0, columns * width), ylim=(rows * height, 0))  # imshow has changed them
        return figure


def _show(axes: "Axes", image: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    """Draws an image at a place, left, right, bottom and top; grey ones with dark ink on white, as
    on paper.
    """
    grey = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    axes.imshow(grey, cmap="gray_r", vmin=0, vmax=255, extent=extent)


def _short(name: str) -> str:
    """Returns a class's name as it fits above an image."""
    return name if len(name) <= 12 else f"{name[:11]}…"
