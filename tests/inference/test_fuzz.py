"""Whatever the bytes of an answer, a picture or a model are, there is a result or one line."""

import contextlib
import io
import json
from types import SimpleNamespace

import foreign
import h5py
import numpy as np
import pytest
from PIL import Image
from support import damaged, fuzz

from trainer.errors import DataError, InputError
from trainer.inference import decoders, model_file, pictures, sandbox, segmentation

MORE = [100, pytest.param(2_000, marks=pytest.mark.full)]

CONFIG = json.dumps({"config": {"layers": [{"class_name": "Dense", "config": {"units": 2}}]}})

# What of a network is compared with a file.
NETWORK = SimpleNamespace(
    trainable_weights=[SimpleNamespace(shape=(3, 2)), SimpleNamespace(shape=(2,))],
    to_json=lambda: CONFIG,
)


def message(header: object, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(4, "big") + text + payload


def values(words: list[str]):
    """Returns a strategy for what JSON can say with these words."""
    from hypothesis import strategies as st

    odd = st.sampled_from(
        [True, None, -1, 0, 1, 2, 6, 640, 2**63, 2**70, 0.5, 1e300, "", "\x1b[2J"]
    )
    return st.recursive(
        odd | st.integers() | st.text(max_size=4) | st.sampled_from(words),
        lambda part: st.lists(part, max_size=4) | st.dictionaries(st.sampled_from(words), part),
        max_leaves=12,
    )


@contextlib.contextmanager
def one_line():
    """Lets an error pass that says in one line what was received."""
    said = ""
    try:
        yield
    except (DataError, InputError, sandbox.ProtocolError) as error:
        said = str(error)
    assert said.isprintable()


@pytest.mark.parametrize("examples", MORE)
def test_any_answer_of_a_decoder_is_a_picture_or_an_error(examples):
    digit = {"box": [0, 0, 6, 4], "several": False}
    sound = [
        message({"shape": [4, 6], "digits": [digit]}, bytes(24 + 784)),
        message({"shape": [4, 6], "digits": [digit, digit]}, bytes(24 + 2 * 784)),
        message({"error": [65, "Expected an image at a. Received: an empty file."]}),
    ]

    def receive(content: bytes) -> None:
        channel = sandbox.Channel(io.BytesIO(content), io.BytesIO())
        with one_line():
            picture, digits = decoders._receive(channel)
            assert picture.dtype == np.uint8
            assert max(picture.shape) <= pictures.LONGEST
            assert all(digit.pixels.shape == (28, 28) for digit in digits)

    words = ["shape", "digits", "box", "several", "error"]
    fuzz(examples, receive, damaged(sound))
    fuzz(examples, lambda header: receive(message(header, bytes(9999))), values(words))


@pytest.mark.parametrize("examples", MORE)
def test_any_answer_about_a_model_is_its_weights_or_an_error(examples):
    sound = {"shapes": [[3, 2], [2]], "config": len(CONFIG)}
    weights = bytes(4 * 8)

    def receive(content: bytes) -> None:
        channel = sandbox.Channel(io.BytesIO(content), io.BytesIO())
        with one_line():
            arrays = model_file._receive(channel, NETWORK)
            assert [array.shape for array in arrays] == [(3, 2), (2,)]
            assert all(np.isfinite(array).all() for array in arrays)

    def configured(config: object) -> None:
        text = json.dumps(config).encode()
        receive(message({**sound, "config": len(text)}, text + weights))

    words = ["config", "layers", "class_name", "Dense", "units", "shapes", "error"]
    fuzz(examples, receive, damaged([message(sound, CONFIG.encode() + weights)]))
    fuzz(examples, lambda header: receive(message(header, bytes(9999))), values(words))
    fuzz(examples, configured, values(words))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    image.save(content := io.BytesIO(), kind, **options)
    return content.getvalue()


def each_format(longest: int) -> list[bytes]:
    """Returns a digit in each format that can be read and written here."""
    picture = Image.fromarray(foreign.draw(7, "felt-tip", np.random.default_rng(0)))
    picture = picture.resize((longest, longest * picture.height // picture.width))
    kinds = pictures._formats()
    return [
        encoded(picture.convert(mode), kind, **options)
        for kind, mode, options in (
            ("PNG", "RGBA", {}),
            ("PNG", "P", {}),
            ("JPEG", "L", {}),
            ("JPEG", "CMYK", {"progressive": True}),
            ("MPO", "RGB", {}),
            ("GIF", "L", {}),
            ("BMP", "RGB", {}),
            ("TIFF", "L", {"compression": "tiff_lzw"}),
            ("TIFF", "RGB", {"compression": "jpeg"}),
            ("WEBP", "RGB", {}),
            ("WEBP", "RGBA", {"lossless": True}),
            ("AVIF", "RGB", {"speed": 10}),
            ("HEIF", "RGB", {}),
        )
        if kind in kinds and kind in Image.SAVE
    ]


def test_restricted_processes_read_each_format_as_this_one_does():
    contents = each_format(1200)  # Of which decoders of AVIF and HEIC make threads' work.
    assert len(contents) >= 11
    with decoders.start(1) as decode:
        for content in contents:
            expected = pictures.open_image(io.BytesIO(content))
            picture, [digit] = decode(content, "a", "one").result()
            np.testing.assert_array_equal(picture, expected)
            [found] = segmentation.find(expected)
            np.testing.assert_array_equal(digit.pixels, found.pixels)


@pytest.mark.parametrize("examples", MORE)
def test_any_picture_is_read_or_named(examples):
    with decoders.start(1) as decode:

        def read(content: bytes) -> None:
            with one_line():
                decode(content, "a", "many").result()

        fuzz(examples, read, damaged(each_format(40)))


@pytest.mark.parametrize("examples", [5, pytest.param(100, marks=pytest.mark.full)])
def test_any_model_is_read_or_refused(tmp_path, examples):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = CONFIG
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = np.array([b"dense"])
        layer = group.create_group("dense")
        layer.attrs["weight_names"] = ["w", "b"]
        layer["w"], layer["b"] = np.ones((3, 2), np.float32), np.ones(2)
    corpus = [path.read_bytes()]

    def read(content: bytes) -> list[np.ndarray]:
        path.write_bytes(content)
        with sandbox.Child(model_file.MODULE, path) as child, child.deadline(60):
            return model_file._receive(child, NETWORK)

    def read_or_refuse(content: bytes) -> None:
        with one_line():
            read(content)

    assert read(corpus[0])[1].tolist() == [1, 1]
    fuzz(examples, read_or_refuse, damaged(corpus))
