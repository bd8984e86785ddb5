"""The good path of reading a model, and what is said of a file that is missing or another kind."""

import json
import os
import pickle
import re
from pathlib import Path

import h5py
import numpy as np
import pytest

from trainer.errors import DataError, InputError
from trainer.inference import model_file
from trainer.training import artifacts
from trainer.training.artifacts import weights_sha256


class Marks:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("marked",)


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
    (folder / "mnist.h5").write_bytes(artifacts._hdf5(cnn))
    cnn.save(folder / "keras.h5")  # With the optimizer's state.
    cnn.save_weights(folder / "x.weights.h5")
    return folder


@pytest.mark.parametrize("name", ["mnist.h5", "keras.h5"])
def test_the_weights_are_the_files_bit_for_bit(cnn, files, name):
    loaded = model_file.load(files / name)
    assert weights_sha256(loaded) == weights_sha256(cnn)
    assert loaded.optimizer is not None  # It can be evaluated, and training goes on.


def test_it_predicts_what_keras_predicts(files, mnist):
    from trainer.runtime import keras

    images = mnist.x_test[:20, ..., np.newaxis].astype("float32") / 255
    expected = keras.models.load_model(files / "mnist.h5").predict(images, verbose=0)
    np.testing.assert_allclose(
        model_file.load(files / "mnist.h5").predict(images, verbose=0), expected, rtol=0, atol=1e-6
    )


def test_keras_global_dtype_policy_decides_nothing_about_the_model(cnn, files):
    from trainer.runtime import keras

    keras.config.set_dtype_policy("mixed_float16")
    try:
        loaded = model_file.load(files / "mnist.h5")
        assert keras.config.dtype_policy().name == "mixed_float16"
    finally:
        keras.config.set_dtype_policy("float32")
    assert {layer.dtype_policy.name for layer in loaded.layers} == {"float32"}


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
    assert weights_sha256(model_file.load(tmp_path / "x.h5")) == weights_sha256(cnn)


def test_weights_alone_are_another_layout(files):
    with pytest.raises(DataError, match="without the weights of a Keras model") as caught:
        model_file.load(files / "x.weights.h5")
    assert "\n" not in str(caught.value)


def test_what_is_missing_or_no_file_is_an_input_error(tmp_path):
    for path, received in ((tmp_path / "no.h5", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(InputError, match=rf"{re.escape(str(path))}\. Received: {received}"):
            model_file.load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes.")
def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.h5")
    for path in (tmp_path / "pipe.h5", Path("/dev/zero")):
        with pytest.raises(InputError, match=r"a (pipe|device), not a regular file"):
            model_file.load(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_a_file_without_permission_is_an_input_error(files, tmp_path):
    path = tmp_path / "closed.h5"
    path.write_bytes((files / "mnist.h5").read_bytes())
    path.chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        model_file.load(path)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A program that runs in place of the one that reads files."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(model_file, "MODULE", "fake_reader")
    return tmp_path / "fake_reader.py"


def test_a_file_that_takes_too_long_is_given_up(files, fake, monkeypatch):
    fake.write_text("import threading\nthreading.Event().wait()\n")
    monkeypatch.setattr(model_file, "DEADLINE", 0.1)
    with pytest.raises(DataError, match=re.escape("damaged: reading it takes more than 0.1 s")):
        model_file.load(files / "mnist.h5")


def answer(cnn, config: bytes = b"") -> tuple[dict, bytes, bytes]:
    """Returns header and bytes of a right answer."""
    weights = [weight.numpy() for weight in cnn.trainable_weights]
    header = {"shapes": [weight.shape for weight in weights], "config": len(config)}
    return header, config, b"".join(weight.tobytes() for weight in weights)


def say(fake, *parts: bytes) -> None:
    (fake.parent / "answer").write_bytes(b"".join(parts))
    fake.write_text(
        "import pathlib, sys\n"
        f"sys.stdout.buffer.write(pathlib.Path({str(fake.parent / 'answer')!r}).read_bytes())\n"
    )


def message(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(4, "big") + text


def test_an_answer_in_the_right_form_is_taken(cnn, files, fake):
    header, config, weights = answer(cnn, cnn.to_json().encode())
    say(fake, message(header), config, weights)
    assert weights_sha256(model_file.load(files / "mnist.h5")) == weights_sha256(cnn)


@pytest.mark.parametrize(
    "change",
    [
        lambda header, weights: (pickle.dumps(Marks()),),
        lambda header, weights: (b"\xff" * 4,),
        lambda header, weights: (message(header), weights[:-1]),
        lambda header, weights: (message({**header, "shapes": 8}), weights),
        lambda header, weights: (message({**header, "shapes": [["3", "3"]]}), weights),
        lambda header, weights: (message({**header, "shapes": [{}]}), weights),
        lambda header, weights: (message({**header, "config": 2**21}), weights),
        lambda header, weights: (message({**header, "config": -1}), weights),
        lambda header, weights: (message({"shapes": header["shapes"]}), weights),
        lambda header, weights: (),
    ],
    ids=[
        *("pickle", "huge length", "truncated", "no shapes", "texts", "objects"),
        *("long configuration", "negative size", "no size", "nothing"),
    ],
)
def test_any_other_answer_is_a_damaged_file(cnn, files, fake, monkeypatch, change):
    monkeypatch.chdir(fake.parent)
    header, _, weights = answer(cnn)
    say(fake, *change(header, weights))
    with pytest.raises(DataError, match="damaged: reading it crashed"):
        model_file.load(files / "mnist.h5")
    assert not (fake.parent / "marked").exists()


def test_arrays_of_other_shapes_are_not_waited_for(files, fake):
    fake.write_text(
        "import sys, threading\n"
        f"sys.stdout.buffer.write({message({'shapes': [[2**40]], 'config': 0})!r})\n"
        "sys.stdout.buffer.flush()\n"
        "threading.Event().wait()\n"
    )
    with pytest.raises(DataError, match=r"have the shapes \(1099511627776,\)"):
        model_file.load(files / "mnist.h5")


def test_reading_imports_nothing_from_the_folder(files, cnn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h5py.py").write_text("raise SystemExit(3)")
    assert weights_sha256(model_file.load(files / "mnist.h5")) == weights_sha256(cnn)
