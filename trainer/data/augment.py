"""Random affine augmentation: rotate, shear, scale and translate.

    drawn = draw(len(images), seed=0, epoch=3)      # a row for each image
    warped = warp(images[rows], drawn[rows])

What becomes of an image depends on the seed, the epoch and the image's number alone: neither
resuming a run, nor the batch size or the number of replicas changes it.
"""

import math

import numpy as np

from trainer.runtime import tf

# The largest of each, in both directions; amounts are uniformly distributed.
ROTATION = 10.0  # degrees
SHEAR = 10.0  # degrees
ZOOM = 0.1  # of the size, along each axis
SHIFT = 2 / 28  # of the size, along each axis

_AMOUNTS = 6  # rotation, shear, zoom along x and y, shift along x and y


def draw(n: int, seed: int, epoch: int) -> np.ndarray:
    """Draws what ``warp`` needs for each image of a data set, in the order of the data set.

    The bits are those of Philox, which NumPy keeps from version to version; see
    ``order.epoch_order``.

    Args:
        n: Number of images.
        seed: Seed of the run.
        epoch: Number of the epoch, counted from 0.

    Returns:
        float32 (n, 6), uniformly distributed from -1 to 1, excluding 1.
    """
    bits = np.random.Philox(np.random.SeedSequence((seed, epoch, 1))).random_raw(n * _AMOUNTS)
    # The upper 24 bits are what float32 represents exactly.
    units = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-23)
    return (units - np.float32(1)).reshape(n, _AMOUNTS)


def warp(images: tf.Tensor, drawn: tf.Tensor) -> tf.Tensor:
    """Applies a random affine transformation about its centre to each image, to all its channels
    the same.

    Made of gathers and arithmetic, which run on any device and which XLA compiles, as it does not
    TensorFlow's ``ImageProjectiveTransformV3``.

    Args:
        images: (n, height, width) or (n, height, width, channels), from 0 to 255, with static
            height, width and channels.
        drawn: float32 (n, 6), the images' rows of what ``draw`` returns.

    Returns:
        Of the same shape and dtype, interpolated bilinearly and rounded; pixels from outside the
        image are 0.
    """
    if images.shape.rank == 4:
        _, height, width, channels = images.shape
        planes = tf.reshape(tf.transpose(images, (0, 3, 1, 2)), (-1, height, width))
        warped = warp(tf.ensure_shape(planes, (None, height, width)), tf.repeat(drawn, channels, 0))
        warped = tf.reshape(warped, (-1, channels, height, width))
        return tf.transpose(warped, (0, 2, 3, 1))
    _, height, width = images.shape
    shifts = SHIFT * width, SHIFT * height
    limits = [math.radians(ROTATION), math.radians(SHEAR), ZOOM, ZOOM, *shifts]
    angle, shear, zoom_x, zoom_y, shift_x, shift_y = tf.unstack(
        (drawn * limits)[:, :, tf.newaxis, tf.newaxis], axis=1
    )
    cos, sin, slant = tf.cos(angle), tf.sin(angle), tf.tan(shear)
    # The inverse map, from a pixel of the result to its source, relative to the centre: rotation,
    # shear along x, scale.
    a, b = (cos - slant * sin) / (1 + zoom_x), (-sin - slant * cos) / (1 + zoom_x)
    c, d = sin / (1 + zoom_y), cos / (1 + zoom_y)
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    x = tf.range(width, dtype=tf.float32)[tf.newaxis, tf.newaxis, :] - middle_x
    y = tf.range(height, dtype=tf.float32)[tf.newaxis, :, tf.newaxis] - middle_y
    return _interpolate(
        images, a * x + b * y + (middle_x + shift_x), c * x + d * y + (middle_y + shift_y)
    )


def _interpolate(images: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """Returns the pixels of images at places between pixels, float32 (n, height, width)."""
    _, height, width = images.shape
    # A border of background: whatever is further outside is as good as on it.
    x, y = tf.clip_by_value(x, -1.0, width), tf.clip_by_value(y, -1.0, height)
    left, top = tf.floor(x), tf.floor(y)
    right_share, bottom_share = x - left, y - top
    pixels = tf.reshape(tf.pad(images, [[0, 0], [1, 2], [1, 2]]), (-1, (height + 3) * (width + 3)))
    corner = (tf.cast(top, tf.int32) + 1) * (width + 3) + tf.cast(left, tf.int32) + 1
    above, below = (_between(pixels, corner + row * (width + 3), right_share) for row in range(2))
    return tf.cast(tf.round(above + (below - above) * bottom_share), images.dtype)


def _between(pixels: tf.Tensor, left: tf.Tensor, right_share: tf.Tensor) -> tf.Tensor:
    a, b = (tf.cast(tf.gather(pixels, left + n, batch_dims=1), tf.float32) for n in range(2))
    return a + (b - a) * right_share
