"""Finds digits in pictures: photographs, scans and drawings become what the network was trained on.

    grey = images.open_image(Path("seven.jpg"))        # (h, w), upright
    [seen] = images.find(grey)
    seen.pixels                                        # uint8 (28, 28), 0 is paper and 255 ink

MNIST's makers scaled each digit into 20×20 pixels, its proportions kept, and put its centre of mass
into the middle of 28×28 (LeCun, Cortes, Burges: http://yann.lecun.com/exdb/mnist/); so does this.
It needs no TensorFlow.
"""

import contextlib
import dataclasses
import errno
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage
from skimage import filters, measure, morphology

from trainer.errors import DataError, InputError

if TYPE_CHECKING:
    from skimage.measure._regionprops import RegionProperties

FORMATS = ("PNG", "JPEG", "MPO", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "HEIF")
MAX_PIXELS = 40_000_000  # Reading as many takes up to 0.75 GB.
MAX_BYTES = 64_000_000
MAX_SCANS = 500  # Of a progressive JPEG: each can take as long as the picture; ten are usual.
LONGEST = 640  # Pixels of the longest side that digits are looked for in; a page of them fits.
SHORTEST = 112  # Smaller pictures are enlarged to it: four times MNIST's own.

SIZE, BOX = 28, 20  # The picture of a digit, and what its ink is scaled into.
STROKE = 2.2  # Width of a stroke of MNIST's in its 28×28; thinner ones are made as wide.

FINE = 80  # Pixels of a digit's longest side while its strokes are measured.
MAX_PARTS = 500  # In one picture: a page of digits has fewer.
CONTRAST = 12.0  # Of ink against paper, of 255: less is a blank picture.
NORMAL = 1.4826  # A median absolute deviation times this is a normal standard deviation.

Digits = Literal["one", "many"]

Box = tuple[int, int, int, int]  # top, left, bottom, right, as scikit-image has it


@dataclasses.dataclass(frozen=True)
class Seen:
    """A digit as the network sees it.

    Attributes:
        pixels: uint8 (28, 28), 0 is paper and 255 ink.
        box: Where it was found: left, top, right, bottom, in pixels of the picture that was
            searched.
        several: Whether what was to be one digit looks like several, side by side.
    """

    pixels: np.ndarray
    box: tuple[int, int, int, int]
    several: bool = False


def open_image(source: Path | BinaryIO, name: str | None = None) -> np.ndarray:
    """Reads a picture.

    Args:
        source: A file, or one that is open.
        name: What errors call it; None: its path.

    Returns:
        uint8 (h, w), grey, upright as its EXIF orientation says, its transparent parts filled with
        paper, the longest side at most 640 pixels.

    Raises:
        InputError: The file is missing or cannot be read.
        DataError: It is no image, truncated, damaged, or larger than 40 million pixels.
    """
    name = name or str(source)
    try:
        if isinstance(source, Path) and not (source.is_file() or source.is_dir()):
            source.stat()  # It says of what is missing that it is.
            # A pipe may never give anything.
            raise OSError(
                errno.EINVAL, "a pipe or device, no file. Give it on standard input, as -"
            )
        with (
            contextlib.nullcontext(source) if hasattr(source, "read") else source.open("rb") as file
        ):
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a null character.
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, IsADirectoryError):
            reason = "a folder without images"
        raise InputError(f"Expected an image at {name}. Received: {reason}.") from error
    if len(content) > MAX_BYTES:
        raise DataError(_expected(name, f"more than {MAX_BYTES:,} bytes. Make it smaller"))
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                most = f"{MAX_PIXELS:,} are the most. Make it smaller"
                raise DataError(_expected(name, f"{width}×{height} pixels; {most}"))
            if content.count(b"\xff\xda") > MAX_SCANS and image.format in ("JPEG", "MPO"):
                raise DataError(_expected(name, f"a JPEG of more than {MAX_SCANS} scans"))
            return np.asarray(_upright(_grey(image)))
    except DataError:
        raise
    except UnidentifiedImageError:
        kinds = ", ".join(_formats())
        raise DataError(
            _expected(name, f"a file that is none of {kinds}" if content else "an empty file")
        ) from None
    except Image.DecompressionBombError:
        raise DataError(_expected(name, f"more than {MAX_PIXELS:,} pixels")) from None
    except Exception as error:  # Pillow's decoders raise whatever the damage leads to.
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise DataError(
            _expected(name, f"a truncated or damaged file ({reason}). Fetch or make it again")
        ) from error


