"""The trainer on a GPU: run by ``make test`` where there is one, and by ``make test-gpu``."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support import ROOT, TIMEOUT, Pause, outcome

pytestmark = pytest.mark.gpu

RUN = ("--epochs", 2, "--train-limit", 2000, "--test-limit", 500, "--no-report", "--gpus", 1)
EAGER = (*RUN, "--steps-per-execution", 1, "--checkpoint-every", 1, "--deterministic")


@pytest.fixture
def on(gpu_command):
    """Returns a function that runs one of programs.py on a device."""

    def compute(device, name, **arguments):
        gpu_command.program = [ROOT / "tests" / "gpu" / "programs.py"]
        done = gpu_command.run(name, device, json.dumps(arguments))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return compute


@pytest.mark.parametrize("jit_compile", [False, True])
def test_gradients_are_those_of_the_cpu(on, jit_compile):
    expected = on("cpu", "gradients")
    received = on("gpu", "gradients", jit_compile=jit_compile)
    for a, b in zip(received, expected, strict=True):
        assert np.linalg.norm(np.subtract(a, b)) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("device", ["gpu", "gpus"])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_losses_in_float64_are_those_of_the_cpu(on, device, jit_compile):
    expected = on("cpu", "losses")
    np.testing.assert_allclose(on(device, "losses", jit_compile=jit_compile), expected, rtol=1e-9)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("precision", ["float32", "tensorfloat32", "mixed_bfloat16"])
def test_every_precision_learns(on, precision, jit_compile):
    fitted = on(
        "gpu",
        "fitted",
        epochs=4,
        train_limit=6400,
        test_limit=1000,
        precision=precision,
        jit_compile=jit_compile,
    )
    assert fitted["accuracy"] > 0.9
    assert fitted["growth"] == [True] * len(fitted["growth"])


def test_augmented_images_are_made_on_the_gpu(on):
    settings = {"epochs": 2, "train_limit": 2000, "test_limit": 500, "augment": "affine"}
    assert on("gpu", "fitted", **settings, jit_compile=True)["accuracy"] > 0.6


def test_images_for_which_the_gpu_has_too_little_memory_are_streamed(on):
    # 55 MB of images on a GPU with 100 MB, and the weights and optimizer's variables beside them.
    assert on("small gpu", "fitted", epochs=1, batch_size=32, test_limit=1000)["accuracy"] > 0.9


def test_two_logical_gpus_train_together(on):
    settings = {"epochs": 2, "train_limit": 2000, "test_limit": 500}
    assert on("gpus", "fitted", **settings)["accuracy"] > 0.7


@pytest.mark.parametrize("flags", [(), ("--jit-compile",), ("--precision", "mixed_bfloat16")])
def test_deterministic_runs_have_the_same_bits(gpu_command, flags):
    for folder in ("a", "b"):
        done = gpu_command.run(*RUN, "--deterministic", *flags, "--output-dir", folder)
        assert done.returncode == 0, done.stderr
    assert outcome(gpu_command.folder / "a") == outcome(gpu_command.folder / "b")


@pytest.mark.parametrize("flags", [(), ("--jit-compile",)])
def test_a_killed_run_resumes_to_the_same_bits(gpu_command, tmp_path, flags):
    done = gpu_command.run(*EAGER, *flags, "--output-dir", "undisturbed")
    assert done.returncode == 0, done.stderr
    pause = Pause(folder=tmp_path / "pause", after_step=(2, 3))
    run = gpu_command.start(*EAGER, *flags, "--output-dir", "out", hooks=[pause])
    pause.wait(run)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=TIMEOUT)
    done = gpu_command.run(*EAGER, *flags, "--output-dir", "out", "--resume", "must")
    assert done.returncode == 0, done.stderr
    assert outcome(gpu_command.folder / "out") == outcome(gpu_command.folder / "undisturbed")


FILL = """
import sys, tensorflow as tf
with tf.device("GPU:0"):
    kept = []
    size = 2**30
    while size >= 2**20:
        try:
            kept.append(tf.zeros((size,), tf.uint8))
        except tf.errors.ResourceExhaustedError:
            size //= 2
