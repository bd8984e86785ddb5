"""Augmentation: training images that are a little different each time they are trained on.

    augmentation = Augmentation.of("rotate=10 flip")
    drawn = augmentation.draw(numbers, seed=0, epoch=3)     # a row for each image
    images = augmentation(images, drawn)

What becomes of an image depends on the seed, the epoch and the image's number alone: neither
resuming a run, nor the batch size or the number of replicas changes it. What is drawn for one kind
of change does not depend on which others there are.
"""

import functools
import math

import numpy as np

from trainer.parameters import AFFINE, parse_augmentation
from trainer.runtime import tf

_CELLS = 3  # of the grid that an elastic deformation bends, along each axis
_POINTS = _CELLS + 3  # of a cubic B-spline over so many cells

# What is drawn: its number in the seed, and how many numbers an image has of it.
_MOVES = 1, 6  # rotation, shear, zoom along x and y, shift along x and y
_BENDS = 2, 2 * _POINTS**2  # shifts of the grid's points along x, then along y
_REST = 3, 6  # flips along x and y, brightness, contrast, saturation, hue

# Where the images that are needed are closer together than that, all are drawn: to find the place
# of one takes as long as to draw 34 times six numbers.
_SPARSE = 16


class Augmentation:
    """Random changes of images.

    Called with images and their rows of what ``draw`` returns, it returns the changed images: of
    the same shape and dtype, rounded. Images are (n, height, width) or (n, height, width,
    channels), from 0 to 255, with a static height, width and channels. All channels are moved
    alike, with bilinear interpolation; what comes from outside is 0.

    Args:
        amounts: The largest amount of each change by its name, as ``parse_augmentation`` returns
            them. Amounts are uniformly distributed in both directions; those of flips are
            probabilities.

    Attributes:
        amounts: Those.
    """

    def __init__(self, amounts: dict[str, float]) -> None:
        self.amounts = amounts
        self.moves = any(name in amounts for name in AFFINE)
        self.bends = "elastic" in amounts
        colours = "brightness", "contrast", "saturation", "hue"
        self.recolours = any(name in amounts for name in colours)
        flips = "flip" in amounts or "vertical_flip" in amounts
        used = self.moves, self.bends, flips or self.recolours
        self._drawn = [kind for kind, has in zip((_MOVES, _BENDS, _REST), used, strict=True) if has]

    @classmethod
    def of(cls, text: str) -> "Augmentation | None":
        """Returns what a configuration asks for; None for ``none``."""
        amounts = parse_augmentation(text)
        return cls(amounts) if amounts else None

    @property
    def numbers(self) -> int:
        """How many numbers are drawn for an image."""
        return sum(count for _, count in self._drawn)

    def draw(self, numbers: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """Draws what images become.

        The bits are those of Philox, which NumPy keeps from version to version; see
        ``order.epoch_order``. Of a sequence in which every image has its place, those of the images
        are computed, and of no others where these are far apart.

        Args:
            numbers: Numbers of the images in the data set, integers (n,).
            seed: Seed of the run.
            epoch: Number of the epoch, counted from 0.

        Returns:
            float32 (n, self.numbers), uniformly distributed from -1 to 1, excluding 1.
        """
        if not len(numbers):
            return np.empty((0, self.numbers), np.float32)
        parts = [_draw(numbers, count, (seed, epoch, key)) for key, count in self._drawn]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def __call__(self, images: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
        """Changes images; see the class."""
        images = tf.convert_to_tensor(images)
        parts = dict(
            zip(self._drawn, tf.split(drawn, [n for _, n in self._drawn], axis=1), strict=True)
        )
        if _REST in parts:
            images = self._flip(images, parts[_REST])
        changed = images
        if self.moves or self.bends:
            places = self._places(images.shape[1:3], parts)
            changed = _interpolate(images, *places)
        if self.recolours:
            changed = self._recolour(tf.cast(changed, tf.float32), images, parts[_REST])
        return changed if changed is images else tf.cast(tf.round(changed), images.dtype)

    def _flip(self, images: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
        for column, (name, axis) in enumerate((("flip", 2), ("vertical_flip", 1))):
            if name in self.amounts:
                flipped = (drawn[:, column] + 1) / 2 < self.amounts[name]
                flipped = tf.reshape(flipped, [-1] + [1] * (images.shape.rank - 1))
                images = tf.where(flipped, tf.reverse(images, [axis]), images)
        return images

    def _places(
        self, size: tf.TensorShape, parts: dict[tuple[int, int], tf.Tensor]
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns where in the image each pixel of the result comes from, x and y: each float32
        (n, height, width).
        """
        height, width = size
        middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
        x = tf.range(width, dtype=tf.float32)[tf.newaxis, tf.newaxis, :] - middle_x
        y = tf.range(height, dtype=tf.float32)[tf.newaxis, :, tf.newaxis] - middle_y
        if self.moves:
            rotate, shear, zoom, translate = (self.amounts.get(name, 0.0) for name in AFFINE)
            shifts = translate * width, translate * height
            limits = [math.radians(rotate), math.radians(shear), zoom, zoom, *shifts]
            angle, lean, zoom_x, zoom_y, shift_x, shift_y = tf.unstack(
                (parts[_MOVES] * limits)[:, :, tf.newaxis, tf.newaxis], axis=1
            )
            cos, sin, slant = tf.cos(angle), tf.sin(angle), tf.tan(lean)
            # The inverse map, from a pixel of the result to its source, relative to the centre:
            # rotation, shear along x, scale.
            a, b = (cos - slant * sin) / (1 + zoom_x), (-sin - slant * cos) / (1 + zoom_x)
            c, d = sin / (1 + zoom_y), cos / (1 + zoom_y)
            x, y = (
                a * x + b * y + (middle_x + shift_x),
                c * x + d * y + (middle_y + shift_y),
            )
        else:
            x, y = x + middle_x, y + middle_y
        if self.bends:
            bent_x, bent_y = _bend(parts[_BENDS], height, width)
            limit = self.amounts["elastic"]
            x, y = x + bent_x * (limit * width), y + bent_y * (limit * height)
        return x, y

    def _recolour(self, images: tf.Tensor, before: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
        """Changes brightness, contrast, saturation and hue, in that order.

        Args:
            images: float32.
            before: The same ones as they were, for their mean.
            drawn: Their rows of ``_REST``.
        """

        def amount(name: str, column: int) -> tf.Tensor:
            some = drawn[:, column] * self.amounts.get(name, 0.0)
            return tf.reshape(some, [-1] + [1] * (images.shape.rank - 1))

        images = images + 255 * amount("brightness", 2)
        if "contrast" in self.amounts:
            # Of whole numbers: their sum has the same bits on any device.
            axes = list(range(1, before.shape.rank))
            total = tf.reduce_sum(tf.cast(before, tf.int32), axes, keepdims=True)
            mean = tf.cast(total, tf.float32) / math.prod(before.shape[1:])
            images = (images - mean) * (1 + amount("contrast", 3)) + mean
        images = tf.clip_by_value(images, 0, 255)
        if "saturation" in self.amounts or "hue" in self.amounts:
            hue, saturation, value = tf.split(tf.image.rgb_to_hsv(images / 255), 3, axis=-1)
            saturation = tf.clip_by_value(saturation * (1 + amount("saturation", 4)), 0, 1)
            hue = tf.math.floormod(hue + amount("hue", 5), 1.0)
            images = tf.image.hsv_to_rgb(tf.concat([hue, saturation, value], -1)) * 255
        return images


def _draw(numbers: np.ndarray, count: int, key: tuple[int, ...]) -> np.ndarray:
    """Returns the rows of a sequence of random numbers, float32 (len(numbers), count)."""
    generator = np.random.Philox(np.random.SeedSequence(key))
    length = int(numbers.max()) + 1
    if length <= _SPARSE * len(numbers):
        bits = generator.random_raw(length * count).reshape(length, count)
        # Not a copy where all are asked for.
        in_order = length == len(numbers) and (numbers == np.arange(length)).all()
        bits = bits if in_order else bits[numbers]
    else:
        bits = np.empty((len(numbers), count), np.uint64)
        state = generator.state
        for row, number in enumerate(numbers.tolist()):
            # Philox makes four numbers at a time, of a counter that it increments before.
            counter, skipped = divmod(number * count, 4)
            state["state"]["counter"][0] = counter
            generator.state = state
            bits[row] = generator.random_raw(skipped + count)[skipped:]
    # The upper 24 bits are what float32 represents exactly.
    units = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-23)
    return units - np.float32(1)


@functools.cache
def _spline(size: int) -> np.ndarray:
    """Returns what each point of the grid contributes to each pixel, float32 (size, points): the
    cubic B-splines of a free-form deformation (Rueckert et al., 1999,
    https://doi.org/10.1109/42.796284).
    """
    from scipy.interpolate import BSpline

    places = (np.arange(size) + 0.5) / size * _CELLS
    knots = np.arange(-3, _CELLS + 4, dtype=np.float64)
    return BSpline.design_matrix(places, knots, 3).toarray().astype(np.float32)


def _bend(drawn: tf.Tensor, height: int, width: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns how far each pixel is moved where the grid's points are moved by what is drawn: x and
    y, each float32 (n, height, width).
    """
    points = tf.unstack(tf.reshape(drawn, (-1, 2, _POINTS, _POINTS)), axis=3)
    # Sums are written out: the last bits of a matrix product depend on the length of the batch.
    along_x = tf.add_n(
        [
            point[..., tf.newaxis] * weights
            for point, weights in zip(points, _spline(width).T, strict=True)
        ]
    )
    bent = tf.add_n(
        [
            row[:, :, tf.newaxis, :] * weights[:, np.newaxis]
            for row, weights in zip(tf.unstack(along_x, axis=2), _spline(height).T, strict=True)
        ]
    )
    return bent[:, 0], bent[:, 1]


def _interpolate(images: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """Returns the pixels of images at places between pixels, in the shape of the images, float32.

    TensorFlow's ``ImageProjectiveTransformV3`` is no alternative: XLA does not compile it.
    """
    _, height, width, *channels = images.shape
    # A border of background: whatever is further outside is as good as on it.
    x, y = tf.clip_by_value(x, -1.0, width), tf.clip_by_value(y, -1.0, height)
    left, top = tf.floor(x), tf.floor(y)
    padded = tf.pad(images, [[0, 0], [1, 2], [1, 2], *[[0, 0] for _ in channels]])
    # Each pixel beside the three to its right and below: one gather in place of four.
    corners = [padded[:, i : height + 2 + i, j : width + 2 + j] for i in (0, 1) for j in (0, 1)]
    size = (height + 2) * (width + 2)
    pixels = tf.reshape(tf.stack(corners, axis=3), (-1, size, 4, *channels))
    place = (tf.cast(top, tf.int32) + 1) * (width + 2) + tf.cast(left, tf.int32) + 1
    gathered = tf.cast(tf.gather(pixels, place, batch_dims=1), tf.float32)
    above_left, above_right, below_left, below_right = tf.unstack(gathered, axis=3)
    right_share, bottom_share = x - left, y - top
    if channels:
        right_share, bottom_share = right_share[..., tf.newaxis], bottom_share[..., tf.newaxis]
    above = above_left + (above_right - above_left) * right_share
    below = below_left + (below_right - below_left) * right_share
    return above + (below - above) * bottom_share
