"""The command as a user runs it; its answers are Keras' own."""

import json
import re
import shutil
from pathlib import Path

import foreign
import numpy as np
import pytest
from PIL import Image
from support import COLOURS, paint

from trainer import cli, predict
from trainer.data import sources
from trainer.errors import UsageError
from trainer.inference import pictures, segmentation
from trainer.runtime import keras, tf


@pytest.fixture
def model(weak_model_file):
    return weak_model_file


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with a picture of each digit, 0.png to 9.png."""
    digits = tmp_path_factory.mktemp("pictures")
    for digit in range(10):
        picture = foreign.draw(digit, "felt-tip", np.random.default_rng(digit))
        Image.fromarray(picture).save(digits / f"{digit}.png")
    (digits / "notes.txt").write_text("no picture, and not named as one")
    return digits


@pytest.fixture
def ask(command, model):
    command.program = ["-m", "trainer.predict", model]
    return command


def expected(model, paths) -> np.ndarray:
    """Says what stock Keras makes of the pictures."""
    seen = np.stack([segmentation.find(pictures.open_image(path))[0].pixels for path in paths])
    return keras.models.load_model(model).predict(seen[..., None] / 255.0, verbose=0)


def test_each_line_has_file_digit_and_probability(ask, model, digits):
    paths = sorted(digits.glob("*.png"))
    answers = expected(model, paths)
    threshold = np.sort(answers.max(axis=1))[4:6].mean()  # It is unsure of half of them.
    done = ask.run(digits, "--threshold", threshold)
    assert (done.returncode, done.stderr) == (0, "")
    for line, path, said in zip(done.stdout.splitlines(), paths, answers, strict=True):
        doubt = "  unsure" if said.max() < threshold else ""
        assert line == f"{path}  {said.argmax()}  {said.max():.1%}{doubt}"
    assert done.stdout.count("unsure") == 5


@pytest.mark.full
def test_json_has_all_of_it(ask, model, digits):
    done = ask.run(digits / "3.png", digits / "nowhere.png", "--json", "--threshold", 1)
    assert done.returncode == 66
    first, second = map(json.loads, done.stdout.splitlines())
    [said] = expected(model, [digits / "3.png"])
    [digit] = first["digits"]
    assert first["file"] == str(digits / "3.png")
    assert digit["digit"] == said.argmax()
    assert digit["probability"] == pytest.approx(said.max(), abs=1e-5)
    assert digit["unsure"]  # Nothing is sure enough for 1, but what is rounded to it.
    [seen] = segmentation.find(pictures.open_image(digits / "3.png"))
    assert tuple(digit["box"]) == seen.box
    assert second["code"] == 66
    assert second["error"].startswith(f"Expected an image at {digits / 'nowhere.png'}. Received:")


@pytest.mark.full
def test_many_digits_are_shown_as_the_model_saw_them(ask, model, digits, tmp_path):
    row = [np.asarray(Image.open(digits / f"{digit}.png")) for digit in (4, 0, 7)]
    Image.fromarray(np.concatenate(row, axis=1)).save(tmp_path / "407.png")
    done = ask.run("407.png", "--digits", "many", "--show", "seen/here")
    assert (done.returncode, done.stderr) == (0, "")
    said = expected(model, [digits / f"{digit}.png" for digit in (4, 0, 7)])
    found = re.findall(r"^407\.png  (\d)  [\d.]+%", done.stdout, re.MULTILINE)
    assert found == [str(p.argmax()) for p in said]
    [shown] = (tmp_path / "seen" / "here").iterdir()
    assert shown.name == "0001-407.png"
    sheet = np.asarray(Image.open(shown).convert("L"))
    seen = segmentation.find(pictures.open_image(tmp_path / "407.png"), digits="many")[2]
    enlarged = np.kron(seen.pixels, np.ones((8, 8), np.uint8))
    # Beside the original, under the first of the two above it.
    assert np.array_equal(sheet[248:472, 456:680], enlarged)


@pytest.mark.full
def test_what_cannot_be_read_is_named_and_the_others_go_on(ask, digits, tmp_path):
    shutil.copy(digits / "1.png", tmp_path / "good [1].png")
    content = (digits / "2.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (100, 100), 255).save(tmp_path / "blank.png")
    (tmp_path / "empty").mkdir()
    names = ("cut.png", "text.png", "blank.png", "empty", "*.tiff", "good [1].png", "g*.png")
    done = ask.run(*names)
    assert done.returncode == 65  # that of the first
    assert [line.split("  ")[0] for line in done.stdout.splitlines()] == ["good [1].png"] * 2
    *lines, last = done.stderr.splitlines()
    for line, words in zip(
        lines,
        (
            "an image at cut.png. Received: a truncated or damaged file",
            "an image at text.png. Received: a file that is none of PNG",
            "a digit in blank.png. Received: a blank picture, without ink",
            "an image at empty. Received: a folder without images",
            "an image at *.tiff. Received: No such file or directory",
        ),
        strict=True,
    ):
        assert line.startswith(f"python -m trainer.predict: error: Expected {words}")
    assert "all of 7 pictures. Received: 5 without" in last


@pytest.mark.full
def test_a_picture_comes_on_standard_input(ask, model, digits):
    with (digits / "8.png").open("rb") as stdin:
        done = ask.run("-", stdin=stdin)
    [said] = expected(model, [digits / "8.png"])
    assert done.stdout.startswith(f"standard input  {said.argmax()}  {said.max():.1%}")
    assert done.returncode == 0


@pytest.mark.full
def test_one_picture_without_a_digit_is_one_line(ask, tmp_path):
    Image.new("L", (100, 100), 255).save(tmp_path / "a\n\x1b[1mb.png")
    done = ask.run(tmp_path)
    assert (done.returncode, done.stdout) == (65, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.strip().isprintable()
    assert r"a\n\x1b[1mb.png" in done.stderr


@pytest.mark.full
def test_a_reader_that_has_enough_is_no_error(ask, digits):
    program = [*ask.argv(*[digits] * 200)]
    ask.prefix, ask.program = ["bash", "-c", '"$@" | head -1; exit ${PIPESTATUS[0]}', "bash"], []
    done = ask.run(*program[1:])
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (141, 1, "")


@pytest.mark.full
def test_a_folder_that_cannot_be_written_is_73(ask, digits, tmp_path):
    (tmp_path / "taken").write_text("")
    done = ask.run(digits / "1.png", "--show", "taken")
    assert (done.returncode, done.stderr.count("\n")) == (73, 1)
    assert "Expected to write to taken. Received: File exists" in done.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["m.h5"], "Expected at least one image."),
        (["m.h5", "a.png", "--threshold", "90"], "threshold must lie between 0 and 1."),
        (["m.h5", "a.png", "--threads", "0"], "threads must be a whole number of at least 1."),
        (["m.h5", "a.png", "--digits", "two"], "'two'"),
    ],
)
def test_a_wrong_flag_is_one_line(argv, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        cli.parse(predict.PROG, predict.PredictConfig, argv)


@pytest.mark.full
def test_a_missing_model_ends_it_whatever_the_pictures_are(command, digits):
    command.program = ["-m", "trainer.predict"]
    done = command.run("nowhere.h5", digits)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (66, "", 1)
    assert "nowhere.h5" in done.stderr


# -- whole pictures


@pytest.fixture
def ask_colours(command, colour_run):
    command.program = ["-m", "trainer.predict", colour_run / "run" / "model.keras"]
    return command


def test_a_model_of_other_images_classifies_whole_pictures(ask_colours, colour_run):
    folders = [colour_run / "test" / name for name in COLOURS]
    (ask_colours.folder / "cut.png").write_bytes((folders[0] / "0.png").read_bytes()[:99])
    paint("red", np.random.default_rng(7), (300, 500)).save(ask_colours.folder / "large.jpg")
    done = ask_colours.run(*folders, "cut.png", "large.jpg", "--json")
    assert done.returncode == 65
    *answers, cut, large = map(json.loads, done.stdout.splitlines())
    assert cut["code"] == 65
    assert large["class"] == "red"
    # Of Keras' own, of the pictures as they were trained on.
    model = keras.saving.load_model(colour_run / "run" / "model.keras")
    data = sources.load(str(colour_run), image_size=(20, 24)).test
    [(x, _)] = data.batches(np.arange(9), 9)
    expected = model.predict(x, verbose=0)
    assert [answer["file"] for answer in answers] == [str(file.path) for file in data.files]
    for answer, probabilities in zip(answers, expected, strict=True):
        assert list(answer["probabilities"]) == list(COLOURS)
        # Pillow's pixels and TensorFlow's differ by one at most.
        np.testing.assert_allclose(list(answer["probabilities"].values()), probabilities, atol=0.02)
        assert answer["class"] == list(COLOURS)[probabilities.argmax()]
        assert answer["probability"] == max(answer["probabilities"].values())


@pytest.mark.full
def test_each_line_has_the_class(ask_colours, colour_run):
    done = ask_colours.run(colour_run / "test" / "red" / "0.png", "--threshold", 0)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"\S+0\.png  red  \d+\.\d%\n", done.stdout)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("model.keras", {"digits": "many"}, "digits is for an mnist.h5. Received: digits='many'"),
        ("model.keras", {"show": Path("seen")}, "show is for an mnist.h5. Received: show='seen'"),
        ("mnist.h5", {"network": "a:b"}, "network is for a model.keras. Received: network='a:b'"),
    ],
)
def test_what_a_model_cannot_do_is_refused(model, options, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        predict.PredictConfig(model=Path(model), images=("a.png",), **options)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_a_whole_picture_is_as_the_training_read_it(tmp_path, channels, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    picture = Image.fromarray(pixels).resize((60, 40))
    if mode == "I;16":
        picture = Image.fromarray(np.uint16(pixels[..., 0]) * 256 + 77)
    elif mode != "RGB":
        picture = picture.convert(mode)
    picture.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    read = tf.image.decode_image(content, channels, expand_animations=False)
    whole = pictures.open_whole(tmp_path / "a.png", (40, 60, channels))
    # Grey of colours is weighted by other whole numbers.
    assert np.abs(np.int32(whole) - np.int32(read)).max() <= (channels == 1)
    small = pictures.open_whole(tmp_path / "a.png", (15, 20, channels))
    resized = tf.image.resize(read, (15, 20), antialias=True)
    assert np.abs(small - resized.numpy()).max() <= 2
