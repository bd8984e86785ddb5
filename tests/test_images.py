"""Pictures of all kinds, and the digits that are found in them."""

import io
import itertools

import foreign
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from trainer import evaluate, images, saved
from trainer.errors import DataError, InputError


def seven(pen: str = "felt-tip") -> np.ndarray:
    return foreign.draw(7, pen, np.random.default_rng(0))


def packed(picture: Image.Image | np.ndarray, kind: str, **options) -> io.BytesIO:
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    picture.save(file := io.BytesIO(), kind, **options)
    file.seek(0)
    return file


def opened(picture: Image.Image | np.ndarray, kind: str = "PNG", **options) -> np.ndarray:
    return images.open_image(packed(picture, kind, **options))


def assert_alike(one: np.ndarray, other: np.ndarray, most: float = 2.0) -> None:
    assert one.shape == other.shape
    assert one.dtype == other.dtype == np.uint8
    assert np.abs(one.astype(float) - other).mean() < most


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "MPO", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "HEIF"]
)
def test_every_format_is_the_same_picture(kind):
    images.suffixes()  # registers HEIF's plugin
    assert_alike(opened(seven(), kind), seven())


def test_names_end_as_the_formats_have_it():
    for end in (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".heic"):
        assert end in images.suffixes()
    assert not images.suffixes() & {".eps", ".pdf", ".txt", ".h5"}  # EPS would run Ghostscript.


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_upright_as_its_exif_says(orientation):
    upright = Image.fromarray(seven()[:, 20:180])
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    lying = upright.transpose(turned[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[274] = orientation
    assert_alike(opened(lying, "JPEG", exif=exif), np.asarray(upright))


@pytest.mark.parametrize("ink", [0, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_ink_on_nothing_is_seen_whatever_its_colour(ink, mode):
    alpha = Image.fromarray(255 - seven())
    picture = Image.merge("LA", (Image.new("L", alpha.size, ink), alpha))
    if mode == "RGBA":
        picture = picture.convert("RGBA")
    if mode == "P":  # One colour is none.
        picture = Image.fromarray((seven() < 128).astype(np.uint8))
        picture.putpalette([9, 9, 9, ink, ink, ink])
        grey = opened(picture, transparency=0)
    else:
        grey = opened(picture)
    [expected], [found] = images.find(seven()), images.find(grey)
    assert_alike(found.pixels, expected.pixels, most=6)


def test_a_hole_in_a_picture_is_paper():
    paper = Image.fromarray(seven()).convert("RGBA")
    paper.putpixel((0, 0), (255, 0, 0, 0))
    assert_alike(opened(paper), seven())


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_sixteen_bits_are_as_good_as_eight(bits):
    deep = (seven().astype(np.uint16) << 8) >> (16 - bits)
    assert_alike(opened(Image.fromarray(deep)), seven())


def test_numbers_of_any_range_are_a_picture():
    values = seven().astype(np.float32) / 255 - 0.5
    values[0, 0] = np.nan
    assert_alike(opened(Image.fromarray(values), "TIFF"), seven())


def test_black_and_white_and_print_colours_are_a_picture():
    picture = Image.fromarray(seven())
    assert_alike(opened(picture.convert("1", dither=0)), seven(), most=6)
    assert_alike(opened(picture.convert("CMYK"), "JPEG"), seven(), most=6)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_large_picture_is_made_smaller(kind):
    large = Image.fromarray(seven()).resize((3000, 2000))
    grey = opened(large, kind)
    assert max(grey.shape) <= 640
    assert abs(grey.shape[1] / grey.shape[0] - 1.5) < 0.01


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP", "JPEG"])
def test_a_truncated_file_is_a_sentence(kind):
    content = packed(seven("pencil"), kind).read()
    with pytest.raises(DataError, match=r"^Expected an image at a\.x\. Received: a truncated or"):
        images.open_image(io.BytesIO(content[: len(content) // 2]), "a.x")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "an empty file"),
        (b"seven", "a file that is none of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "a file that is none of PNG"),
        (bytes(images.MAX_BYTES + 1), "more than 64,000,000 bytes"),
    ],
)
def test_what_is_no_image_is_a_sentence(content, sentence):
    with pytest.raises(DataError, match=sentence):
        images.open_image(io.BytesIO(content))


def test_a_decompression_bomb_is_not_decoded():
    bomb = packed(Image.new("1", (20_000, 2_001)), "PNG")
    with pytest.raises(DataError, match=r"20000×2001 pixels; 40,000,000 are the most"):
        images.open_image(bomb)


def test_what_cannot_be_read_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.png\. Received: No such file"):
        images.open_image(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match="a folder without images"):
        images.open_image(tmp_path)
    with pytest.raises(InputError, match="embedded null byte"):
        images.open_image(tmp_path / "a\0b")


def test_mnists_own_digits_stay_as_they_are(mnist):
    same = []
    for digit in mnist.x_test[:50]:
        [found] = images.find(digit)
        same.append(np.corrcoef(found.pixels.reshape(-1), digit.reshape(-1))[0, 1])
    assert np.median(same) > 0.97


@pytest.mark.parametrize("pen", ["ballpoint", "pencil", "felt-tip", "brush"])
def test_a_digit_lies_as_mnists_makers_laid_it(pen):
    for digit in (1, 4, 7, 8):
        picture = foreign.draw(digit, pen, np.random.default_rng(digit))
        [found] = images.find(picture)
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
        [dark], [light] = images.find(picture), images.find(255 - picture)
        assert_alike(dark.pixels, light.pixels)


def test_a_thin_pen_is_made_as_wide_as_mnists():
    [thin], [thick] = images.find(seven("ballpoint")), images.find(seven("felt-tip"))
    assert 0.6 < thin.pixels.sum() / thick.pixels.sum() < 1.4


def test_uneven_light_changes_little():
    y, x = np.mgrid[0:240, 0:240] / 240
    [even] = images.find(seven())
    for light in (0.5 + 0.5 * x, 1 - 0.5 * y, 1 - 0.4 * (x - 0.5) ** 2 - 0.4 * (y - 0.5) ** 2):
        [uneven] = images.find((seven() * light).astype(np.uint8))
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
    found = images.find(page(*lines), digits="many")
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
    assert [seen.box for seen in images.find(picture, digits="many")] == [
        (60, 40, 110, 150),
        (260, 40, 310, 150),
    ]


def test_several_digits_that_are_to_be_one_are_noticed():
    [seen] = images.find(page("42"))
    assert seen.several
    [seen] = images.find(page("4"))
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
        images.find(picture, digits=digits, name="a.png")


@pytest.mark.full
@pytest.mark.parametrize("group", foreign.GROUPS)
def test_digits_that_are_not_mnists_are_read(group, trained):
    """The model has seen the training images once. Seed 1 is none that anything was chosen by."""
    cnn = saved.load(trained / "mnist.h5")
    pictures, digits = foreign.group(
        group, seed=1, each=foreign.EACH[foreign.GROUPS[group][0]] // 2 or 1
    )
    with_it, without = (
        (evaluate.probabilities(cnn, np.stack(list(map(see, pictures))), batch_size=128)
         .argmax(axis=1) == digits).mean()
        for see in (foreign.cut_out, foreign.plain)
    )  # fmt: skip
    least = 0.95 if group in ("fonts", "pens") else 0.8
    assert with_it >= least
    assert with_it > without + 0.1 or group == "MNIST's own"