def find(grey: np.ndarray, *, digits: Digits = "one", name: str = "the picture") -> list[Seen]:
    """Finds the digits in a picture, dark on light or light on dark.

    Args:
        grey: uint8 (h, w), as ``open_image`` gives it.
        digits: ``one``: all the ink is one digit; ``many``: digits apart from each other, which
            come line by line, left to right.
        name: What errors call the picture.

    Returns:
        At least one.

    Raises:
        DataError: There is no ink, or nothing that could be a digit.
    """
    scale = max(1.0, SHORTEST / max(grey.shape))
    picture = grey.astype(np.float32)
    if scale > 1:
        picture = _resize(picture, tuple(round(side * scale) for side in grey.shape))
    depth, ink = _ink(picture)
    if not ink.any():
        raise DataError(f"Expected a digit in {name}. Received: a blank picture, without ink.")
    labels = measure.label(ink, connectivity=2)
    boxes = _parts(labels)
    if not boxes:
        raise DataError(f"Expected a digit in {name}. Received: a picture of specks alone.")
    if len(boxes) > MAX_PARTS:  # Comparing each with each other takes minutes.
        raise DataError(
            f"Expected a digit in {name}. Received: a picture of {len(boxes):,} shapes; "
            f"{MAX_PARTS} are the most."
        )
    groups, several = _apart(boxes), False
    if digits == "one":
        groups, several = [list(boxes)], len(groups) > 1
    found = []
    for group in groups:
        top, left, bottom, right = _union(boxes[label] for label in group)
        here = np.s_[top:bottom, left:right]
        pixels = _normalise(depth[here], np.isin(labels[here], group))
        box = tuple(round(edge / scale) for edge in (left, top, right, bottom))
        found.append(Seen(pixels, box, several and right - left > bottom - top))
    return found


def _expected(name: str, received: str) -> str:
    return f"Expected an image at {name}. Received: {received}."


def suffixes() -> set[str]:
    """Returns how the names of files end that ``open_image`` may read: ``.png``, …"""
    formats = _formats()
    return {end for end, name in Image.registered_extensions().items() if name in formats}


def _formats() -> list[str]:
    with contextlib.suppress(ImportError):  # HEIC, of iPhones, where its plugin is installed.
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _grey(image: Image.Image) -> Image.Image:
    """Returns a picture as mode L, reduced to the longest side, its transparency filled."""
    image.draft("L", (LONGEST, LONGEST))  # A JPEG is decoded no finer than that.
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _stretched(_reduce(image.convert("F")))
    if "A" in image.getbands() or "transparency" in image.info:
        return _on_paper(_reduce(image.convert("RGBA")))
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return _reduce(image).convert("L")


def _reduce(image: Image.Image) -> Image.Image:
    factor = max(image.size) / LONGEST
    if factor <= 1:
        return image
    size = [max(1, round(side / factor)) for side in image.size]
    return image.resize(size, Image.Resampling.BOX, reducing_gap=1.0)


def _stretched(image: Image.Image) -> Image.Image:
    """Makes 8 bits of more: what is used of them, as cameras and scanners use 12 of 16."""
    values = np.nan_to_num(np.asarray(image)).astype(np.float64)  # Their span may overflow.
    low, high = float(values.min()), float(values.max())
    # A blank sheet must not become a picture of its noise.
    span = max(high - low, abs(high) / 64, 1e-6)
    return Image.fromarray(((values - low) * (255 / span)).astype(np.uint8))


def _on_paper(image: Image.Image) -> Image.Image:
    """Fills what is transparent: with the colour of the rest where that is most of the picture;
    else the rest is the ink, and the paper its opposite.
    """
    light, alpha = (np.asarray(band, np.float32) for band in image.convert("LA").split())
    opaque = alpha > 127
    paper = 255.0
    if opaque.mean() > 0.5:
        paper = float(np.median(light[opaque]))
    elif opaque.any() and light[opaque].mean() > 127:
        paper = 0.0
    return Image.fromarray((paper + (light - paper) * alpha / 255).round().astype(np.uint8))


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # A damaged EXIF block says nothing.
        return ImageOps.exif_transpose(image)
    return image


