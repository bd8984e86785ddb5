"""The report's page and charts: what they show, and that they change nothing else."""

import base64
import io
import json
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from support import TIMEOUT, Pause, save_npz

from trainer.files import FILES
from trainer.reporting import charts, html, scores

HOSTILE = '<script>alert("1")</script> & $title'
DIGITS = list("0123456789")
HISTORY = {
    "loss": [0.5, 0.25],
    "accuracy": [0.8, 0.9],
    "val_loss": [0.4, 0.3],
    "val_accuracy": [0.85, 0.9],
    "seconds": [12.0, 8.0],
}
MANIFEST = {
    "model": {
        "file": "mnist.h5",
        "bytes": 9_553_528,
        "sha256": "a1" * 32,
        "parameters": 2_380_938,
        "weights_sha256": "b2" * 32,
    },
    "run": "c3" * 16,
    "job": None,
    "config": {
        "data": HOSTILE,
        "optimizer": "adadelta",
        "learning_rate": 0.25,
        "schedule": "constant",
        "batch_size": 96,
        "seed": 41,
        "train_limit": None,
    },
    "data": {"source": HOSTILE, "sha256": "d4" * 32, "train_examples": 600, "test_examples": 40},
    "versions": {"digits-trainer": "0.1.0", "tensorflow": "2.21.9"},
    "environment": {"processor": "An & Other", "threads": 3},
    "metrics": {"loss": 0.25, "accuracy": 0.9, "val_loss": 0.3125, "val_accuracy": 0.9},
    "seconds": 83.2,
}
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Reads a page; an element that is not closed where it should be fails."""

    def __init__(self, content):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def digits(mnist):
    """Images, labels, and probabilities of which four of forty are wrong."""
    labels = mnist.y_test[:40]
    predicted = labels.copy()
    predicted[:4] = (predicted[:4] + 1) % 10
    return mnist.x_test[:40], labels, np.eye(10)[predicted] * 0.7 + 0.03


@pytest.fixture(scope="module")
def report(digits):
    images, labels, probabilities = digits
    return html.render(
        MANIFEST,
        HISTORY,
        images=images,
        labels=labels,
        probabilities=probabilities,
        classes=DIGITS,
    )


@pytest.fixture(scope="module")
def shown(report):
    return Page(report.page.decode())


def test_the_page_says_what_the_manifest_says(shown, report):
    for figure in (
        "mnist.h5: 90.00% test accuracy",
        "90.00%",  # as val_accuracy
        "4 of 40 wrong",
        "0.3125",
        "20s",
        "2 epochs of 10.0 s",
        "60",  # 600 images in 10 s
        "9.6 MB",
        "2,380,938 parameters",
        *("a1" * 32, "b2" * 32, "d4" * 32, "c3" * 16),
        *("--learning-rate", "0.25", "--batch-size", "96", "--seed", "41", "--train-limit"),
        *("2.21.9", "An & Other"),
        "1m 23s",
    ):
        assert figure in shown.text, figure
    assert shown.all("title")


def test_the_page_loads_nothing_and_runs_no_script(shown, report):
    content = report.page.decode()
    assert not {tag for tag, _ in shown.elements} & {"script", "link", "iframe", "object", "base"}
    assert "url(" not in content
    assert "@import" not in content
    for _, attributes in shown.elements:
        assert not {"href", "srcset", "action"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
    policy = next(m for m in shown.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none';")


def test_names_from_the_manifest_are_escaped(shown, report):
    assert HOSTILE in shown.text
    assert shown.all("script") == []
    assert b"alert(&quot;1&quot;)" in report.page


def test_each_picture_is_there_and_described(shown, report):
    from PIL import Image

    pictures = shown.all("img")
    assert len(pictures) == 5
    contents = [base64.b64decode(picture["src"].split(",")[1]) for picture in pictures]
    assert contents[0] == report.curves
    for picture, content in zip(pictures, contents, strict=True):
        with Image.open(io.BytesIO(content)) as image:
            assert image.format == "PNG"
            assert image.size == (2 * int(picture["width"]), 2 * int(picture["height"]))
            assert image.size[0] <= 1920
        assert len(picture["alt"]) > 50
    assert len({picture["alt"] for picture in pictures}) == 5


def test_the_drawing_can_be_stopped_after_each_chart(digits):
    images, labels, probabilities = digits

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        html.render(
            MANIFEST,
            HISTORY,
            images=images,
            labels=labels,
            probabilities=probabilities,
            classes=DIGITS,
            after_picture=stop,
        )


def test_a_model_without_mistakes_has_a_page_too(digits):
    images, labels, _ = digits
    history = {name: values[:1] for name, values in HISTORY.items()}
    report = html.render(
        MANIFEST,
        history,
        images=images[:1],
        labels=labels[:1],
        probabilities=np.eye(10, dtype=np.float32)[labels[:1]],
        classes=DIGITS,
    )
    text = Page(report.page.decode()).text
    assert "0 of 1 wrong" in text
    assert "1 epoch of 12.0 s" in text


@pytest.mark.parametrize(
    ("taken", "sentence"),
    [
        ([], ""),
        ([(4, 9)], "Most often a 4 as a 9, once."),
        ([(4, 9), (6, 0), (4, 9)], "Most often a 4 as a 9, 2 times."),
        ([(6, 0), (4, 9)], "Most often a 4 as a 9 and a 6 as a 0, once each."),
        ([(6, 0), (4, 9), (1, 7), (7, 1)], ""),  # None stands out.
    ],
)
def test_the_commonest_mistakes_are_named(taken, sentence):
    true, predicted = np.array([(3, 3), *taken]).T
    judged = html._Judged(MANIFEST, HISTORY, DIGITS)
    assert html._commonest(scores.score(true, np.eye(10)[predicted]), judged) == sentence


def test_one_epoch_has_one_tick_and_points_that_show():
    figure = charts.curves({name: values[:1] for name, values in HISTORY.items()})
    for axes, name in zip(figure.axes, ("loss", "accuracy"), strict=True):
        assert [tick for tick in axes.get_xticks() if 0.5 <= tick <= 1.5] == [1]
        training, test = axes.lines
        assert training.get_xydata().tolist() == [[1, HISTORY[name][0]]]
        assert test.get_xydata().tolist() == [[1, HISTORY[f"val_{name}"][0]]]
        assert training.get_markersize() > 4


def test_the_epochs_ticks_are_whole_numbers():
    for epochs in (2, 3, 10, 47, 1000):
        history = {name: np.linspace(0.5, 0.9, epochs) for name in HISTORY}
        ticks = charts.curves(history).axes[0].get_xticks()
        assert all(tick == int(tick) for tick in ticks)


def test_the_matrix_shows_every_number_and_colours_the_mistakes(digits):
    _, labels, probabilities = digits
    matrix = scores.score(labels, probabilities).confusion
    axes = charts.confusion(1000 * matrix, DIGITS).axes[0]
    texts = {(text.get_position()): text.get_text() for text in axes.texts}
    for (row, column), count in np.ndenumerate(1000 * matrix):
        assert texts[column, row] == (f"{count:,}" if count else "·")
    shown = axes.collections[0].get_array()
    assert shown.mask.diagonal().all()
    assert shown.max() == 1000 * (matrix - np.diag(matrix.diagonal())).max()


def test_a_mistake_shows_its_predicted_and_its_true_digit(digits):
    images, labels, probabilities = digits
    worst = scores.score(labels, probabilities).worst
    axes = charts.mistakes(images, labels, probabilities, worst, DIGITS).axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert texts[:2] == [f"{(labels[0] + 1) % 10}  73.0%", f"is {labels[0]}   #0"]
    assert len(axes.images) == len(worst) == 4
    np.testing.assert_array_equal(axes.images[3].get_array(), images[3])


DRAW = """
import sys
from trainer.reporting import charts
history = {name: [0.5, 0.25] for name in ("loss", "accuracy", "val_loss", "val_accuracy")}
sys.stdout.buffer.write(charts.png(charts.curves(history)))
"""
WATCHED = f"""
import logging
import matplotlib
before = dict(matplotlib.rcParams)
{DRAW}
assert dict(matplotlib.rcParams) == before
assert "matplotlib.pyplot" not in sys.modules
assert logging.getLogger("matplotlib").level == logging.NOTSET
"""


def run_alone(command, program):
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=command.folder,
        env=command.env,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr.decode()) == (0, "")
    return done.stdout


def test_a_matplotlibrc_changes_no_chart_and_a_chart_changes_no_setting(command):
    command.env["MPLBACKEND"] = "svg"  # another backend than the one used
    expected = run_alone(command, DRAW)
    (command.folder / "matplotlibrc").write_text(
        "text.usetex: True\nsavefig.facecolor: black\nfont.size: 40\naxes.grid: True\n"
    )
    assert run_alone(command, WATCHED) == expected


def test_charts_are_drawn_where_home_is_read_only(command):
    for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        command.env.pop(name, None)
    expected = run_alone(command, DRAW)
    command.env |= {"HOME": "/proc/nowhere", "TMPDIR": str(command.folder)}
    assert run_alone(command, DRAW) == expected
    assert list(command.folder.iterdir()) == []  # The temporary cache is removed.


SMALL = ("--epochs", 1, "--train-limit", 256, "--test-limit", 100)


@pytest.mark.full
def test_a_run_without_matplotlib_succeeds_with_a_notice(command, tmp_path):
    (tmp_path / "empty" / "matplotlib").mkdir(parents=True)
    (tmp_path / "empty" / "matplotlib" / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'matplotlib'\", name='matplotlib')"
    )
    command.env["PYTHONPATH"] += f":{tmp_path / 'empty'}"
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("of an earlier run of digits-trainer")
    done = command.run(*SMALL, "--output-dir", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        "\nNo report.html: No module named 'matplotlib' (pip install matplotlib). "
        "mnist.h5 is complete.\ntest accuracy "
    ) in done.stdout
    assert {path.name for path in out.iterdir()} == set(FILES)


@pytest.mark.full
def test_a_report_that_cannot_be_written_changes_no_exit_code(command, tmp_path):
    pause = Pause(folder=tmp_path / "pause", calling="trainer.reporting.html:render")
    run = command.start(*SMALL, "--output-dir", "out", hooks=[pause])
    pause.wait(run)
    (tmp_path / "out" / "report.html").mkdir()
    pause.go()
    stdout, stderr = run.communicate(timeout=TIMEOUT)
    assert (run.returncode, stderr) == (0, "")
    assert "No report.html: Expected a folder that can be written at out. Received: " in stdout
    assert "test accuracy" in stdout
    (tmp_path / "out" / "report.html").rmdir()
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)


@pytest.mark.full
def test_the_page_describes_the_run_in_its_folder(command, tmp_path):
    path = save_npz(tmp_path / "digits <&>.npz")
    done = command.run("--epochs", 2, "--batch-size", 20, "--data", path, "--output-dir", "out")
    assert (done.returncode, done.stderr) == (0, "")
    manifest = json.loads((tmp_path / "out" / "mnist.json").read_text())
    text = Page((tmp_path / "out" / "report.html").read_text()).text
    assert f"{manifest['metrics']['val_accuracy']:.2%}" in text
    assert f"{manifest['metrics']['val_loss']:.4f}" in text
    assert manifest["model"]["sha256"] in text
    assert str(path) in text


def test_a_name_that_no_encoding_has_is_in_the_page_with_backslashes(digits):
    images, labels, probabilities = digits
    manifest = {**MANIFEST, "data": {**MANIFEST["data"], "source": "digits\udcff.npz"}}
    report = html.render(
        manifest,
        HISTORY,
        images=images,
        labels=labels,
        probabilities=probabilities,
        classes=DIGITS,
    )
    assert rb"digits\udcff.npz" in report.page
