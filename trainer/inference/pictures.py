"""Reads pictures: photographs, scans and drawings, from files of unknown origin.

    picture = pictures.open_image(Path("seven.jpg"))     # uint8 (h, w), grey, upright
    picture = pictures.open_whole(Path("cat.jpg"), (180, 180, 3))

``trainer.inference.segmentation`` finds the digits in them.
"""

import contextlib
import errno
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from trainer import inputs
from trainer.errors import DataError, InputError

FORMATS = ("PNG", "JPEG", "MPO", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "HEIF")
MAX_PIXELS = 40_000_000  # Decoding as many takes up to 0.75 GB.
MAX_BYTES = 64_000_000
MAX_SCANS = 500  # Of a progressive JPEG: each can take as long as the picture; ten are usual.
LONGEST = 640  # Pixels of the longest side; larger pictures are reduced to it.


def open_image(source: Path | BinaryIO, name: str | None = None) -> np.ndarray:
    """Reads a picture.

    Args:
        source: A path, or a file that is open.
        name: The picture's name in errors; None: its path.

    Returns:
        uint8 (h, w), grey, rotated by its EXIF orientation, transparent parts filled with the
        colour of the paper, the longest side at most 640 pixels.

    Raises:
        InputError: The file is missing or cannot be read.
        DataError: It is not an image, truncated, damaged, or larger than 40 million pixels.
    """
    with _opened(source, name or str(source)) as image:
        return np.asarray(_upright(_grey(image)))


def open_whole(
    source: Path | BinaryIO, shape: tuple[int, int, int], name: str | None = None
) -> np.ndarray:
    """Reads a picture as ``data.folders.ImageFolder`` has read those that a model was trained on:
    as it is stored, without its EXIF orientation.

    Args:
        source: A path, or a file that is open.
        shape: Height, width and channels, 1 or 3. A picture of another size is resized, bilinearly
            with antialiasing; Pillow does it in whole numbers, TensorFlow in fractions, so that
            pixels differ by one at most.
        name: The picture's name in errors; None: its path.

    Returns:
        uint8 of that shape.

    Raises:
        InputError: The file is missing or cannot be read.
        DataError: As ``open_image``.
    """
    height, width, channels = shape
    with _opened(source, name or str(source)) as image:
        if image.mode.startswith("I"):  # 16 bits, of which TensorFlow takes the upper ones.
            values = np.asarray(image).astype(np.int64)
            image = Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(shape)


@contextlib.contextmanager
def _opened(source: Path | BinaryIO, name: str) -> Iterator[Image.Image]:
    """Opens a picture, and names what is wrong with it when it is decoded."""
    content = read_file(source, name) if isinstance(source, Path) else source.read(MAX_BYTES + 1)
    _check_size(content, name)
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                most = f"{MAX_PIXELS:,} are the most. Make it smaller"
                raise DataError(_expected(name, f"{width}×{height} pixels; {most}"))
            if content.count(b"\xff\xda") > MAX_SCANS and image.format in ("JPEG", "MPO"):
                raise DataError(_expected(name, f"a JPEG of more than {MAX_SCANS} scans"))
            yield image
    except DataError:
        raise
    except UnidentifiedImageError:
        kinds = ", ".join(_formats())
        raise DataError(
            _expected(name, f"a file that is none of {kinds}" if content else "an empty file")
        ) from None
    except Image.DecompressionBombError:
        raise DataError(_expected(name, f"more than {MAX_PIXELS:,} pixels")) from None
    except Exception as error:  # Pillow's decoders raise whatever the damage leads to.
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise DataError(
            _expected(name, f"a truncated or damaged file ({reason}). Fetch or make it again")
        ) from error


def read_file(path: Path, name: str) -> bytes:
    """Reads the content of a picture's file.

    Args:
        path: The file.
        name: The picture's name in errors.

    Raises:
        InputError: The file is missing or cannot be read.
        DataError: It is larger than 64 MB.
    """
    try:
        with inputs.open_file(path) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, IsADirectoryError):
            reason = "a folder without images"
        elif error.errno == errno.EINVAL:
            reason += ". Give its content on standard input, as -"
        raise InputError(f"Expected an image at {name}. Received: {reason}.") from error
    _check_size(content, name)
    return content


def _check_size(content: bytes, name: str) -> None:
    if len(content) > MAX_BYTES:
        raise DataError(_expected(name, f"more than {MAX_BYTES:,} bytes. Make it smaller"))


def _expected(name: str, received: str) -> str:
    return f"Expected an image at {name}. Received: {received}."


def suffixes() -> set[str]:
    """Returns the suffixes of the files that ``open_image`` can read: ``.png``, …"""
    formats = _formats()
    return {end for end, name in Image.registered_extensions().items() if name in formats}


def _formats() -> list[str]:
    with contextlib.suppress(ImportError):  # HEIC, where its plugin is installed.
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _grey(image: Image.Image) -> Image.Image:
    """Converts to mode L, reduced to the longest side, transparent parts filled."""
    image.draft("L", (LONGEST, LONGEST))  # Decodes a JPEG at no more than that.
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _stretched(_reduce(image.convert("F")))
    if "A" in image.getbands() or "transparency" in image.info:
        return _on_paper(_reduce(image.convert("RGBA")))
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return _reduce(image).convert("L")


def _reduce(image: Image.Image) -> Image.Image:
    factor = max(image.size) / LONGEST
    if factor <= 1:
        return image
    size = [max(1, round(side / factor)) for side in image.size]
    return image.resize(size, Image.Resampling.BOX, reducing_gap=1.0)


def _stretched(image: Image.Image) -> Image.Image:
    """Scales the range of values in use to 8 bits: cameras and scanners use 12 bits of 16."""
    values = np.nan_to_num(np.asarray(image)).astype(np.float64)  # Their span may overflow.
    low, high = float(values.min()), float(values.max())
    # Else the noise of a blank sheet would fill the range.
    span = max(high - low, abs(high) / 64, 1e-6)
    return Image.fromarray(((values - low) * (255 / span)).astype(np.uint8))


def _on_paper(image: Image.Image) -> Image.Image:
    """Fills transparent parts: with the median of the opaque ones where those are most of the
    picture; else those are the ink, and the paper is its opposite.
    """
    light, alpha = (np.asarray(band, np.float32) for band in image.convert("LA").split())
    opaque = alpha > 127
    paper = 255.0
    if opaque.mean() > 0.5:
        paper = float(np.median(light[opaque]))
    elif opaque.any() and light[opaque].mean() > 127:
        paper = 0.0
    return Image.fromarray((paper + (light - paper) * alpha / 255).round().astype(np.uint8))


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # A damaged EXIF block is ignored.
        return ImageOps.exif_transpose(image)
    return image
