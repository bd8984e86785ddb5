"""Finds the digits in a picture, and normalises each as MNIST's digits were.

    [digit] = segmentation.find(picture)
    digit.pixels                                       # uint8 (28, 28), 0 is paper and 255 ink

MNIST's makers scaled each digit into 20×20 pixels, its proportions kept, and put its centre of mass
into the middle of 28×28 (LeCun, Cortes, Burges: http://yann.lecun.com/exdb/mnist/); so does this
module, without TensorFlow.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage import filters, measure, morphology

from trainer.errors import DataError
from trainer.inference.digit import MAX_DIGITS, SIZE, Digit, DigitCount

if TYPE_CHECKING:
    from skimage.measure._regionprops import RegionProperties

SHORTEST = 112  # Pixels of the longest side to which smaller pictures are enlarged: 4 times 28.

BOX = 20  # Pixels of the side of the square that a digit is scaled into.
STROKE = 2.2  # Pixels, the width of MNIST's strokes; thinner ones are dilated to it.

FINE = 80  # Pixels of a digit's longest side while its strokes are measured.
CONTRAST = 12.0  # Least difference between ink and paper, of 255; below, the picture is blank.
NORMAL = 1.4826  # A median absolute deviation times this is a normal standard deviation.

Box = tuple[int, int, int, int]  # top, left, bottom, right, as scikit-image has it


def find(grey: np.ndarray, *, digits: DigitCount = "one", name: str = "the picture") -> list[Digit]:
    """Finds the digits in a picture, dark on light or light on dark.

    Args:
        grey: uint8 (h, w), as ``pictures.open_image`` returns it.
        digits: ``one``: all the ink is one digit; ``many``: separate digits, which are returned
            line by line, from left to right.
        name: The picture's name in errors.

    Returns:
        At least one digit.

    Raises:
        DataError: The picture is blank, or has nothing that could be a digit, or too many shapes.
    """
    scale = max(1.0, SHORTEST / max(grey.shape))
    picture = grey.astype(np.float32)
    if scale > 1:
        picture = _resize(picture, tuple(round(side * scale) for side in grey.shape))
    contrast, ink = _separate(picture)
    if not ink.any():
        raise DataError(f"Expected a digit in {name}. Received: a blank picture, without ink.")
    labels = measure.label(ink, connectivity=2)
    boxes = _components(labels)
    if not boxes:
        raise DataError(f"Expected a digit in {name}. Received: a picture of specks alone.")
    if len(boxes) > MAX_DIGITS:  # Comparing each with each other takes minutes.
        raise DataError(
            f"Expected a digit in {name}. Received: a picture of {len(boxes):,} shapes; "
            f"{MAX_DIGITS} are the most."
        )
    groups, several = _group(boxes), False
    if digits == "one":
        groups, several = [list(boxes)], len(groups) > 1
    found = []
    for group in groups:
        top, left, bottom, right = _union(boxes[label] for label in group)
        here = np.s_[top:bottom, left:right]
        pixels = _normalise(contrast[here], np.isin(labels[here], group))
        box = tuple(round(edge / scale) for edge in (left, top, right, bottom))
        found.append(Digit(pixels, box, several and right - left > bottom - top))
    return found


def _separate(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Separates ink from paper.

    Returns:
        Contrast of each pixel with the paper, float32 (h, w), 0 for paper; the mask of the ink,
        bool (h, w).
    """
    smooth = ndimage.gaussian_filter(picture, max(picture.shape) / 320, mode="nearest")
    noise = NORMAL * float(np.median(np.abs(picture - smooth)))
    flat = smooth - _illumination(smooth)
    if np.abs(flat).max() < CONTRAST:
        return flat, np.zeros(flat.shape, bool)
    # With or without the correction of uneven light: whichever separates ink and paper better.
    flat = max((smooth, flat), key=_separability)
    light = flat > _threshold(flat)
    if _is_light_ink(light):
        flat, light = -flat, ~light
    contrast = float(np.median(flat[light])) - flat
    if _stroke_contrast(contrast[~light]) < max(CONTRAST, 4 * noise):
        return contrast, np.zeros_like(light)
    return contrast, ~light


def _stroke_contrast(contrast: np.ndarray) -> float:
    """Returns the contrast in the middle of a stroke, from that of all its pixels."""
    return float(np.percentile(contrast, 70))


