"""The digits that are found in pictures, and how they lie."""

import itertools

import foreign
import numpy as np
import pytest
from scipy import ndimage

from trainer.errors import DataError
from trainer.inference import model_file, segmentation


def seven(pen: str = "felt-tip") -> np.ndarray:
    return foreign.draw(7, pen, np.random.default_rng(0))


def test_mnists_own_digits_stay_as_they_are(mnist):
    same = []
    for digit in mnist.x_test[:50]:
        [found] = segmentation.find(digit)
        same.append(np.corrcoef(found.pixels.reshape(-1), digit.reshape(-1))[0, 1])
    assert np.median(same) > 0.97


@pytest.mark.parametrize("pen", ["ballpoint", "pencil", "felt-tip", "brush"])
def test_a_digit_lies_as_mnists_makers_laid_it(pen):
    for digit in (1, 4, 7, 8):
        picture = foreign.draw(digit, pen, np.random.default_rng(digit))
        [found] = segmentation.find(picture)
        assert (found.pixels.shape, found.pixels.dtype) == ((28, 28), np.uint8)
        rows, columns = np.nonzero(found.pixels > 25)
        sides = (np.ptp(rows) + 1, np.ptp(columns) + 1)
        assert 19 <= max(sides) <= 20
        middle = ndimage.center_of_mass(found.pixels)
        for axis, places in enumerate((rows, columns)):
            # As near as whole pixels and the picture's edge allow.
            edge = places.min() == 0 or places.max() == 27
            assert edge or abs(middle[axis] + 0.5 - 14) < 0.6 or abs(middle[axis] - 14) < 0.6


def test_dark_on_light_and_light_on_dark_are_the_same():
    for digit in range(10):
        picture = foreign.draw(digit, "ballpoint", np.random.default_rng(digit))
        [dark], [light] = segmentation.find(picture), segmentation.find(255 - picture)
        assert np.abs(dark.pixels.astype(float) - light.pixels).mean() < 2


def test_a_thin_pen_is_made_as_wide_as_mnists():
    [thin], [thick] = segmentation.find(seven("ballpoint")), segmentation.find(seven("felt-tip"))
    assert 0.6 < thin.pixels.sum() / thick.pixels.sum() < 1.4


def test_uneven_light_changes_little():
    y, x = np.mgrid[0:240, 0:240] / 240
    [even] = segmentation.find(seven())
    for light in (0.5 + 0.5 * x, 1 - 0.5 * y, 1 - 0.4 * (x - 0.5) ** 2 - 0.4 * (y - 0.5) ** 2):
        [uneven] = segmentation.find((seven() * light).astype(np.uint8))
        assert np.abs(np.subtract(uneven.box, even.box)).max() <= 1
        # Its centre of mass may lie across the border of a pixel.
        moved = [
            np.roll(uneven.pixels, by, (0, 1)) for by in itertools.product((-1, 0, 1), repeat=2)
        ]
        assert min(np.abs(pixels.astype(float) - even.pixels).mean() for pixels in moved) < 3


def page(*lines: str, pen: str = "ballpoint") -> np.ndarray:
    """Draws digits in lines."""
    random = np.random.default_rng(1)
    rows = [
        np.concatenate([foreign.draw(int(digit), pen, random) for digit in line], axis=1)
        for line in lines
    ]
    return np.concatenate(rows)


def test_many_digits_come_line_by_line_and_left_to_right():
    lines = ("3141", "5926")
    found = segmentation.find(page(*lines), digits="many")
    assert len(found) == 8
    for number, seen in enumerate(found):
        row, column = divmod(number, 4)
        left, top, right, bottom = seen.box
        assert column * 240 <= left < right <= (column + 1) * 240
        assert row * 240 <= top < bottom <= (row + 1) * 240
        assert not seen.several


def test_a_bar_that_lies_apart_belongs_to_its_digit_and_points_to_none():
    picture = np.full((200, 400), 255, np.uint8)
    for left in (50, 250):
        picture[60:150, left + 20 : left + 32] = 0
        picture[40:50, left + 10 : left + 60] = 0  # the bar of a 5, above it
    picture[140:150, 180:190] = 0  # a decimal point
    assert [seen.box for seen in segmentation.find(picture, digits="many")] == [
        (60, 40, 110, 150),
        (260, 40, 310, 150),
    ]


def test_several_digits_that_are_to_be_one_are_noticed():
    [seen] = segmentation.find(page("42"))
    assert seen.several
    [seen] = segmentation.find(page("4"))
    assert not seen.several


def noise(deviation: float) -> np.ndarray:
    values = np.random.default_rng(0).normal(200, deviation, (240, 240))
    return values.clip(0, 255).astype(np.uint8)


def specks() -> np.ndarray:
    picture = np.full((640, 640), 255, np.uint8)
    picture[100, 100] = picture[300, 50] = 0
    return picture


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((100, 100), np.uint8),
        np.full((3, 500), 255, np.uint8),
        np.full((1, 1), 7, np.uint8),
        np.tile(np.linspace(120, 255, 300).astype(np.uint8), (200, 1)),
        noise(5),
        noise(20),
        specks(),
    ],
    ids=["black", "white", "one pixel", "gradient", "paper", "grainy paper", "specks"],
)
@pytest.mark.parametrize("digits", ["one", "many"])
def test_where_no_digit_is_none_is_found(picture, digits):
    with pytest.raises(DataError, match=r"^Expected a digit in a\.png\. Received: a (blank )?pict"):
        segmentation.find(picture, digits=digits, name="a.png")


@pytest.mark.full
@pytest.mark.parametrize("group", foreign.GROUPS)
def test_digits_that_are_not_mnists_are_read(group, trained):
    """The model has seen the training images once. Seed 1 is none that anything was chosen by."""
    from trainer.models import cnn

    model = model_file.load(trained / "mnist.h5")
    pictures, digits = foreign.group(
        group, seed=1, each=foreign.EACH[foreign.GROUPS[group][0]] // 2 or 1
    )
    with_it, without = (
        (cnn.probabilities(model, np.stack(list(map(see, pictures))), batch_size=128)
         .argmax(axis=1) == digits).mean()
        for see in (foreign.cut_out, foreign.plain)
    )  # fmt: skip
    least = 0.95 if group in ("fonts", "pens") else 0.8
    assert with_it >= least
    assert with_it > without + 0.1 or group == "MNIST's own"
