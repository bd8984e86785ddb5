"""A bar that fills with each epoch, on a terminal, under the lines that are said meanwhile.

    with Bar(sys.stdout) as bar:
        bar.show({"epoch": 1, "epochs": 10, "step": 5, "steps": 469, ...}, {"loss": 2.1})
        bar.say("epoch 1/10  loss 0.2")

It knows neither Keras nor TensorFlow: what it shows may come from another machine.
"""

from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Bar(Progress):
    """The bar; it begins with ``with`` and leaves the terminal as it was.

    Args:
        stream: A terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            console=Console(file=stream, highlight=False),
            transient=True,
        )
        self.run = self.add_task("", total=None, epoch="", facts="starting")

    def show(self, place: dict, logs: dict[str, float]) -> None:
        """Shows where a run is.

        Args:
            place: epoch, epochs, step, steps (from 1), images_per_second, seconds_left.
            logs: Means over the epoch so far, by name.
        """
        self.update(
            self.run,
            # It is drawn ten times a second, which an epoch may not last: a full bar is seen.
            refresh=place["step"] == place["steps"],
            total=place["steps"],
            completed=place["step"],
            epoch=f"{place['epoch']}/{place['epochs']}",
            facts=f"{means(logs)}  {place['images_per_second']:,.0f} images/s  "
            f"{span(place['seconds_left'])} left",
        )

    def note(self, facts: str) -> None:
        """Says beside the bar what is going on."""
        self.update(self.run, facts=facts)

    def say(self, text: str) -> None:
        """Writes a line that stays."""
        self.console.print(text, soft_wrap=True, markup=False)


def means(logs: dict[str, float]) -> str:
    """Writes means as people read them: the loss first, those of training before the others.

    >>> means({"accuracy": 0.5, "loss": 1.25, "val_loss": 1})
    'loss 1.2500  accuracy 0.5000  val_loss 1.0000'
    """
    # Keras hands them over sorted by name.
    order = sorted(
        logs, key=lambda name: (name.startswith("val_"), not name.endswith("loss"), name)
    )
    return "  ".join(f"{name} {logs[name]:.4f}" for name in order)


def span(seconds: float) -> str:
    """Writes a time as people do.

    >>> span(7.6), span(61), span(3725)
    ('8s', '1m 01s', '1h 02m')
    """
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m {seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"
