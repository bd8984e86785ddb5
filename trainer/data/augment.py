"""Changes images a little at random, as hands do: turned, sheared, sized and moved.

    warped = warp(images, seed)

A function of the images and a seed alone, so that a run that was stopped goes on with the same.
"""

import math

from trainer.runtime import tf

ROTATION = 10.0  # degrees, either way
SHEAR = 10.0  # degrees, either way
ZOOM = 0.1  # of the size, either way, in each direction
SHIFT = 2.0  # pixels, either way, in each direction


def warp(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Gives each image an affine transformation of its own, about its centre.

    Args:
        images: uint8 (n, height, width); n is static.
        seed: int32 (2,).

    Returns:
        uint8 of the same shape, interpolated linearly; what comes from outside is background, 0.
    """
    n, height, width = images.shape
    limits = [math.radians(ROTATION), math.radians(SHEAR), ZOOM, ZOOM, SHIFT, SHIFT]
    drawn = tf.random.stateless_uniform((n, len(limits)), seed, -1.0, 1.0) * limits
    angle, shear, zoom_x, zoom_y, shift_x, shift_y = tf.unstack(drawn, axis=1)
    cos, sin, slant = tf.cos(angle), tf.sin(angle), tf.tan(shear)
    # From a place of the result, relative to the centre, to where it is taken from: turned, sheared
    # along x, sized.
    a, b = (cos - slant * sin) / (1 + zoom_x), (-sin - slant * cos) / (1 + zoom_x)
    c, d = sin / (1 + zoom_y), cos / (1 + zoom_y)
    x, y = (width - 1) / 2, (height - 1) / 2
    zeros = tf.zeros_like(a)
    transforms = [a, b, x - a * x - b * y + shift_x, c, d, y - c * x - d * y + shift_y]
    warped = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(images[..., tf.newaxis], tf.float32),
        transforms=tf.stack([*transforms, zeros, zeros], axis=1),
        output_shape=(height, width),
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    return tf.cast(tf.round(warped[..., 0]), tf.uint8)