def _illumination(picture: np.ndarray) -> np.ndarray:
    """Estimates the illumination of the paper: a quadratic surface, fitted repeatedly without the
    outliers, which are ink.
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
    """Returns the ratio of the between-class variance to the total variance at the best threshold,
    Otsu's measure of separability (https://doi.org/10.1109/TSMC.1979.4310076).
    """
    above = picture > _threshold(picture)
    if not above.any():
        return 0.0
    part = above.mean()
    apart = picture[above].mean() - picture[~above].mean()
    return float(part * (1 - part) * apart**2 / picture.var())


def _is_light_ink(light: np.ndarray) -> bool:
    """Whether the light part is the ink: paper is most of the picture, or, where a digit fills the
    picture, most of its border.
    """
    part = light.mean()
    if 0.3 < part < 0.7:
        edge = np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]])
        return bool(edge.mean() < 0.5)
    return bool(part < 0.5)


def _components(labels: np.ndarray) -> dict[int, Box]:
    """Returns the bounding boxes of the connected components that are parts of digits, by label:
    without specks, and without shadows that touch the border.
    """
    regions = measure.regionprops(labels)
    longest = max(map(_side, regions))
    parts = [part for part in regions if _side(part) >= 0.15 * longest and part.area >= 12]
    # Shadows and the table's edge touch the border; digits seldom do.
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


def _group(boxes: dict[int, Box]) -> list[list[int]]:
    """Groups connected components into digits, line by line and from left to right.

    >>> _group({1: (0, 50, 40, 70), 2: (10, 0, 40, 20), 3: (0, 2, 8, 20), 4: (36, 80, 40, 84)})
    [[2, 3], [1]]
    """
    tallest = max(bottom - top for top, _, bottom, _ in boxes.values())
    tall = float(
        np.median([b - t for t, _, b, _ in boxes.values() if b - t > tallest / 2])
    )  # of a digit
    groups: list[tuple[Box, list[int]]] = []
    for label, box in sorted(boxes.items(), key=lambda item: item[1][0] - item[1][2]):
        mine = [group for group in groups if _same_digit(group[0], box, tall)]
        groups = [group for group in groups if group not in mine]
        members = [label, *(other for _, others in mine for other in others)]
        groups.append((_union([box, *(other for other, _ in mine)]), sorted(members)))
    # Points, commas and dashes are not digits.
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


def _same_digit(one: Box, other: Box, tall: float) -> bool:
    """Whether two components are of one digit: one above the other and near, as the bar of a 5."""
    narrower = min(one[3] - one[1], other[3] - other[1])
    beside = min(one[3], other[3]) - max(one[1], other[1])
    gap = max(one[0], other[0]) - min(one[2], other[2])
    top, _, bottom, _ = _union([one, other])
    return beside > 0.5 * narrower and gap < 0.3 * tall and bottom - top < 1.5 * tall


def _union(boxes: Iterable[Box]) -> Box:
    tops, lefts, bottoms, rights = zip(*boxes, strict=True)
    return min(tops), min(lefts), max(bottoms), max(rights)


def _normalise(contrast: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Scales a digit into 20×20 and puts its centre of mass into the middle of 28×28.

    Args:
        contrast: Contrast with the paper inside the digit's bounding box, float32 (h, w).
        mask: Which of these pixels are the digit's, bool (h, w).

    Returns:
        uint8 (28, 28), 0 for paper and 255 for ink.
    """
    ink = np.clip(contrast / _stroke_contrast(contrast[mask]), 0, 1)
    scale = FINE / max(ink.shape)
    shape = tuple(max(1, round(side * scale)) for side in ink.shape)
    edge = ndimage.binary_dilation(mask, iterations=max(2, round(1 / scale)))  # Antialiased.
    digit = _dilate(np.clip(_resize(np.where(edge, ink, 0), shape), 0, 1))
    scale = BOX / max(digit.shape)
    shape = tuple(max(1, round(side * scale)) for side in digit.shape)
    small = _resize(digit, shape)
    small = np.clip(small / max(float(np.percentile(small, 99)), 1e-6), 0, 1)
    picture = np.zeros((SIZE, SIZE), np.float32)
    # (14.0, 14.0) is the mean centre of mass of MNIST's test images.
    places = [
        min(max(round(SIZE / 2 - middle), 0), SIZE - side)
        for middle, side in zip(ndimage.center_of_mass(small), shape, strict=True)
    ]
    picture[tuple(slice(at, at + side) for at, side in zip(places, shape, strict=True))] = small
    return (picture * 255).round().astype(np.uint8)


def _dilate(digit: np.ndarray) -> np.ndarray:
    """Dilates thin strokes to the width of MNIST's."""
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
    """Resizes float32 (h, w): by averaging where it becomes smaller, else bicubically."""
    height, width = shape
    shrinks = height * width < values.size
    filter = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(values).resize((width, height), filter))
