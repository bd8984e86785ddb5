"""The good path of reading a model, and what is said of a file that is missing or another kind."""

import os
import re
import subprocess
import sys

import h5py
import numpy as np
import pytest

from trainer.errors import DataError, InputError
from trainer.inference import model_file as saved
from trainer.training import artifacts as output


@pytest.fixture(scope="module")
def cnn(mnist):
    """A network with an optimizer that has a state."""
    from trainer.models import cnn as model

    cnn = model.build(optimizer="adam", learning_rate=0.001, seed=7)
    images = mnist.x_train[:64, ..., np.newaxis].astype("float32") / 255
    cnn.fit(images, np.eye(10)[mnist.y_train[:64]], verbose=0)
    return cnn


@pytest.fixture(scope="module")
def files(cnn, tmp_path_factory):
    """The same weights in each kind of file that Keras or this package writes as HDF5."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "mnist.h5").write_bytes(output._hdf5(cnn))
    cnn.save(folder / "keras.h5")  # With the optimizer's state.
    cnn.save_weights(folder / "x.weights.h5")
    return folder


@pytest.mark.parametrize("name", ["mnist.h5", "keras.h5"])
def test_the_weights_are_the_files_bit_for_bit(cnn, files, name):
    loaded = saved.load(files / name)
    assert output.weights_sha256(loaded) == output.weights_sha256(cnn)
    assert loaded.optimizer is not None  # It can be evaluated, and training goes on.


def test_it_predicts_what_keras_predicts(files, mnist):
    from trainer.runtime import keras

    images = mnist.x_test[:20, ..., np.newaxis].astype("float32") / 255
    expected = keras.models.load_model(files / "mnist.h5").predict(images, verbose=0)
    np.testing.assert_allclose(
        saved.load(files / "mnist.h5").predict(images, verbose=0), expected, rtol=0, atol=1e-6
    )


def test_weights_of_float64_are_read_as_float32(cnn, files, tmp_path):
    (tmp_path / "x.h5").write_bytes((files / "mnist.h5").read_bytes())
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        paths = []
        file["model_weights"].visititems(
            lambda path, item: paths.append(path) if isinstance(item, h5py.Dataset) else None
        )
        for path in paths:
            values = file["model_weights"][path][()]
            del file["model_weights"][path]
            file["model_weights"][path] = values.astype("float64")
    assert len(paths) == 8
    assert output.weights_sha256(saved.load(tmp_path / "x.h5")) == output.weights_sha256(cnn)


def test_weights_alone_are_another_layout(files):
    with pytest.raises(DataError, match="without the weights of a Keras model") as caught:
        saved.load(files / "x.weights.h5")
    assert "\n" not in str(caught.value)


def test_what_is_missing_or_no_file_is_an_input_error(tmp_path):
    for path, received in ((tmp_path / "no.h5", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=rf"{re.escape(str(path))}\. Received: {received}"):
            saved.load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes.")
def test_a_pipe_that_nobody_writes_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.h5")
    with pytest.raises(InputError, match="a pipe"):
        saved.load(tmp_path / "pipe.h5")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_a_file_without_permission_is_an_input_error(files, tmp_path):
    path = tmp_path / "closed.h5"
    path.write_bytes((files / "mnist.h5").read_bytes())
    path.chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        saved.load(path)


def test_a_file_that_takes_too_long_is_given_up(files, monkeypatch):
    monkeypatch.setattr(saved, "DEADLINE", 0.001)
    with pytest.raises(DataError, match=re.escape("one that takes more than 0.001 s")):
        saved.load(files / "mnist.h5")


def test_a_crash_of_the_reader_is_one_line(files, monkeypatch):
    started = saved._start

    def crash(path):
        process = started(path)
        process.kill()
        return process

    monkeypatch.setattr(saved, "_start", crash)
    with pytest.raises(DataError, match="damaged: reading it crashed"):
        saved.load(files / "mnist.h5")


def test_reading_imports_nothing_from_the_folder(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h5py.py").write_text("raise SystemExit(3)")
    reading = subprocess.run(
        [
            sys.executable,
            "-P",
            saved.__file__.replace("model_file.py", "read_hdf5.py"),
            files / "mnist.h5",
        ],
        capture_output=True,
        check=False,
    )
    assert (reading.returncode, reading.stderr) == (0, b"")
