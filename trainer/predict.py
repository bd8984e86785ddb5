"""The command: recognizes the digits in pictures, or classifies them as a whole.

    python -m trainer.predict mnist.h5 seven.jpg scans/ "photos/*.heic"
    python -m trainer.predict model.keras cat.jpg

Each line has the file, the digit or class and its probability. For a picture that cannot be read
there is an error instead, and the others are still processed.
"""

import contextlib
import dataclasses
import glob
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from trainer import cli
from trainer.config import local_path
from trainer.errors import OutputError, UsageError
from trainer.files import MARK, is_marked, replace_files
from trainer.machine import available_cpus

if TYPE_CHECKING:  # --help loads none of these.
    import numpy as np

    from trainer.inference.classifier import Answer, Picture, Prediction

PROG = "python -m trainer.predict"

# Below it an answer is "unsure". bench/foreign.py shows a model of 99.25% pictures that are not
# MNIST's: it is unsure of one in 20, and right in 99.5% of the others.
THRESHOLD = 0.9

STDIN = "-"
SHOWN = 448  # Pixels of the original's longest side in what --show writes.


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Recognizes the digits in pictures, or with a model of other images classifies whole pictures:
    prints file, digit or class, probability.

    Raises:
        UsageError: A value is outside its range; the message names field, value and remedy.
    """

    model: Positional[Path]
    """An mnist.h5, as python -m trainer.task writes it; or
    a model.keras with its model.json beside it."""

    images: Positional[tuple[str, ...]]
    """Files, folders, patterns such as "scans/*.png", or -
    for a picture on standard input. PNG, JPEG, BMP, GIF,
    TIFF, WebP, AVIF; HEIC with the package pillow-heif."""

    digits: Literal["one", "many"] = "one"
    """one: a picture shows one digit; many: several, apart
    from each other, read line by line, left to right."""

    network: str | None = None
    """The package.module:function that has made the
    network of a model.keras, which is run to make it
    again. Not for the built-in ones."""

    threshold: float = THRESHOLD
    """Answers of a lower probability are marked unsure."""

    show: Path | None = None
    """Folder for pictures of what the model saw beside the
    original; created where it does not exist."""

    json: bool = False
    """Print a JSON object for each picture."""

    threads: int = dataclasses.field(default_factory=available_cpus)
    """Pictures read at a time, and threads inside one
    TensorFlow operation; as many as this process may use."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", local_path("model", self.model))
        if self.show is not None:
            object.__setattr__(self, "show", local_path("show", self.show))
        for name, default, is_of_digits, kind in (
            ("network", None, False, "a model.keras"),
            ("digits", "one", True, "an mnist.h5"),
            ("show", None, True, "an mnist.h5"),
        ):
            if (value := getattr(self, name)) != default and self.is_of_digits != is_of_digits:
                raise UsageError(
                    f"{name} is for {kind}. Received: {name}={str(value)!r} and {self.model.name}. "
                    "Leave it out."
                )
        if not self.images:
            raise UsageError("Expected at least one image. Received: none. Name a file or folder.")
        if not 0 <= self.threshold <= 1:
            raise UsageError(
                f"threshold must lie between 0 and 1. Received: threshold={self.threshold!r}. "
                f"Use {THRESHOLD}, the default."
            )
        if self.threads < 1:
            raise UsageError(
                f"threads must be a whole number of at least 1. Received: threads={self.threads}. "
                "Leave it out to use every CPU."
            )

    @property
    def is_of_digits(self) -> bool:
        """Whether the model is one of digits, which are searched for in pictures."""
        return self.model.suffix != ".keras"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (``trainer.errors`` lists them)."""
    return cli.run(PROG, PredictConfig, predict, argv)


def predict(config: PredictConfig) -> None:
    """Prints the predictions for pictures.

    Raises:
        TrainerError: Any error that a user can cause or meet. For pictures that cannot be read: an
            error of the first one's class, after all others are done.
    """
    from trainer.inference import classifier

    names = list(_expand(config.images))
    if config.show:
        _make_folder(config.show)
    failures = []
    load, shape, classes = classifier.load_digits(config.model, config.threads), None, None
    if not config.is_of_digits:
        from trainer.training import saved_model

        predictor, spec = saved_model.load_predictor(
            config.model, config.network, threads=config.threads
        )
        load, shape, classes = (lambda: predictor), spec.shape, spec.classes
    with classifier.start(load, processes=min(config.threads, len(names)), shape=shape) as started:
        answers = started.classify(map(_picture, names), digits=config.digits)
        for number, answer in enumerate(answers, start=1):
            if config.json:
                print(json.dumps(_as_dict(config, answer, classes)), flush=True)
            elif not answer.error:
                print(_as_text(config, answer, classes), flush=True)
            if answer.error:
                failures.append(answer.error)
                if len(names) > 1:
                    print(f"{PROG}: error: {answer.error}", file=sys.stderr, flush=True)
            elif config.show and answer.picture is not None:
                # 48 letters are at most the 255 bytes that file systems allow.
                path = config.show / f"{number:04}-{Path(answer.name).stem[:48]}.png"
                _show(path, answer.picture, answer.predictions)
    if failures and len(names) == 1:
        raise failures[0]
    if failures:
        wanted = "digits in" if config.is_of_digits else "an answer for"
        raise type(failures[0])(
            f"Expected {wanted} all of {len(names):,} pictures. Received: {len(failures):,} "
            "without, each named above. Replace them, or leave them out."
        )


def _expand(names: Iterable[str]) -> Iterator[str]:
    """Yields the files of folders and patterns; a name that matches none is yielded as it is, and
    opening it raises the error.
    """
    for name in names:
        found = []
        with contextlib.suppress(OSError, ValueError):  # Opening it will raise the same.
            if Path(name).is_dir():
                from trainer.inference.pictures import suffixes

                paths = Path(name).iterdir()
                found = sorted(str(path) for path in paths if path.suffix.lower() in suffixes())
            elif not Path(name).exists():
                found = sorted(glob.glob(name, recursive=True))  # noqa: PTH207  (may be absolute)
        yield from found or [name]


def _picture(name: str) -> "Picture":
    if name != STDIN:
        return name, Path(name)
    from trainer.inference.pictures import MAX_BYTES

    return "standard input", sys.stdin.buffer.read(MAX_BYTES + 1) if sys.stdin else b""


def _as_dict(config: PredictConfig, answer: "Answer", classes: Sequence[str] | None) -> dict:
    if answer.error:
        return {"file": answer.name, "error": str(answer.error), "code": answer.error.exit_code}
    if classes:
        [prediction] = answer.predictions
        return {
            "file": answer.name,
            "class": classes[prediction.label],
            "probability": prediction.probability,
            "unsure": prediction.probability < config.threshold,
            "probabilities": dict(zip(classes, prediction.probabilities.tolist(), strict=True)),
        }
    digits = [
        {
            "digit": prediction.label,
            "probability": prediction.probability,
            "unsure": prediction.digit.several or prediction.probability < config.threshold,
            "box": prediction.digit.box,
        }
        for prediction in answer.predictions
    ]
    return {"file": answer.name, "digits": digits}


def _as_text(config: PredictConfig, answer: "Answer", classes: Sequence[str] | None) -> str:
    lines = []
    found = _as_dict(config, answer, classes)
    for one in found.get("digits", [found]):
        label = one["digit"] if "digit" in one else one["class"]
        lines.append(f"{answer.name}  {label}  {one['probability']:.1%}")
        if one["unsure"]:
            lines[-1] += "  unsure"
    if answer.predictions[0].digit.several:
        lines[-1] += ", it looks like several digits: --digits many"
    return "\n".join(lines)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def _show(path: Path, picture: "np.ndarray", predictions: "Sequence[Prediction]") -> None:
    """Draws a picture with the digits found in it marked, and beside it each digit as the model
    saw it.
    """
    from PIL import Image, ImageDraw, ImageFont
    from PIL.PngImagePlugin import PngInfo

    height, width = picture.shape
    zoom = SHOWN / max(height, width)
    original = Image.fromarray(picture).convert("RGB")
    original = original.resize((max(1, round(width * zoom)), max(1, round(height * zoom))))
    tile, label = SHOWN // 2, 24
    columns = -(-len(predictions) // 2)
    sheet = Image.new("RGB", (SHOWN + 8 + columns * (tile + 8), SHOWN + 2 * label), "white")
    sheet.paste(original)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for number, prediction in enumerate(predictions):
        digit = prediction.digit
        draw.rectangle([round(edge * zoom) for edge in digit.box], outline="#b03a00", width=2)
        row, column = divmod(number, columns)
        left, top = SHOWN + 8 + column * (tile + 8), row * (tile + label)
        sheet.paste(Image.fromarray(digit.pixels).resize((tile, tile), 0), (left, top))
        text = f"{prediction.label}  {prediction.probability:.1%}"
        draw.text((left, top + tile + 2), text, fill="black", font=font)
    marked = PngInfo()
    marked.add_text("Software", MARK)
    sheet.save(content := io.BytesIO(), format="png", pnginfo=marked)
    try:
        if path.exists() and not is_marked(path):
            raise OutputError(
                f"Expected a picture of an earlier call or nothing at {path}. Received: one of "
                "another program. Use another folder for --show."
            )
        replace_files(path.parent, {path.name: content.getvalue()})
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"Expected to write to {path}. Received: {error.strerror or error}. Make room or "
        "permission there, or leave out --show."
    )


if __name__ == "__main__":
    sys.exit(main())
