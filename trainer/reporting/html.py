"""The report of a run as one HTML page that needs no other file, and its curves as a picture.

    report = render(manifest, history, images=x_test, labels=y_test, probabilities=probabilities)
    Path("report.html").write_bytes(report.page)

Style and pictures are part of the page (``data:`` URIs). It has no script, and its Content Security
Policy forbids it to load anything.
"""

import base64
import contextlib
import gc
import html
import importlib.resources
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    images: charts.Pictures,
    labels: np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    augmented: Sequence[np.ndarray] = (),
    after_picture: Callable[[], None] = lambda: None,
) -> Report:
    """Draws the charts and fills the page's template.

    Args:
        manifest: As ``mnist.json`` has it.
        history: As ``history.json`` has it.
        images: The n images that judge the model.
        labels: Their classes, integers (n,).
        probabilities: Predicted probabilities, (n, k).
        classes: Names of the k classes.
        augmented: Training images as the augmentation makes them, for ``charts.augmented``.
        after_picture: Called after each chart; it may raise to end the drawing.
    """
    found = scores.score(labels, probabilities)
    judged = _Judged(manifest, history, classes)
    drawn = {}
    for name, draw in (
        ("curves", lambda: charts.curves(history, measured=judged.measured, metric=judged.metric)),
        ("confusion", lambda: charts.confusion(found.confusion, classes)),
        ("mistakes", lambda: charts.mistakes(images, labels, probabilities, found.worst, classes)),
        ("samples", lambda: charts.samples(images, labels, probabilities, classes)),
        ("reliability", lambda: charts.reliability(found)),
        ("augmented", lambda: charts.augmented(augmented)),
    ):
        if name == "augmented" and not augmented:
            continue
        with _freed():
            drawn[name] = charts.png(draw())
        after_picture()
    template = (
        importlib.resources.files("trainer.reporting") / "assets" / "report.html"
    ).read_text("utf-8")
    sentences = _sentences(manifest, history, found, judged)
    page = string.Template(template).substitute(
        **{name: _escape(text) for name, text in sentences.items()},
        **{name: _picture(drawn[name], alt) for name, alt in _alts(history, found, judged).items()},
        figures=_figures(manifest, history, found, judged),
        augmented=_augmented(drawn.get("augmented"), len(augmented), manifest["config"]),
        **_tables(manifest, history, found, judged),
    )
    # A file name may be valid in no encoding.
    return Report(page.encode("utf-8", "backslashreplace"), drawn["curves"])


@contextlib.contextmanager
def _freed() -> Iterator[None]:
    """Frees what a figure takes: it has reference cycles, and is as large as the model.

    What was there before is not looked at: with TensorFlow that takes a fifth of a second.
    """
    gc.freeze()
    try:
        yield
        gc.collect()
    finally:
        gc.unfreeze()


class _Judged:
    """What the page speaks of, in words.

    Attributes:
        part: What the predictions are of: ``test`` or ``validation``.
        measured: What was measured after each epoch: the same, or ``validation``.
        metric: What is drawn beside the loss: ``accuracy``, or another one of the history.
        noun: ``digit`` or ``class``.
        classes: Names of the classes.
    """

    def __init__(self, manifest: dict, history: Mapping, classes: Sequence[str]) -> None:
        data = manifest["data"]
        self.measured = "validation" if data.get("validation_examples") else "test"
        self.part = "test" if data["test_examples"] else "validation"
        names = [name for name in history if f"val_{name}" in history]
        self.metric = "accuracy" if "accuracy" in names else names[-1]
        self.noun = "digit" if list(classes) == list("0123456789") else "class"
        self.classes = classes

    def shown(self, value: float) -> str:
        """Formats a value of the metric."""
        return percent(value) if self.metric == "accuracy" else f"{value:.4f}"


def _sentences(manifest: dict, history: Mapping, found: Scores, judged: _Judged) -> dict[str, str]:
    data, config = manifest["data"], manifest["config"]
    epochs = len(history["loss"])
    measured = history[f"val_{judged.metric}"]
    best = int(np.argmin(measured) if judged.metric == "loss" else np.argmax(measured))
    kept = f"epoch {manifest['best_epoch']}" if "best_epoch" in manifest else "the last epoch"
    at_most = "" if config["schedule"] == "constant" else " at most"
    network = "CNN" if config.get("model", "cnn") == "cnn" else f"network ({config['model']})"
    examples = data[f"{judged.part}_examples"]
    held = data.get("validation_examples", 0) if judged.part == "test" else 0
    validated = f", with {held:,} for validation," if held else ""
    return {
        "title": f"{manifest['model']['file']}: {percent(found.accuracy)} {judged.part} accuracy",
        "subtitle": (
            f"A {network} of {manifest['model']['parameters']:,} parameters, trained on "
            f"{data['train_examples']:,} images ({data['source']}){validated} and measured on "
            f"{examples:,} others. Run {manifest['run']}."
        ),
        "training": (
            f"{_many(epochs, 'epoch')} with {config['optimizer']}, learning rate "
            f"{config['learning_rate']:g}{at_most}, batches of {config['batch_size']}, seed "
            f"{config['seed']}. The best {judged.measured} {judged.metric} was "
            f"{judged.shown(measured[best])}, after epoch {best + 1}; the model is that of {kept}. "
            "Dropout is active in training only, so training metrics can be worse than "
            f"{judged.measured} metrics."
        ),
        "mistaken": (
            f"Misclassified: {len(found.worst):,} of {found.examples:,}. "
            f"{_commonest(found, judged)}"
        ),
        "calibration": (
            f"Accuracy by confidence, the probability of the predicted {judged.noun}. Where a bar "
            "ends at its line, the mean confidence, the model is calibrated. The expected "
            f"calibration error, {found.ece:.4f}, is the distance between the two, averaged over "
            "the images."
        ),
        "noun": judged.noun,
        "part": judged.part,
    }


