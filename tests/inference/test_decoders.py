"""Pictures that are decoded in other processes, and what is made of answers that are none."""

import io
import json
import os
import pickle
import re

import foreign
import numpy as np
import pytest
from PIL import Image

from trainer.errors import DataError, InputError
from trainer.inference import decoders, pictures, sandbox, segmentation

# Runs in place of the decoders: reads a request and answers with the bytes of a file; or, where
# there is none, never.
FAKE = """
import os, sys, threading
if os.path.exists("answer"):
    sys.stdin.buffer.read(1)
    with open("answer", "rb") as file:
        sys.stdout.buffer.write(file.read())
    sys.stdout.buffer.flush()
threading.Event().wait()
"""


def message(header: object, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(4, "big") + text + payload


def answer(shape=(4, 6), box=(0, 0, 6, 4), digits: int = 1, **other) -> dict:
    """Returns the header of an answer; by default one that is right."""
    return {"shape": shape, "digits": [{"box": box, "several": False}] * digits, **other}


CRASHED = "Expected an image at a. Received: a damaged file: reading it crashed. Leave it out."
PAYLOAD = bytes(range(24)) + bytes(28 * 28)


def seven() -> bytes:
    picture = Image.fromarray(foreign.draw(7, "felt-tip", np.random.default_rng(0)))
    picture.save(content := io.BytesIO(), "PNG")
    return content.getvalue()


class Marks:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("marked",)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Runs a program that answers with what is in a file in place of the decoders."""
    (tmp_path / "fake_decoder.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(decoders, "MODULE", "fake_decoder")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "answer"


def test_the_picture_and_its_digits_are_those_of_this_process(tmp_path):
    (tmp_path / "7.png").write_bytes(seven())
    expected = pictures.open_image(tmp_path / "7.png")
    [digit] = segmentation.find(expected)
    with decoders.start(2) as decode:
        futures = [decode(source, "7", "one") for source in (tmp_path / "7.png", seven())]
        for future in futures:
            picture, [found] = future.result()
            np.testing.assert_array_equal(picture, expected, strict=True)
            np.testing.assert_array_equal(found.pixels, digit.pixels, strict=True)
            assert (found.box, found.several) == (digit.box, digit.several)


def test_errors_of_a_picture_are_raised_here(tmp_path):
    with decoders.start(1) as decode:
        with pytest.raises(InputError, match=r"at 7\.png\. Received: No such file"):
            decode(tmp_path / "nowhere.png", "7.png", "one").result()
        with pytest.raises(DataError, match="none of PNG"):
            decode(b"no picture", "7.png", "one").result()
        # A name with a control character is escaped, whoever's sentence it stands in.
        with pytest.raises(DataError, match=r"at '\\x1b\[31m'\. Received: an empty file"):
            decode(b"", "\x1b[31m", "one").result()
        assert len(decode(seven(), "7.png", "many").result()[1]) == 1


def test_an_answer_in_the_right_form_is_taken(fake):
    fake.write_bytes(message(answer(), PAYLOAD))
    with decoders.start(1) as decode:
        picture, [digit] = decode(b"", "a", "one").result()
    assert picture.tobytes() == PAYLOAD[:24]
    assert (digit.box, digit.several, digit.pixels.shape) == ((0, 0, 6, 4), False, (28, 28))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(pickle.dumps(Marks()), id="pickle"),
        pytest.param(message(pickle.dumps(Marks())), id="pickle in a message"),
        pytest.param(message(answer(), PAYLOAD[:24] + pickle.dumps(Marks())), id="pickled pixels"),
        pytest.param(b"\xff\xff\xff\xff" + bytes(99), id="4 GiB of JSON"),
        pytest.param(message(b"[" * 100_000), id="deep JSON"),
        pytest.param(message(answer())[:-4], id="truncated JSON"),
        pytest.param(message(json.dumps(answer()).encode()[:-4]), id="incomplete JSON"),
        pytest.param(message(b"\xff\xfe{}"), id="no UTF-8"),
        pytest.param(message(b"9" * 5000), id="a long number"),
        pytest.param(message([]), id="no object"),
        pytest.param(message({}), id="empty object"),
        pytest.param(np.random.default_rng(0).bytes(4096), id="random bytes"),
        pytest.param(b"", id="nothing"),
        pytest.param(message(answer(shape=(641, 6)), PAYLOAD), id="too large"),
        pytest.param(message(answer(shape=(0, 6)), PAYLOAD), id="no pixels"),
        pytest.param(message(answer(shape=(4, -6)), PAYLOAD), id="negative"),
        pytest.param(message(answer(shape=(4, 6, 1)), PAYLOAD), id="three dimensions"),
        pytest.param(message(answer(shape=(4.0, 6.0)), PAYLOAD), id="floats"),
        pytest.param(message(answer(shape=(True, 6)), PAYLOAD), id="a boolean"),
        pytest.param(message(answer(shape="46"), PAYLOAD), id="a text"),
        pytest.param(message(answer(digits=0), PAYLOAD), id="no digits"),
        pytest.param(message(answer(digits=501), PAYLOAD + bytes(400_000)), id="501 digits"),
        pytest.param(message(answer(digits=2), PAYLOAD), id="pixels missing"),
        pytest.param(message(answer(box=(0, 0, 6)), PAYLOAD), id="three edges"),
        pytest.param(message(answer(box=(0, 0, 7, 4)), PAYLOAD), id="outside"),
        pytest.param(message(answer(box=(5, 0, 4, 4)), PAYLOAD), id="turned over"),
        pytest.param(message(answer(box=(0, 0, 2**70, 4)), PAYLOAD), id="a huge edge"),
        pytest.param(message({**answer(), "digits": [["box", "several"]]}, PAYLOAD), id="a list"),
        pytest.param(message({**answer(), "digits": [{"several": 1}]}, PAYLOAD), id="no box"),
        pytest.param(message(answer(error=[65, "both"]), PAYLOAD), id="answer and error"),
        pytest.param(message({"error": [70, "of another kind"]}), id="another exit code"),
        pytest.param(message({"error": ["65", "a text"]}), id="an exit code as text"),
        pytest.param(message({"error": [65, ["no text"]]}), id="an error without text"),
        pytest.param(message({"error": 65}), id="an error without a message"),
    ],
)
def test_any_other_answer_is_an_error_of_that_picture(fake, monkeypatch, content):
    # The program ends, as one that crashed, once it has answered.
    (fake.parent / "fake_decoder.py").write_text(FAKE.replace("threading.Event().wait()", ""))
    fake.write_bytes(content)
    with decoders.start(1) as decode:
        with pytest.raises(DataError, match=f"^{re.escape(CRASHED)}$"):
            decode(b"", "a", "one").result()
        # Another process has taken its place, and reads the next one.
        monkeypatch.setattr(decoders, "MODULE", "trainer.inference.decoders")
        assert len(decode(seven(), "b", "one").result()[1]) == 1
    assert not (fake.parent / "marked").exists()


def test_an_error_message_does_nothing_to_a_terminal(fake):
    fake.write_bytes(message({"error": [66, "\x1b]0;title\x07\nsecond line"]}))
    with decoders.start(1) as decode, pytest.raises(InputError) as raised:
        decode(b"", "a", "one").result()
    assert str(raised.value).isprintable()


def test_a_picture_that_takes_too_long_is_given_up(fake, monkeypatch):
    monkeypatch.setattr(decoders, "DEADLINE", 0.1)
    with decoders.start(1) as decode:  # There is no answer: the process hangs.
        with pytest.raises(
            DataError, match=r"at a\. Received: .* reading it takes more than 0.1 s"
        ):
            decode(b"", "a", "one").result()
        monkeypatch.setattr(decoders, "DEADLINE", 60.0)
        fake.write_bytes(message(answer(), PAYLOAD))
        assert len(decode(b"", "b", "one").result()[1]) == 1


def test_a_picture_whose_reading_crashes_is_named_and_the_next_read():
    decoder = decoders._Decoder()
    try:
        assert len(decoder.decode(seven(), "one.png", "one")[1]) == 1
        decoder._child._process.kill()
        with pytest.raises(DataError, match=r"at two.png\. Received: .* reading it crashed"):
            decoder.decode(seven(), "two.png", "one")
        assert len(decoder.decode(seven(), "three.png", "many")[1]) == 1
    finally:
        process = decoder._child._process
        decoder.end()
    assert process.poll() is not None


def test_a_child_that_prints_does_not_disturb_its_messages(fake):
    (fake.parent / "fake_decoder.py").write_text(
        "from trainer.inference import sandbox\n"
        "channel = sandbox.enter()\n"
        "print('a warning of a library', flush=True)\n"
        "channel.receive()\n"
        f"channel.send({answer()!r}, {PAYLOAD!r})\n"
    )
    with decoders.start(1) as decode:
        assert len(decode(b"", "a", "one").result()[1]) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no limits.")
def test_a_child_has_no_more_memory_than_it_is_allowed(fake):
    (fake.parent / "fake_decoder.py").write_text(
        "from trainer.errors import DataError\n"
        "from trainer.inference import sandbox\n"
        "channel = sandbox.enter(data=300_000_000)\n"
        "channel.receive()\n"
        "try:\n"
        "    bytes(400_000_000)\n"
        "except MemoryError:\n"
        "    channel.send_error(DataError('out of memory'))\n"
    )
    with decoders.start(1) as decode, pytest.raises(DataError, match="out of memory"):
        decode(b"", "a", "one").result()


def test_numbers_of_a_header_are_checked():
    assert sandbox.integers([]) == ()
    for value, options in (
        ([1], {"count": 2}),
        ([29], {"most": 28}),
        ([None], {}),
        (None, {}),
        ({"a": 1}, {}),
    ):
        with pytest.raises(sandbox.ProtocolError):
            sandbox.integers(value, **options)
