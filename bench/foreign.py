"""Accuracy on digits that are not MNIST's, with and without the segmentation.

    python bench/foreign.py mnist.h5

Pictures are made anew from a seed: scikit-learn's ``load_digits`` (handwriting of 8×8 pixels),
fonts, and pens: strokes as a hand would lead them, drawn by several kinds of pen; then the same
turned, on paper lit unevenly, and as a photograph. "Without" scales each picture to 28×28, ink made
light, as a program does that knows nothing of how MNIST was made. The second table is over all but
MNIST's own: what ``trainer.predict.THRESHOLD`` was chosen by.
"""

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from trainer import predict
from trainer.data import sources
from trainer.errors import DataError
from trainer.inference import model_file, segmentation

SIDE = 240  # Pixels of a picture that is drawn here.

# Where each digit's strokes pass, as one writes them: x and y in hundredths of its size.
STROKES = {
    0: ("52,2 18,20 10,55 28,95 60,97 88,62 80,20 50,2",),
    1: ("35,20 55,2 54,50 52,98",),
    2: (
        "15,25 35,4 68,6 78,32 50,65 12,96",
        "12,96 50,93 90,95",
    ),
    3: (
        "18,10 55,2 80,22 60,44 40,48",
        "40,48 72,52 86,75 60,97 15,90",
    ),
    4: (
        "35,2 22,35 10,62 50,63 92,60",
        "68,30 66,65 64,98",
    ),
    5: (
        "25,5 22,28 20,46 55,40 82,60 70,92 35,98 12,88",
        "25,5 55,5 85,3",
    ),
    6: ("70,2 35,25 15,62 28,94 62,97 82,74 60,54 30,60 18,75",),
    7: (
        "10,8 50,7 88,5",
        "88,5 62,45 42,98",
    ),
    8: ("78,14 50,2 22,16 40,42 72,62 80,85 50,98 20,84 32,60 68,38 80,16",),
    9: (
        "80,20 52,3 22,18 25,45 58,48 80,22",
        "80,20 78,60 66,98",
    ),
}


def pens(random: np.random.Generator, each: int) -> Iterator[tuple[np.ndarray, int]]:
    """Strokes with random variation, by ballpoint, pencil, felt-tip and brush."""
    for digit in range(10):
        for number in range(each):
            pen = ("ballpoint", "pencil", "felt-tip", "brush")[number % 4]
            yield draw(digit, pen, random), digit


def draw(digit: int, pen: str, random: np.random.Generator) -> np.ndarray:
    """Draws a digit with a pen; returns uint8 (SIDE, SIDE), 255 is paper."""
    zoom = 3
    size = random.uniform(0.45, 0.7) * SIDE * zoom
    wide = random.uniform(0.55, 0.85)
    slant = random.uniform(-0.15, 0.3)
    corner = np.array([random.uniform(0.15, 0.25), random.uniform(0.12, 0.2)]) * SIDE * zoom
    width = {"ballpoint": 0.035, "pencil": 0.05, "felt-tip": 0.11, "brush": 0.14}[pen] * size
    picture = Image.new("L", (SIDE * zoom, SIDE * zoom), 255)
    canvas = ImageDraw.Draw(picture)
    tone = {"ballpoint": 40, "pencil": 110, "felt-tip": 15, "brush": 5}[pen]
    for stroke in STROKES[digit]:
        points = np.array([place.split(",") for place in stroke.split()], float) / 100
        points += random.normal(0, 0.025, points.shape)
        points = points * (wide, 1) + np.stack([(0.5 - points[:, 1]) * slant, 0 * points[:, 1]], 1)
        line = _curve(points * size + corner)
        pressure = 1 + 0.35 * np.sin(np.linspace(0, np.pi, len(line))) * (pen == "brush")
        for (x, y), force in zip(line, pressure, strict=True):
            r = width * force / 2
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=tone)
    grey = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    if pen == "pencil":  # Graphite leaves the paper's grain.
        grey = 255 - (255 - grey) * random.uniform(0.55, 1, grey.shape)
    return grey.astype(np.uint8)


def _curve(points: np.ndarray) -> np.ndarray:
    """A smooth line through the points (Catmull and Rom, 1974), (n, 2)."""
    before, after = 2 * points[0] - points[1], 2 * points[-1] - points[-2]
    p = np.concatenate([before[None], points, after[None]])
    t = np.linspace(0, 1, 40, endpoint=False)[:, None]
    parts = [
        0.5
        * (
            2 * b
            + (c - a) * t
            + (2 * a - 5 * b + 4 * c - d) * t**2
            + (3 * b - a - 3 * c + d) * t**3
        )
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False)
    ]
    return np.concatenate([*parts, points[-1:]])


FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralItalic",
    "STIXGeneralBol", "cmr10", "cmss10", "cmtt10",
)  # fmt: skip


def fonts(random: np.random.Generator, each: int) -> Iterator[tuple[np.ndarray, int]]:
    """Printed digits, in the fonts that come with matplotlib."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for name in FONTS:
        for digit in range(10):
            for _ in range(each):
                size = int(random.uniform(70, 170))
                font = ImageFont.truetype(str(folder / f"{name}.ttf"), size)
                picture = Image.new("L", (SIDE, SIDE), 255)
                place = SIDE / 2 + random.normal(0, 8, 2)
                ImageDraw.Draw(picture).text(
                    tuple(place), str(digit), fill=0, font=font, anchor="mm"
                )
                yield np.asarray(picture), digit


def optdigits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the test part of UCI's Optical Recognition of Handwritten Digits, which
    scikit-learn's ``load_digits`` is: (1797, 8, 8), 0 to 16, light on dark; and their digits.
    """
    rows = np.loadtxt(Path(__file__).parent / "assets" / "optdigits.csv.gz", delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)


