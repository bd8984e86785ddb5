"""Pictures of all kinds."""

import io
import os
from pathlib import Path

import foreign
import numpy as np
import pytest
from PIL import Image

from trainer.errors import DataError, InputError
from trainer.inference import pictures, segmentation


def seven(pen: str = "felt-tip") -> np.ndarray:
    return foreign.draw(7, pen, np.random.default_rng(0))


def packed(picture: Image.Image | np.ndarray, kind: str, **options) -> io.BytesIO:
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    picture.save(file := io.BytesIO(), kind, **options)
    file.seek(0)
    return file


def opened(picture: Image.Image | np.ndarray, kind: str = "PNG", **options) -> np.ndarray:
    return pictures.open_image(packed(picture, kind, **options))


def assert_alike(one: np.ndarray, other: np.ndarray, most: float = 2.0) -> None:
    assert one.shape == other.shape
    assert one.dtype == other.dtype == np.uint8
    assert np.abs(one.astype(float) - other).mean() < most


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "MPO", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "HEIF"]
)
def test_every_format_is_the_same_picture(kind):
    pictures.suffixes()  # registers HEIF's plugin
    assert_alike(opened(seven(), kind), seven())


def test_names_end_as_the_formats_have_it():
    for end in (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".heic"):
        assert end in pictures.suffixes()
    assert not pictures.suffixes() & {".eps", ".pdf", ".txt", ".h5"}  # EPS would run Ghostscript.


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
    [expected], [found] = segmentation.find(seven()), segmentation.find(grey)
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
        pictures.open_image(io.BytesIO(content[: len(content) // 2]), "a.x")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "an empty file"),
        (b"seven", "a file that is none of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "a file that is none of PNG"),
        (bytes(pictures.MAX_BYTES + 1), "more than 64,000,000 bytes"),
    ],
)
def test_what_is_no_image_is_a_sentence(content, sentence):
    with pytest.raises(DataError, match=sentence):
        pictures.open_image(io.BytesIO(content))


def test_a_decompression_bomb_is_not_decoded():
    bomb = packed(Image.new("1", (20_000, 2_001)), "PNG")
    with pytest.raises(DataError, match=r"20000×2001 pixels; 40,000,000 are the most"):
        pictures.open_image(bomb)


def test_what_cannot_be_read_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.png\. Received: No such file"):
        pictures.open_image(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match="a folder without images"):
        pictures.open_image(tmp_path)
    with pytest.raises(InputError, match="a name that no file can have"):
        pictures.open_image(tmp_path / "a\0b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes.")
def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match=r"not a regular file\. Give its content on"):
            pictures.open_image(path)