def _ink(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns how far each pixel is from the paper, float32 (h, w), 0 for paper, and which are
    ink, bool (h, w).
    """
    smooth = ndimage.gaussian_filter(picture, max(picture.shape) / 320, mode="nearest")
    noise = NORMAL * float(np.median(np.abs(picture - smooth)))
    flat = smooth - _light(smooth)
    if np.abs(flat).max() < CONTRAST:
        return flat, np.zeros(flat.shape, bool)
    # Lit evenly or not: whichever leaves ink and paper further apart.
    flat = max((smooth, flat), key=_separability)
    light = flat > _threshold(flat)
    if _is_light_ink(light):
        flat, light = -flat, ~light
    depth = float(np.median(flat[light])) - flat
    if _full(depth[~light]) < max(CONTRAST, 4 * noise):
        return depth, np.zeros_like(light)
    return depth, ~light


def _full(depth: np.ndarray) -> float:
    """Returns the depth of a stroke's middle, from those of all its pixels."""
    return float(np.percentile(depth, 70))


def _light(picture: np.ndarray) -> np.ndarray:
    """Returns the light of the paper under its ink: the quadratic surface through it, fitted anew
    without what lies far from it.
    """
    side = 32
    values = _resize(picture, (side, side)).reshape(-1)
    y, x = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1).reshape(-1, 6)
    near = np.ones(len(values), bool)
    for _ in range(6):
        # Least squares by its normal equations: np.linalg.lstsq starts threads, which on a busy
        # machine wait for each other.
        these = terms[near]
        squares = these.T @ these + 1e-6 * np.eye(6)  # Never singular.
        coefficients = np.linalg.solve(squares, these.T @ values[near])
        surface = terms @ coefficients
        distance = np.abs(values - surface)
        near = distance <= max(2.5 * NORMAL * float(np.median(distance)), 2.0)
    return _resize(surface.reshape(side, side).astype(np.float32), picture.shape)


def _threshold(picture: np.ndarray) -> float:
    return float(filters.threshold_otsu(picture)) if np.ptp(picture) > 1 else float(picture.max())


def _separability(picture: np.ndarray) -> float:
    """Returns the part of the variance that lies between the two classes at the best threshold,
    Otsu's measure of how good that is (https://doi.org/10.1109/TSMC.1979.4310076).
    """
    above = picture > _threshold(picture)
    if not above.any():
        return 0.0
    part = above.mean()
    apart = picture[above].mean() - picture[~above].mean()
    return float(part * (1 - part) * apart**2 / picture.var())


def _is_light_ink(light: np.ndarray) -> bool:
    """Whether the light part is the ink: paper is most of the picture, and where a digit fills
    it, most of its edge.
    """
    part = light.mean()
    if 0.3 < part < 0.7:
        edge = np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]])
        return edge.mean() < 0.5
    return part < 0.5


def _parts(labels: np.ndarray) -> dict[int, Box]:
    """Returns the labelled parts that digits are made of, without specks."""
    regions = measure.regionprops(labels)
    longest = max(map(_side, regions))
    parts = [part for part in regions if _side(part) >= 0.15 * longest and part.area >= 12]
    # A shadow or the table's edge comes in from the border; digits seldom do.
    inner = [part for part in parts if not _touches(part.bbox, labels.shape)]
    if sum(part.area for part in inner) >= 0.2 * sum(part.area for part in parts):
        parts = inner
    return {part.label: part.bbox for part in parts}


def _side(part: "RegionProperties") -> int:
    top, left, bottom, right = part.bbox
    return max(bottom - top, right - left)


def _touches(box: Box, shape: tuple[int, int]) -> bool:
    top, left, bottom, right = box
    return top == 0 or left == 0 or bottom == shape[0] or right == shape[1]