def scans(random: np.random.Generator, each: int) -> Iterator[tuple[np.ndarray, int]]:
    """The 1,797 handwritten digits of ``optdigits``, light on dark."""
    for picture, digit in zip(*optdigits(), strict=True):
        grey = Image.fromarray((picture * (255 / 16)).astype(np.uint8))
        yield np.asarray(grey.resize((96, 96), Image.Resampling.BICUBIC)), int(digit)


def turned(grey: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Rotated by up to 15 degrees."""
    picture = Image.fromarray(grey)
    angle = random.uniform(-15, 15)
    return np.asarray(picture.rotate(angle, Image.Resampling.BICUBIC, fillcolor=255))


def shaded(grey: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """On paper that is lit from one side: from 60 to 100% of its light."""
    y, x = np.mgrid[0 : grey.shape[0], 0 : grey.shape[1]] / max(grey.shape)
    angle = random.uniform(0, 2 * np.pi)
    along = x * np.cos(angle) + y * np.sin(angle)
    along = (along - along.min()) / np.ptp(along)
    return (grey * (0.6 + 0.4 * along) * random.uniform(0.75, 1)).astype(np.uint8)


def photographed(grey: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Turned, lit unevenly, a little out of focus, with a sensor's noise, as a JPEG."""
    grey = shaded(turned(grey, random), random)
    blurred = Image.fromarray(grey).filter(ImageFilter.GaussianBlur(random.uniform(0.5, 2)))
    noisy = np.asarray(blurred, np.float32) + random.normal(0, random.uniform(4, 14), grey.shape)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
        packed := io.BytesIO(), "JPEG", quality=int(random.uniform(40, 90))
    )
    return np.asarray(Image.open(packed))


def inverted(grey: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Chalk on a board."""
    return 255 - grey


def own(random: np.random.Generator, each: int) -> Iterator[tuple[np.ndarray, int]]:
    """MNIST's first test images, which the preprocessing is to leave as they are."""
    digits = sources.load("bundled")
    yield from zip(digits.x_test[:each], map(int, digits.y_test[:each]), strict=True)


GROUPS = {
    "MNIST's own": (own, None),
    "load_digits, enlarged": (scans, None),
    "fonts": (fonts, None),
    "fonts, turned": (fonts, turned),
    "fonts, uneven light": (fonts, shaded),
    "fonts, photographed": (fonts, photographed),
    "fonts, light on dark": (fonts, inverted),
    "pens": (pens, None),
    "pens, turned": (pens, turned),
    "pens, uneven light": (pens, shaded),
    "pens, photographed": (pens, photographed),
    "pens, light on dark": (pens, inverted),
}
EACH = {own: 2000, scans: 1, fonts: 4, pens: 56}  # Of one kind; of load_digits all there are.
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def group(name: str, seed: int = 0, each: int | None = None) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the pictures of a group, uint8 (h, w) each, and their digits."""
    source, change = GROUPS[name]
    random = np.random.default_rng(seed)
    pictures, digits = zip(*source(random, each or EACH[source]), strict=True)
    if change:
        pictures = [change(picture, random) for picture in pictures]
    return list(pictures), np.array(digits)


def plain(grey: np.ndarray) -> np.ndarray:
    """Scales a picture to 28×28, ink made light: all the preprocessing that many programs have."""
    small = np.asarray(Image.fromarray(grey).resize((28, 28), Image.Resampling.BOX))
    return small if np.median(small) < 128 else 255 - small


def cut_out(grey: np.ndarray) -> np.ndarray:
    """Segments a picture as the commands do; a blank image where no digit is found."""
    try:
        return segmentation.find(grey)[0].pixels
    except DataError:
        return np.zeros((28, 28), np.uint8)


def main() -> None:
    """Prints the tables of docs/using.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from trainer.models import cnn  # Here: it starts TensorFlow, which drawing does without.

    model = model_file.load(args.model)
    groups = {name: group(name, args.seed) for name in GROUPS}
    said = []
    for see in (plain, cut_out):
        seen = np.stack([see(grey) for pictures, _ in groups.values() for grey in pictures])
        said.append(cnn.probabilities(model, seen, batch_size=len(seen) // 20 + 1))
    sure, right = [], []
    print("| pictures | number | without | with | called unsure | right of the others |")
    print("|---|---|---|---|---|---|")
    for name, (_, digits) in groups.items():
        (before, after), said = zip(
            *((p[: len(digits)], p[len(digits) :]) for p in said), strict=True
        )
        hits, confident = after.argmax(axis=1) == digits, after.max(axis=1)
        kept = confident >= predict.THRESHOLD
        shares = (
            (before.argmax(axis=1) == digits).mean(),
            hits.mean(),
            1 - kept.mean(),
            hits[kept].mean(),
        )
        print(f"| {name} | {len(digits):,} | {' | '.join(f'{share:.1%}' for share in shares)} |")
        if name != "MNIST's own":
            sure.append(confident)
            right.append(hits)
    sure, right = np.concatenate(sure), np.concatenate(right)
    print()
    print("| threshold | called unsure | right of the others | right of the unsure |")
    print("|---|---|---|---|")
    for threshold in THRESHOLDS:
        kept = sure >= threshold
        shares = (1 - kept.mean(), right[kept].mean(), right[~kept].mean())
        print(f"| {threshold} | {' | '.join(f'{share:.2%}' for share in shares)} |")


if __name__ == "__main__":
    main()
