"""Fixtures of several test modules; ``support`` has what they are made of."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import COLOURS, TIMEOUT, Command, Replicas, paint

collect_ignore = ["keras_scripts"]  # Programs, which train when they are imported.

# The tests are about CPUs, also in the processes that they start, whatever GPUs the environment
# names; but for those that are marked with gpu.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


def pytest_collection_modifyitems(items):
    """Skips what needs a GPU where TensorFlow sees none; and begins with the modules of the longest
    tests, lest one of those be alone at the end.
    """
    if marked := [item for item in items if item.get_closest_marker("gpu")]:
        reason = _missing_gpu()
        for item in marked if reason else ():
            item.add_marker(pytest.mark.skip(reason=reason))
    first = ("test_workers.py", "test_local.py", "test_strategy.py")
    items.sort(key=lambda item: item.path.name not in first)


def _missing_gpu() -> str:
    """Returns why the tests for GPUs cannot run here; empty where they can."""
    if not Path("/dev/nvidia0").exists() and not Path("/dev/dxg").exists():  # of Linux, of WSL
        return "needs a GPU: there is no NVIDIA device here"
    program = "import tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=_with_gpus(os.environ), capture_output=True, text=True
    )
    return "" if done.stdout.strip() not in ("", "0") else "needs a GPU: TensorFlow sees none"


def _with_gpus(environ):
    hidden = {name: value for name, value in environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return hidden if GPUS is None else {**hidden, "CUDA_VISIBLE_DEVICES": GPUS}


@pytest.fixture
def gpu_command(command):
    """``command`` on the GPUs of this machine."""
    command.env = _with_gpus(command.env)
    return command


@pytest.fixture
def command(tmp_path, tmp_path_factory):
    return Command(tmp_path, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def mnist():
    from trainer.data import sources

    return sources.load("bundled")


@pytest.fixture(scope="session")
def weak_model(mnist):
    """A model that knows some digits: its answers differ, and are not round."""
    from trainer.models import cnn

    model = cnn.build(optimizer="adam", learning_rate=1e-3, seed=0)
    images = np.float32(mnist.x_train[:2048, ..., None]) / 255
    labels = np.eye(10)[mnist.y_train[:2048]]
    model.fit(images, labels, batch_size=64, shuffle=False, verbose=0)
    return model


@pytest.fixture(scope="session")
def weak_model_file(weak_model, tmp_path_factory):
    """The ``mnist.h5`` of that model."""
    from trainer.training import artifacts

    path = tmp_path_factory.mktemp("model") / "mnist.h5"
    path.write_bytes(artifacts._hdf5(weak_model))
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run over all training images, once. It takes a minute or two, and so is one
    for all of pytest's processes.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with (root / "trained.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = root / "trained"
        if not (folder / "mnist.json").exists():
            folder.mkdir(exist_ok=True)
            done = Command(folder, folder).run(
                "--epochs", 1, "--test-limit", 1000, "--no-report", timeout=TIMEOUT
            )
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def colour_run(tmp_path_factory):
    """A folder with train/ and test/, pictures of three colours, and run/ with the model.keras of
    a run on them, resized to 20×24.
    """
    import trainer
    from trainer.config import TrainConfig

    folder, noise = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for part, count in (("train", 8), ("test", 3)):
        for colour in COLOURS:
            (folder / part / colour).mkdir(parents=True)
            for number in range(count):
                picture = paint(colour, noise, (24 + number, 20))
                picture.save(folder / part / colour / f"{number}.png")
    trainer.train(
        TrainConfig(
            data=str(folder),
            image_size="20x24",
            epochs=8,
            batch_size=6,
            optimizer="adam",
            output_dir=folder / "run",
            report=False,
            log_format="plain",
        )
    )
    return folder


@pytest.fixture
def replicas(command):
    return Replicas(command)


@pytest.fixture(scope="module")
def shared_replicas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    return Replicas(Command(folder, folder))


@pytest.fixture(scope="module")
def shared_command(tmp_path_factory):
    return Command(tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("home"))


@pytest.fixture
def float64():
    """Keras in float64: in float32 two right computations part within ten steps of Adadelta."""
    from trainer.runtime import keras

    for dtype in ("float64", "float32"):
        keras.config.set_floatx(dtype)
        keras.config.set_dtype_policy(dtype)
        if dtype == "float64":
            yield
