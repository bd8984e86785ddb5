"""The report of a run as one HTML page that needs no other file, and its curves as a picture.

    report = render(manifest, history, images=x_test, labels=y_test, probabilities=probabilities)
    Path("report.html").write_bytes(report.page)

Style and pictures are part of the page (``data:`` URIs). It has no script, and its Content Security
Policy forbids it to load anything.
"""

import base64
import gc
import html
import importlib.resources
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from trainer.reporting import charts, scores
from trainer.reporting.bar import format_duration
from trainer.reporting.scores import Scores, percent


class Report(NamedTuple):
    """The files of a report.

    Attributes:
        page: An HTML document, UTF-8.
        curves: A PNG image of loss and accuracy by epoch.
    """

    page: bytes
    curves: bytes


def render(
    manifest: dict,
    history: Mapping[str, Sequence[float]],
    *,
    images: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    after_picture: Callable[[], None] = lambda: None,
) -> Report:
    """Draws the charts and fills the page's template.

    Args:
        manifest: As ``mnist.json`` has it.
        history: As ``history.json`` has it.
        images: The test images, uint8 (n, 28, 28).
        labels: True digits, integers (n,).
        probabilities: Predicted probabilities, (n, 10).
        after_picture: Called after each chart; it may raise to end the drawing.
    """
    found = scores.score(labels, probabilities)
    drawn = {}
    for name, draw in (
        ("curves", lambda: charts.curves(history)),
        ("confusion", lambda: charts.confusion(found.confusion)),
        ("mistakes", lambda: charts.mistakes(images, labels, probabilities, found.worst)),
        ("samples", lambda: charts.samples(images, labels, probabilities)),
        ("reliability", lambda: charts.reliability(found)),
    ):
        drawn[name] = charts.png(draw())
        gc.collect()  # A figure has reference cycles, and takes as much memory as the model.
        after_picture()
    template = (
        importlib.resources.files("trainer.reporting") / "assets" / "report.html"
    ).read_text("utf-8")
    page = string.Template(template).substitute(
        **{name: _escape(text) for name, text in _sentences(manifest, history, found).items()},
        **{name: _picture(drawn[name], alt) for name, alt in _alts(history, found).items()},
        figures=_figures(manifest, history, found),
        **_tables(manifest, history, found),
    )
    # A file name may be valid in no encoding.
    return Report(page.encode("utf-8", "backslashreplace"), drawn["curves"])


def _sentences(manifest: dict, history: Mapping, found: Scores) -> dict[str, str]:
    accuracy = percent(manifest["metrics"]["val_accuracy"])
    data, config = manifest["data"], manifest["config"]
    epochs = len(history["loss"])
    best = int(np.argmax(history["val_accuracy"]))
    at_most = "" if config["schedule"] == "constant" else " at most"
    return {
        "title": f"{manifest['model']['file']}: {accuracy} test accuracy",
        "subtitle": (
            f"A CNN of {manifest['model']['parameters']:,} parameters, trained on "
            f"{data['train_examples']:,} images ({data['source']}) and measured on "
            f"{data['test_examples']:,} others. Run {manifest['run']}."
        ),
        "training": (
            f"{_many(epochs, 'epoch')} with {config['optimizer']}, learning rate "
            f"{config['learning_rate']:g}{at_most}, batches of {config['batch_size']}, seed "
            f"{config['seed']}. The best test accuracy was {percent(history['val_accuracy'][best])}"
            f", after epoch {best + 1}; the model is that of the last epoch. Dropout is active "
            "in training only, so training metrics can be worse than test metrics."
        ),
        "mistaken": (
            f"Misclassified: {len(found.worst):,} of {found.examples:,}. {_commonest(found)}"
        ),
        "calibration": (
            "Accuracy by confidence, the probability of the predicted digit. Where a bar ends at "
            "its line, the mean confidence, the model is calibrated. The expected calibration "
            f"error, {found.ece:.4f}, is the distance between the two, averaged over the images."
        ),
    }


def _commonest(found: Scores) -> str:
    wrong = found.confusion - np.diag(found.confusion.diagonal())
    pairs = [f"a {true} as a {other}" for true, other in np.argwhere(wrong == wrong.max())]
    if len(pairs) > 3:  # None stands out, or there are no mistakes at all.
        return ""
    each = " each" if len(pairs) > 1 else ""
    return f"Most often {' and '.join(pairs)}, {_times(wrong.max())}{each}."


def _alts(history: Mapping, found: Scores) -> dict[str, str]:
    """Returns the alternative text of each picture."""
    first, last = (percent(history["val_accuracy"][epoch]) for epoch in (0, -1))
    confident = found.bin_counts[-1] / found.examples
    return {
        "curves": (
            f"Loss and accuracy of each epoch. Test accuracy: {first} after the first, {last} "
            f"after the last of {len(history['loss'])}; the table below has all values."
        ),
        "confusion": (
            f"Confusion matrix: {len(found.worst):,} of {found.examples:,} images lie off its "
            f"diagonal. {_commonest(found)}"
        ),
        "mistakes": (
            f"The {min(charts.TILES, len(found.worst))} worst mistakes as images, each with its "
            "predicted digit, the probability of that, and its true digit."
        ),
        "samples": "The first test images, each with its predicted digit and its probability.",
        "reliability": (
            "Reliability diagram: accuracy by confidence. In the bin of the highest confidence, "
            f"with {percent(confident)} of the images, the accuracy is "
            f"{percent(found.bin_accuracy[-1])}."
        ),
    }


