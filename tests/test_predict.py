"""The command as a user runs it; its answers are Keras' own."""

import json
import re
import shutil

import foreign
import numpy as np
import pytest
from PIL import Image

from trainer import cli, predict
from trainer.errors import UsageError
from trainer.inference import pictures, segmentation


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
    import keras

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