def _commonest(found: Scores, judged: _Judged) -> str:
    wrong = found.confusion - np.diag(found.confusion.diagonal())
    names = judged.classes
    pairs = [
        f"a {names[true]} as a {names[other]}"
        if judged.noun == "digit"
        else f"{names[true]} as {names[other]}"
        for true, other in np.argwhere(wrong == wrong.max())[:4]
    ]
    if len(pairs) > 3:  # None stands out, or there are no mistakes at all.
        return ""
    each = " each" if len(pairs) > 1 else ""
    return f"Most often {' and '.join(pairs)}, {_times(wrong.max())}{each}."


def _alts(history: Mapping, found: Scores, judged: _Judged) -> dict[str, str]:
    """Returns the alternative text of each picture."""
    first, last = (judged.shown(history[f"val_{judged.metric}"][epoch]) for epoch in (0, -1))
    confident = found.bin_counts[-1] / found.examples
    return {
        "curves": (
            f"Loss and {judged.metric} of each epoch. {judged.measured.capitalize()} "
            f"{judged.metric}: {first} after the first, {last} after the last of "
            f"{len(history['loss'])}; the table below has all values."
        ),
        "confusion": (
            f"Confusion matrix: {len(found.worst):,} of {found.examples:,} images lie off its "
            f"diagonal. {_commonest(found, judged)}"
        ),
        "mistakes": (
            f"The {min(charts.TILES, len(found.worst))} worst mistakes as images, each with its "
            f"predicted {judged.noun}, the probability of that, and its true {judged.noun}."
        ),
        "samples": (
            f"The first {judged.part} images, each with its predicted {judged.noun} and its "
            "probability."
        ),
        "reliability": (
            "Reliability diagram: accuracy by confidence. In the bin of the highest confidence, "
            f"with {percent(confident)} of the images, the accuracy is "
            f"{percent(found.bin_accuracy[-1])}."
        ),
    }


def _augmented(content: bytes | None, count: int, config: Mapping) -> str:
    """Returns the section about the augmentation; nothing where there is none."""
    if content is None:
        return ""
    alt = f"{count} training images, each changed at random."
    return (
        "<h2>Augmented training images</h2>\n"
        f"<p>The first {count} as the first epoch was trained on them "
        f"(<code>--augment {_escape(config['augment'])}</code>); in each epoch they change anew."
        f'</p>\n<div class="wide">\n{_picture(content, alt)}\n</div>\n'
    )


def _figures(manifest: dict, history: Mapping, found: Scores, judged: _Judged) -> str:
    metrics, model = manifest["metrics"], manifest["model"]
    seconds = np.array(history["seconds"])
    epochs = _many(len(seconds), "epoch")
    part = judged.part.capitalize()
    loss = metrics.get("test_loss", metrics["val_loss"])
    figures = (
        (
            f"{part} accuracy",
            percent(found.accuracy),
            f"{len(found.worst):,} of {found.examples:,} wrong",
        ),
        (f"{part} loss", f"{loss:.4f}", "cross-entropy"),
        ("Calibration error", f"{found.ece:.4f}", f"expected, {scores.BINS} bins"),
        ("Time", format_duration(float(seconds.sum())), f"{epochs} of {seconds.mean():.1f} s"),
        ("Speed", f"{_speed(manifest, seconds):,.0f}", "training images a second"),
        ("Model", f"{model['bytes'] / 1e6:.1f} MB", f"{model['parameters']:,} parameters"),
    )
    return "\n".join(
        f"<div><dt>{_escape(name)}</dt><dd>{_escape(figure)}</dd><dd>{_escape(text)}</dd></div>"
        for name, figure, text in figures
    )


def _tables(manifest: dict, history: Mapping, found: Scores, judged: _Judged) -> dict[str, str]:
    names = [name for name in history if name != "seconds" and not name.startswith("val_")]
    columns = [*names, *(f"val_{name}" for name in names if f"val_{name}" in history)]
    seconds = np.array(history["seconds"])
    data, model = manifest["data"], manifest["model"]
    parts = [part for part in ("train", "validation", "test") if data.get(f"{part}_examples")]
    called = [{"train": "training"}.get(part, part) for part in parts]
    return {
        "epochs": _table(
            ("epoch", *columns, "seconds"),
            [
                (
                    epoch + 1,
                    *(_value(history[name][epoch]) for name in columns),
                    f"{took:.1f}",
                )
                for epoch, took in enumerate(seconds)
            ],
            numbers=True,
        ),
        "digits": _table(
            (judged.noun, "images", "precision", "recall", "wrong"),
            [
                (
                    judged.classes[number],
                    f"{count:,}",
                    percent(found.precision[number]),
                    percent(found.recall[number]),
                    f"{count - found.confusion[number, number]:,}",
                )
                for number, count in enumerate(found.counts)
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
                    f"{' and '.join(called)} images",
                    ", ".join(f"{data[f'{part}_examples']:,}" for part in parts),
                ),
                ("run", manifest["run"]),
            ],
            code=True,
        ),
    }


def _value(value: object) -> str:
    """Formats a metric: a number, or what a metric of several numbers has."""
    return f"{value:.4f}" if isinstance(value, (int, float)) else str(value)


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