def _figures(manifest: dict, history: Mapping, found: Scores) -> str:
    metrics, model = manifest["metrics"], manifest["model"]
    seconds = np.array(history["seconds"])
    epochs = _many(len(seconds), "epoch")
    figures = (
        (
            "Test accuracy",
            percent(metrics["val_accuracy"]),
            f"{len(found.worst):,} of {found.examples:,} wrong",
        ),
        ("Test loss", f"{metrics['val_loss']:.4f}", "cross-entropy"),
        ("Calibration error", f"{found.ece:.4f}", f"expected, {scores.BINS} bins"),
        ("Time", format_duration(float(seconds.sum())), f"{epochs} of {seconds.mean():.1f} s"),
        ("Speed", f"{_speed(manifest, seconds):,.0f}", "training images a second"),
        ("Model", f"{model['bytes'] / 1e6:.1f} MB", f"{model['parameters']:,} parameters"),
    )
    return "\n".join(
        f"<div><dt>{_escape(name)}</dt><dd>{_escape(figure)}</dd><dd>{_escape(text)}</dd></div>"
        for name, figure, text in figures
    )


def _tables(manifest: dict, history: Mapping, found: Scores) -> dict[str, str]:
    columns = ("loss", "accuracy", "val_loss", "val_accuracy", "seconds")
    seconds = np.array(history["seconds"])
    data, model = manifest["data"], manifest["model"]
    return {
        "epochs": _table(
            ("epoch", *columns),
            [
                (
                    epoch + 1,
                    *(f"{history[name][epoch]:.4f}" for name in columns[:-1]),
                    f"{took:.1f}",
                )
                for epoch, took in enumerate(seconds)
            ],
            numbers=True,
        ),
        "digits": _table(
            ("digit", "images", "precision", "recall", "wrong"),
            [
                (
                    digit,
                    f"{count:,}",
                    percent(found.precision[digit]),
                    percent(found.recall[digit]),
                    f"{count - found.confusion[digit, digit]:,}",
                )
                for digit, count in enumerate(found.counts)
            ],
            numbers=True,
        ),
        "configuration": _table(
            ("flag", "value"),
            [
                (f"--{name.replace('_', '-')}", "-" if value is None else value)
                for name, value in manifest["config"].items()
            ],
        ),
        "time": _table(
            ("what", "time"),
            [
                ("an epoch, its evaluation included", f"{seconds.mean():.1f} s"),
                ("the fastest one", f"{seconds.min():.1f} s"),
                ("the slowest one", f"{seconds.max():.1f} s"),
                ("all epochs", format_duration(float(seconds.sum()))),
                ("the command that finished the run", format_duration(manifest["seconds"])),
                ("training images a second", f"{_speed(manifest, seconds):,.0f}"),
            ],
        ),
        "versions": _table(
            ("what", "which"), [*manifest["versions"].items(), *manifest["environment"].items()]
        ),
        "identity": _table(
            ("what", "value"),
            [
                (f"SHA-256 of {model['file']}", model["sha256"]),
                ("SHA-256 of the weights", model["weights_sha256"]),
                ("SHA-256 of the data", data["sha256"]),
                (
                    "training and test images",
                    f"{data['train_examples']:,}, {data['test_examples']:,}",
                ),
                ("run", manifest["run"]),
            ],
            code=True,
        ),
    }


def _speed(manifest: dict, seconds: np.ndarray) -> float:
    """Returns training images per second, given the seconds of each epoch."""
    return manifest["data"]["train_examples"] * len(seconds) / max(seconds.sum(), 1e-9)


def _table(
    head: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    numbers: bool = False,
    code: bool = False,
) -> str:
    """Returns a table; the first cell of each row is its header."""
    lines = ['<table class="numbers">' if numbers else "<table>"]
    cells = "".join(f'<th scope="col">{_escape(cell)}</th>' for cell in head)
    lines.append(f"<thead><tr>{cells}</tr></thead>\n<tbody>")
    for name, *values in rows:
        texts = [f"<code>{_escape(value)}</code>" if code else _escape(value) for value in values]
        cells = "".join(f"<td>{text}</td>" for text in texts)
        lines.append(f'<tr><th scope="row">{_escape(name)}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody>\n</table>"])


def _picture(content: bytes, alt: str) -> str:
    # Bytes 16 to 24 of a PNG file are its size; two pixels are one CSS pixel.
    width, height = (int.from_bytes(content[at : at + 4], "big") // 2 for at in (16, 20))
    data = base64.b64encode(content).decode()
    return (
        f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'alt="{_escape(alt)}">'
    )


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _escape(value: object) -> str:
    return html.escape(str(value))