def _apart(boxes: dict[int, Box]) -> list[list[int]]:
    """Groups parts into digits, line by line and left to right.

    >>> _apart({1: (0, 50, 40, 70), 2: (10, 0, 40, 20), 3: (0, 2, 8, 20), 4: (36, 80, 40, 84)})
    [[2, 3], [1]]
    """
    tallest = max(bottom - top for top, _, bottom, _ in boxes.values())
    tall = float(
        np.median([b - t for t, _, b, _ in boxes.values() if b - t > tallest / 2])
    )  # of a digit
    groups: list[tuple[Box, list[int]]] = []
    for label, box in sorted(boxes.items(), key=lambda item: item[1][0] - item[1][2]):
        mine = [group for group in groups if _belong(group[0], box, tall)]
        groups = [group for group in groups if group not in mine]
        members = [label, *(other for _, others in mine for other in others)]
        groups.append((_union([box, *(other for other, _ in mine)]), sorted(members)))
    # Points, commas and dashes are no digits.
    groups = [group for group in groups if group[0][2] - group[0][0] > 0.45 * tall]
    lines: list[list[tuple[Box, list[int]]]] = []
    for group in sorted(groups):
        top, _, bottom, _ = group[0]
        for line in lines:
            above, _, below, _ = _union([box for box, _ in line])
            if above < (top + bottom) / 2 < below:
                line.append(group)
                break
        else:
            lines.append([group])
    return [members for line in lines for _, members in sorted(line, key=lambda g: g[0][1])]


def _belong(one: Box, other: Box, tall: float) -> bool:
    """Whether two parts are one digit's: above each other and near, as the bar of a 5."""
    narrower = min(one[3] - one[1], other[3] - other[1])
    beside = min(one[3], other[3]) - max(one[1], other[1])
    gap = max(one[0], other[0]) - min(one[2], other[2])
    top, _, bottom, _ = _union([one, other])
    return beside > 0.5 * narrower and gap < 0.3 * tall and bottom - top < 1.5 * tall


def _union(boxes: Iterable[Box]) -> Box:
    tops, lefts, bottoms, rights = zip(*boxes, strict=True)
    return min(tops), min(lefts), max(bottoms), max(rights)


def _normalise(depth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Scales a digit into 20×20 and puts its centre of mass into the middle of 28×28.

    Args:
        depth: float32 (h, w), of the digit's box alone, 0 for paper.
        mask: bool (h, w), what of it is the digit.
    """
    ink = np.clip(depth / _full(depth[mask]), 0, 1)
    scale = FINE / max(ink.shape)
    shape = tuple(max(1, round(side * scale)) for side in ink.shape)
    edge = ndimage.binary_dilation(mask, iterations=max(2, round(1 / scale)))  # It is soft.
    digit = _widen(np.clip(_resize(np.where(edge, ink, 0), shape), 0, 1))
    scale = BOX / max(digit.shape)
    shape = tuple(max(1, round(side * scale)) for side in digit.shape)
    small = _resize(digit, shape)
    small = np.clip(small / max(float(np.percentile(small, 99)), 1e-6), 0, 1)
    picture = np.zeros((SIZE, SIZE), np.float32)
    # Where it lies in MNIST: at (14.0, 14.0) in the mean of its test images.
    places = [
        min(max(round(SIZE / 2 - middle), 0), SIZE - side)
        for middle, side in zip(ndimage.center_of_mass(small), shape, strict=True)
    ]
    picture[tuple(slice(at, at + side) for at, side in zip(places, shape, strict=True))] = small
    return (picture * 255).round().astype(np.uint8)


def _widen(digit: np.ndarray) -> np.ndarray:
    """Gives thin strokes the width of MNIST's pens."""
    mask = np.pad(digit > 0.5, 1)
    middle = morphology.skeletonize(mask)
    width = 2 * float(np.median(ndimage.distance_transform_edt(mask)[middle]))
    radius = (STROKE * max(digit.shape) / BOX - width) / 2
    if radius < 0.5:
        return digit
    padded = np.pad(digit, int(np.ceil(radius)))
    distance = ndimage.distance_transform_edt(padded <= 0.5)
    return np.maximum(padded, np.clip(radius + 0.5 - distance, 0, 1)).astype(np.float32)


def _resize(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Makes another size of float32 (h, w), smoothly, as a mean where it is smaller."""
    shrinks = shape[0] * shape[1] < values.size
    filter = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(values).resize(shape[::-1], filter))
