import numpy as np
import pytest

from trainer.data import augment
from trainer.runtime import tf

KNOWN = [0.9291187524795532, -0.28677523136138916, 0.2027353048324585]


@pytest.fixture(scope="module")
def images(mnist):
    return tf.constant(mnist.x_train[:500])


def warp(images, seed=0, epoch=0):
    return augment.warp(images, tf.constant(augment.draw(len(images), seed, epoch))).numpy()


def test_what_is_drawn_is_a_function_of_seed_epoch_and_number():
    drawn = augment.draw(1000, 1, 2)
    assert (drawn.shape, drawn.dtype) == ((1000, 6), np.float32)
    # Known values: other bits would change the runs of those who have a checkpoint.
    np.testing.assert_array_equal(augment.draw(5, 1, 2), drawn[:5])
    assert len(np.unique(drawn)) > 5900
    assert (augment.draw(1000, 1, 3) != drawn).mean() > 0.99
    assert (augment.draw(1000, 2, 2) != drawn).mean() > 0.99
    assert augment.draw(3, seed=0, epoch=0)[:, 0].tolist() == KNOWN


def test_amounts_are_uniformly_distributed():
    drawn = augment.draw(20_000, 0, 0)
    assert drawn.min() >= -1
    assert drawn.max() < 1
    np.testing.assert_allclose(drawn.mean(axis=0), 0, atol=0.02)
    np.testing.assert_allclose(drawn.std(axis=0), 1 / np.sqrt(3), atol=0.01)
    np.testing.assert_allclose(np.corrcoef(drawn.T), np.eye(6), atol=0.03)


def test_an_image_becomes_the_same_in_any_batch(images):
    warped = warp(images)
    assert (warped.shape, warped.dtype) == ((500, 28, 28), np.uint8)
    drawn = augment.draw(500, 0, 0)
    some = [7, 499, 7, 0]
    np.testing.assert_array_equal(
        augment.warp(tf.gather(images, some), tf.constant(drawn[some])), warped[some]
    )


def test_every_image_is_changed_in_a_way_of_its_own():
    same = tf.repeat(tf.constant(np.eye(28, dtype=np.uint8) * 255)[tf.newaxis], 50, axis=0)
    assert len(np.unique(warp(same), axis=0)) == 50


def test_without_limits_nothing_changes(images, monkeypatch):
    for name in ("ROTATION", "SHEAR", "ZOOM", "SHIFT"):
        monkeypatch.setattr(augment, name, 0.0)
    np.testing.assert_array_equal(warp(images), images)


def projected(images, drawn):
    """The same by TensorFlow's own transformation, in NumPy's float64."""
    rotation, shear = np.radians(augment.ROTATION), np.radians(augment.SHEAR)
    zoom, shift = augment.ZOOM, 28 * augment.SHIFT
    amounts = np.float64(drawn) * [rotation, shear, zoom, zoom, shift, shift]
    transforms = []
    for angle, slant, zoom_x, zoom_y, shift_x, shift_y in amounts:
        turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        inverse = np.diag([1 / (1 + zoom_x), 1 / (1 + zoom_y)]) @ [[1, -np.tan(slant)], [0, 1]]
        matrix = inverse @ turn
        offset = np.array([13.5, 13.5]) - matrix @ [13.5, 13.5] + [shift_x, shift_y]
        transforms.append([*matrix[0], offset[0], *matrix[1], offset[1], 0, 0])
    warped = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(images[..., tf.newaxis], tf.float32),
        transforms=np.float32(transforms),
        output_shape=images.shape[1:],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    return warped[..., 0].numpy()


def test_it_is_the_affine_transformation_that_tensorflow_has(images):
    # TensorFlow's works pixel by pixel in float32: some places fall on the other side of a border.
    expected = projected(images, augment.draw(500, 0, 0))
    assert np.abs(warp(images) - expected).max() <= 0.6


def test_images_need_not_be_square(images):
    narrow = images[:, :, 4:24]
    drawn = tf.constant(augment.draw(500, 0, 0))
    assert augment.warp(narrow, drawn).shape == (500, 28, 20)


@pytest.mark.full
def test_xla_compiles_it_to_the_same(images):
    drawn = tf.constant(augment.draw(500, 0, 0))
    compiled = tf.function(augment.warp, jit_compile=True, autograph=False)(images, drawn)
    difference = np.abs(np.int32(compiled) - np.int32(warp(images)))
    assert difference.max() <= 1  # Where rounding meets a half.
    assert (difference > 0).mean() < 1e-4


def centres(images):
    """Where the ink of each image is: x and y."""
    images = np.asarray(images, np.float64)
    mass = images.sum(axis=(1, 2))
    grid = np.arange(28)
    return np.stack([(images.sum(axis=axis) @ grid) / mass for axis in (1, 2)], axis=1)


def test_images_stay_where_and_as_large_as_they_are_on_average(images):
    warped = warp(images)
    moved = centres(warped) - centres(images)
    # MNIST's digits are centred: they move by the shift, up to 2 pixels, and a little by the rest.
    assert np.abs(moved).max() < 28 * augment.SHIFT * (1 + augment.ZOOM) + 1.5
    assert np.abs(moved.mean(axis=0)).max() < 0.25
    assert moved.std(axis=0) == pytest.approx(2 / np.sqrt(3), rel=0.2)
    assert warped.mean() == pytest.approx(images.numpy().mean(), rel=0.05)


def test_what_comes_from_outside_is_background():
    white = tf.fill((50, 28, 28), tf.constant(255, tf.uint8))
    assert warp(white)[:, [0, 0, -1, -1], [0, -1, 0, -1]].min() == 0


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_all_channels_of_an_image_are_moved_alike(images, dtype):
    drawn = tf.constant(augment.draw(500, 0, 0))
    grey = augment.warp(images, drawn).numpy()
    planes = tf.cast(tf.stack([images, 255 - images, images], axis=-1), dtype)
    colour = augment.warp(planes, drawn)
    assert (colour.shape, colour.dtype) == ((500, 28, 28, 3), dtype)
    np.testing.assert_array_equal(colour[..., 0], grey)
    np.testing.assert_array_equal(colour[..., 2], grey)
    single = augment.warp(images[..., tf.newaxis], drawn)
    np.testing.assert_array_equal(single[..., 0], grey)
