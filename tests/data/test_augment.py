import numpy as np
import pytest

from trainer.data import augment
from trainer.runtime import tf


@pytest.fixture(scope="module")
def images(mnist):
    return tf.constant(mnist.x_train[:500])


def warp(images, *seed):
    return augment.warp(images, tf.constant(seed, tf.int32)).numpy()


def test_it_is_a_function_of_images_and_seed(images):
    warped = warp(images, 1, 2)
    assert (warped.shape, warped.dtype) == ((500, 28, 28), np.uint8)
    np.testing.assert_array_equal(warp(images, 1, 2), warped)
    assert (warp(images, 1, 3) != warped).any()
    assert (warp(images, 2, 2) != warped).any()


def test_every_image_is_changed_in_a_way_of_its_own():
    same = tf.repeat(tf.constant(np.eye(28, dtype=np.uint8) * 255)[tf.newaxis], 50, axis=0)
    warped = warp(same, 0, 0)
    assert len(np.unique(warped, axis=0)) == 50


def test_without_limits_nothing_changes(images, monkeypatch):
    for name in ("ROTATION", "SHEAR", "ZOOM", "SHIFT"):
        monkeypatch.setattr(augment, name, 0.0)
    np.testing.assert_array_equal(warp(images, 0, 0), images)


def centres(images):
    """Where the ink of each image is: x and y."""
    images = np.asarray(images, np.float64)
    mass = images.sum(axis=(1, 2))
    grid = np.arange(28)
    return np.stack([(images.sum(axis=axis) @ grid) / mass for axis in (1, 2)], axis=1)


def test_images_stay_where_and_as_large_as_they_are_on_average(images):
    warped = warp(images, 0, 0)
    moved = centres(warped) - centres(images)
    # MNIST's digits are centred: they move by the shift, up to 2 pixels, and a little by the rest.
    assert np.abs(moved).max() < augment.SHIFT * (1 + augment.ZOOM) + 1.5
    assert np.abs(moved.mean(axis=0)).max() < 0.25
    assert moved.std(axis=0) == pytest.approx(2 / np.sqrt(3), rel=0.2)
    assert warped.mean() == pytest.approx(images.numpy().mean(), rel=0.05)


def test_what_comes_from_outside_is_background():
    white = tf.fill((50, 28, 28), tf.constant(255, tf.uint8))
    assert warp(white, 0, 0)[:, [0, 0, -1, -1], [0, -1, 0, -1]].min() == 0
