"""Unusual images are noticed, and neither usual ones nor pictures of other things."""

import foreign
import numpy as np
import pytest
from PIL import Image, ImageDraw

from trainer.data.digits import Digits
from trainer.data.plausibility import MNIST_MEANS, ORIENTATIONS, _pooled, notices


def data(images, labels):
    images = np.ascontiguousarray(images)
    return Digits(images, labels, images[:1], labels[:1])


def said(images, labels):
    return list(notices(data(images, labels)))


def shapes(seed):
    """Ten kinds of things, each of three ellipses that vary a little, like clothes in a frame."""
    noise = np.random.default_rng(seed)
    kinds = [
        [(noise.integers(0, 20, 2), noise.integers(6, 20, 2)) for _ in "abc"] for _ in "0" * 10
    ]
    images = []
    for number in range(100):
        image = Image.new("L", (28, 28))
        for start, size in kinds[number % 10]:
            corner = start + noise.integers(-1, 2, 2)
            box = [*corner.tolist(), *np.minimum(corner + size, 27).tolist()]
            ImageDraw.Draw(image).ellipse(box, fill=int(noise.integers(120, 256)))
        images.append(np.array(image))
    return np.stack(images), np.arange(100) % 10


def test_mnist_is_as_usual(mnist):
    assert said(mnist.x_train, mnist.y_train) == []
    assert said(mnist.x_test, mnist.y_test) == []


@pytest.mark.parametrize("examples", [1, 10, 30, 100, 300])
def test_a_few_of_its_digits_are_as_usual(mnist, examples):
    for start in range(0, 6000, 300):
        part = slice(start, start + examples)
        assert said(mnist.x_test[part], mnist.y_test[part]) == []


def test_what_is_no_digit_is_as_usual():
    noise = np.random.default_rng(0).integers(0, 256, (60, 28, 28), np.uint8)
    assert said(noise, np.arange(60) % 10) == []
    for seed in range(100):
        assert said(*shapes(seed)) == [], seed


def test_other_labels_for_the_same_digits_are_no_other_orientation(mnist):
    for seed in range(100):
        other = np.random.default_rng(seed).permutation(10).astype(np.uint8)
        assert said(mnist.x_test[:1000], other[mnist.y_test[:1000]]) == [], seed


def test_digits_of_others_are_as_usual():
    images, labels = foreign.optdigits()  # 8x8 pixels, values 0 to 16
    images = np.pad(np.kron(images * 15, np.ones((3, 3))), ((0, 0), (2, 2), (2, 2)))
    assert said(images.astype(np.uint8), labels) == []


@pytest.mark.parametrize("expression", [name for name in ORIENTATIONS if name != "images"])
@pytest.mark.parametrize("examples", [200, 10_000])
def test_turned_digits_are_noticed_with_the_way_back(mnist, expression, examples):
    upright, labels = mnist.x_test[:examples], mnist.y_test[:examples]
    back = ORIENTATIONS[expression]
    # The way there is one of the others.
    (turned,) = [
        image
        for turn in ORIENTATIONS.values()
        if np.array_equal(back(image := turn(upright)), upright)
    ]
    (notice,) = said(turned, labels)
    assert f"like MNIST's digits as {expression}, and" in notice
    assert eval(expression, {"images": turned, "np": np}).tobytes() == upright.tobytes()  # noqa: S307


def test_zeros_and_ones_are_noticed(mnist):
    (notice,) = said(mnist.x_test // 128, mnist.y_test)
    assert "the brightest pixel is 1, usual is 255" in notice


def test_inverted_images_are_noticed(mnist):
    (notice,) = said(255 - mnist.x_test, mnist.y_test)
    assert "look inverted: 255 at the border" in notice
    assert notice.endswith("Use 255 - images")


def test_inverted_images_that_are_transposed_too_are_noticed_for_both(mnist):
    inverted, turned = said(255 - mnist.x_test.swapaxes(1, 2), mnist.y_test)
    assert "inverted" in inverted
    assert "images.swapaxes(1, 2)" in turned


def test_the_stored_means_are_mnists(mnist):
    means = np.stack([_pooled(mnist.x_train[mnist.y_train == c].mean(axis=0)) for c in range(10)])
    stored = np.array([[int(value, 16) for value in row] for row in MNIST_MEANS])
    assert np.array_equal(np.rint(means / means.max() * 15), stored.reshape(means.shape))
