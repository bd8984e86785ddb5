"""Random affine augmentation: rotate, shear, scale and translate.

    warped = warp(images, seed)

The result depends on the images and the seed alone, so a resumed run sees the same images as one
that was never stopped.
"""

import math

from trainer.runtime import tf

# The largest of each, in both directions; amounts are uniformly distributed.
ROTATION = 10.0  # degrees
SHEAR = 10.0  # degrees
ZOOM = 0.1  # of the size, along each axis
SHIFT = 2.0  # pixels, along each axis


def warp(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Applies a random affine transformation about its centre to each image.

    Args:
        images: uint8 (n, height, width), with a static n.
        seed: int32 (2,), as ``tf.random.stateless_uniform`` takes it.

    Returns:
        uint8 of the same shape, interpolated bilinearly; pixels from outside the image are 0.
    """
    n, height, width = images.shape
    limits = [math.radians(ROTATION), math.radians(SHEAR), ZOOM, ZOOM, SHIFT, SHIFT]
    drawn = tf.random.stateless_uniform((n, len(limits)), seed, -1.0, 1.0) * limits
    angle, shear, zoom_x, zoom_y, shift_x, shift_y = tf.unstack(drawn, axis=1)
    cos, sin, slant = tf.cos(angle), tf.sin(angle), tf.tan(shear)
    # The inverse map, from a pixel of the result to its source, relative to the centre: rotation,
    # shear along x, scale.
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
