"""A progress bar for the current epoch, at the bottom of a terminal, below the lines so far.

    with Bar(sys.stdout) as bar:
        bar.show({"epoch": 1, "epochs": 10, "step": 5, "steps": 469, ...}, {"loss": 2.1})
        bar.say("epoch 1/10  loss 0.2")

It needs neither Keras nor TensorFlow: what it shows may come from another machine.
"""

from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Bar(Progress):
    """The bar, from ``with`` on; at the end the terminal is as it was.

    Args:
        stream: A terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=Console(file=stream, highlight=False),
            transient=True,
        )
        self.epoch = self.add_task("", total=None, epoch="", status="starting")

    def show(self, position: dict, metrics: dict[str, float]) -> None:
        """Shows how far a run is.

        Args:
            position: ``epoch`` of ``epochs`` and ``step`` of ``steps``, both counted from 1,
                ``images_per_second``, and ``seconds_left`` of the whole run.
            metrics: Means over the epoch so far, by name.
        """
        self.update(
            self.epoch,
            # Rich redraws ten times a second, and an epoch may be shorter: draw the full bar now.
            refresh=position["step"] == position["steps"],
            total=position["steps"],
            completed=position["step"],
            epoch=f"{position['epoch']}/{position['epochs']}",
            status=format_progress(position, metrics),
        )

    def set_status(self, text: str) -> None:
        """Replaces the text beside the bar."""
        self.update(self.epoch, status=text)

    def say(self, text: str) -> None:
        """Writes a line above the bar."""
        self.console.print(text, soft_wrap=True, markup=False)


def format_progress(position: dict, metrics: dict[str, float]) -> str:
    """Formats metrics, speed and remaining time; the arguments are those of ``Bar.show``."""
    rate, left = position["images_per_second"], format_duration(position["seconds_left"])
    return f"{format_metrics(metrics)}  {rate:,.0f} images/s  {left} left"


def format_metrics(metrics: dict[str, float]) -> str:
    """Formats metrics: loss first, training before validation.

    >>> format_metrics({"accuracy": 0.5, "loss": 1.25, "val_loss": 1})
    'loss 1.2500  accuracy 0.5000  val_loss 1.0000'
    """
    # Keras sorts them by name.
    order = sorted(
        metrics, key=lambda name: (name.startswith("val_"), not name.endswith("loss"), name)
    )
    return "  ".join(f"{name} {metrics[name]:.4f}" for name in order)


def format_duration(seconds: float) -> str:
    """Formats a duration.

    >>> format_duration(7.6), format_duration(61), format_duration(3725)
    ('8s', '1m 01s', '1h 02m')
    """
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m {seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"