print("full", flush=True)
sys.stdin.read()
"""


def test_a_gpu_without_memory_is_one_line(gpu_command):
    # TensorFlow takes nearly all of it at once, unless it is told to let it grow.
    with subprocess.Popen(
        [sys.executable, "-c", FILL],
        env=gpu_command.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as other:
        assert other.stdout.readline() == "full\n"
        done = gpu_command.run(*RUN, "--batch-size", 2000)
        other.stdin.close()
    assert done.returncode == 78, done.stderr
    assert done.stderr.count("\n") == 1
    assert "out of memory" in done.stderr


def test_what_was_trained_on_the_gpu_is_used_there_and_on_the_cpu(gpu_command, mnist):
    assert gpu_command.run(*RUN, "--output-dir", "out").returncode == 0
    Image.fromarray(255 - mnist.x_test[0]).save(gpu_command.folder / "digit.png")
    answers = []
    for environ in ({}, {"CUDA_VISIBLE_DEVICES": "-1"}):
        gpu_command.env |= environ
        answers.append([])
        for program, *flags in (
            ("evaluate", "out/mnist.h5", "--test-limit", 500),
            ("predict", "out/mnist.h5", "digit.png"),
        ):
            gpu_command.program = ["-m", f"trainer.{program}"]
            done = gpu_command.run(*flags, "--json")
            assert done.returncode == 0, done.stderr
            answers[-1].append(json.loads(done.stdout.splitlines()[-1]))
    (on_gpu, seen), (on_cpu, expected) = answers
    assert on_gpu["accuracy"] == pytest.approx(on_cpu["accuracy"], abs=0.005)
    assert seen["digits"][0]["digit"] == expected["digits"][0]["digit"] == 7


def test_a_model_is_exported_where_there_is_a_gpu(gpu_command):
    assert gpu_command.run(*RUN, "--output-dir", "out").returncode == 0
    gpu_command.program = ["-m", "trainer.export"]
    done = gpu_command.run("out/mnist.h5", "--format", "savedmodel")
    assert done.returncode == 0, done.stderr


def test_more_gpus_than_there_are_is_78(gpu_command):
    done = gpu_command.run("--gpus", 99)
    assert done.returncode == 78
    assert "Expected 99 GPUs (gpus=99)" in done.stderr


def test_a_gpu_that_is_hidden_is_78(gpu_command):
    gpu_command.env["CUDA_VISIBLE_DEVICES"] = "-1"
    done = gpu_command.run("--gpus", 1)
    assert done.returncode == 78
    assert "Expected 1 GPUs (gpus=1). Received: 0" in done.stderr


@pytest.mark.parametrize("flags", [(), ("--jit-compile", "--precision", "mixed_bfloat16")])
def test_another_network_trains_on_the_gpu_with_what_it_holds(gpu_command, flags):
    done = gpu_command.run(
        *("--model", "resnet", "--optimizer", "adam", "--augment", "affine", "elastic"),
        *("--epochs", 4, "--train-limit", 12_800, "--test-limit", 1000, "--no-report"),
        *("--output-dir", "out", *flags),
    )
    assert done.returncode == 0, done.stderr
    assert "do not fit" not in done.stdout
    manifest = json.loads((gpu_command.folder / "out" / "model.json").read_text())
    assert manifest["metrics"]["val_accuracy"] > 0.6


@pytest.mark.parametrize("device", ["gpu", "gpus"])
def test_two_logical_gpus_train_another_network(on, device):
    found = on(device, "another_network")
    assert found["accuracy"] > 0.6
    assert found["notices"] == []  # The images are on the device.


def test_fit_trains_a_model_of_the_users_own_on_the_gpu(gpu_command):
    program = """
import keras
import trainer

digits = trainer.load_data("bundled").first(6400, 1000)
layers = keras.layers
model = keras.Sequential([
    layers.Rescaling(1 / 255), layers.Flatten(), layers.Dense(128, activation="relu"),
    layers.BatchNormalization(), layers.Dropout(0.2), layers.Dense(10, activation="softmax"),
])
model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
test = digits.x_test[..., None], digits.y_test
data = digits.x_train[..., None], digits.y_train
history = trainer.fit(model, data, validation_data=test, epochs=4, batch_size=64, verbose=0)
print(history.history["val_accuracy"][-1])
"""
    gpu_command.program = ["-c", program]
    done = gpu_command.run()
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) > 0.85
