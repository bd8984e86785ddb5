"""The command as a user runs it, on a model of a run that is as small as one can be."""

import json

import numpy as np
import pytest
from support import Command, save_npz


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with what a run leaves."""
    folder = tmp_path_factory.mktemp("run")
    done = Command(folder, folder).run(
        "--epochs",
        1,
        "--train-limit",
        512,
        "--test-limit",
        300,
        "--no-report",
        "--output-dir",
        folder,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def measure(command, folder):
    command.program = ["-m", "trainer.evaluate", folder / "mnist.h5"]
    return command


@pytest.mark.full
def test_it_measures_what_training_measured(measure, folder):
    metrics = json.loads((folder / "mnist.json").read_text())["metrics"]
    done = measure.run("--test-limit", 300, "--json", "--batch-size", 77)
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said["accuracy"] == metrics["val_accuracy"]
    assert said["loss"] == pytest.approx(metrics["val_loss"], rel=1e-5)
    assert (said["data"], said["examples"]) == ("bundled", 300)
    confusion = np.array(said["confusion"])
    assert confusion.shape == (10, 10)
    assert confusion.trace() == pytest.approx(300 * said["accuracy"])
    assert [digit["digit"] for digit in said["digits"]] == list(range(10))
    assert [digit["examples"] for digit in said["digits"]] == confusion.sum(axis=1).tolist()
    assert 0 <= said["expected_calibration_error"] <= 1

    # And the tables say the same.
    lines = measure.run("--test-limit", 300).stdout.splitlines()
    assert lines[0] == f"{folder / 'mnist.h5'} on 300 test images (bundled)"
    assert lines[1].startswith(f"accuracy {said['accuracy']:.2%} (")
    assert lines[1].endswith(
        f"loss {said['loss']:.4f}, expected calibration error "
        f"{said['expected_calibration_error']:.4f}"
    )
    table = [line.split() for line in lines[4:14]]
    assert [row[:2] for row in table] == [
        [str(digit["digit"]), str(digit["examples"])] for digit in said["digits"]
    ]
    matrix = [line.replace(".", "0").split()[1:] for line in lines[-10:]]
    np.testing.assert_array_equal(np.array(matrix, int), confusion)
    assert len({len(line) for line in lines[-11:]}) == 1  # aligned


@pytest.mark.full
def test_other_data_is_measured_as_well(measure, tmp_path):
    save_npz(tmp_path / "noise.npz", test=30)
    done = measure.run("--data", "noise.npz", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert (said["examples"], said["data"]) == (30, "noise.npz")
    assert [digit["examples"] for digit in said["digits"]] == [3] * 10


@pytest.mark.parametrize(
    ("flags", "code", "part"),
    [
        ([], 2, "required"),
        (["mnist.h5", "--test-limit", "0"], 2, "Received: test_limit=0"),
        (["mnist.h5", "--batch-size", "-1"], 2, "Received: batch_size=-1"),
        (["mnist.h5", "--test-limit", "10001"], 2, "at most the 10000 examples"),
        (["mnist.h5", "--data", "nowhere.npz"], 66, "nowhere.npz"),
        (["mnist.h5", "--data", "damaged.npz"], 65, "Fetch or make it again"),
        pytest.param(["nowhere.h5"], 66, "nowhere.h5", marks=pytest.mark.full),
        pytest.param(["damaged.npz"], 65, "damaged.npz", marks=pytest.mark.full),
    ],
)
def test_what_is_wrong_is_one_line(command, tmp_path, flags, code, part):
    save_npz(tmp_path / "damaged.npz")
    (tmp_path / "damaged.npz").write_bytes((tmp_path / "damaged.npz").read_bytes()[:-1])
    command.program = ["-m", "trainer.evaluate"]
    done = command.run(*flags)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("python -m trainer.evaluate: error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert part in done.stderr
