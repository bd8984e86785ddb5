"""The command on images that are no digits, and on networks that are not the one for digits."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support import Pause, children, save_npz

import trainer
from trainer.config import TrainConfig
from trainer.data import sources
from trainer.data.cache import Cached
from trainer.data.folders import ImageFolder
from trainer.errors import DataError, UsageError
from trainer.models import registry
from trainer.models.registry import DataSpec
from trainer.runtime import keras, tf
from trainer.training import model_workload, workloads

CLASSES = ("bars", "dots", "rings")
FLAGS = ("--epochs", 3, "--batch-size", 12, "--optimizer", "adam")
QUIET = (*FLAGS, "--no-report")  # which takes as long as the training

MINE = """
import keras

def make(spec, config):
    layers = keras.layers
    return keras.Sequential([
        keras.Input(spec.shape),
        layers.Rescaling(1 / 255),
        layers.Conv2D(4, 3, activation="relu"),
        layers.BatchNormalization(),
        layers.GlobalAveragePooling2D(),
        layers.Dropout(0.1),
        layers.Dense(len(spec.classes), activation="softmax"),
    ])

def compiled(spec, config):
    model = make(spec, config)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model

def raises(spec, config):
    raise KeyError("nothing")

def text(spec, config):
    return "a model"

class Subclassed(keras.Model):
    def __init__(self, classes):
        super().__init__()
        self.flatten = keras.layers.Flatten()
        self.dense = keras.layers.Dense(classes, activation="softmax")

    def call(self, x, training=False):
        return self.dense(self.flatten(x) / 255)

@keras.saving.register_keras_serializable()
class Saved(Subclassed):
    def get_config(self):
        return {"classes": self.dense.units}

def unsaved(spec, config):
    return Subclassed(len(spec.classes))

def subclassed(spec, config):
    return Saved(len(spec.classes))

def unbuilt(spec, config):
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Rescaling(1 / 255),
            layers.Flatten(),
            layers.Dense(len(spec.classes), activation="softmax"),
        ]
    )

def wide(spec, config):
    return keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(7)])

def small(spec, config):
    return keras.Sequential([keras.Input((3, 3, 1)), keras.layers.Flatten()])
"""


def picture(noise, kind, number):
    """A picture of a class, 20×24 pixels, in colours."""
    pixels = noise.integers(0, 60, (20, 24, 3))
    if kind == "bars":
        pixels[:, number % 6 :: 6] += 150
    elif kind == "dots":
        pixels[2 + number % 4 :: 6, 3::6] += 190
    else:
        y, x = np.ogrid[:20, :24]
        distance = np.hypot(y - 10, x - 12)
        pixels[(distance > 5) & (distance < 8)] += 180
    return Image.fromarray(np.uint8(np.clip(pixels, 0, 255)))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of pictures of three classes, 16 of each to train on and 6 to test."""
    folder, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for (part, count), kind in itertools.product((("train", 16), ("test", 6)), CLASSES):
        (folder / part / kind).mkdir(parents=True)
        for number in range(count):
            picture(noise, kind, number).save(folder / part / kind / f"{number}.png")
    return folder


@pytest.fixture
def few_digits(tmp_path):
    return save_npz(tmp_path / "digits.npz")


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The functions of ``MINE``, as the module ``mine`` of this process."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mine", None)


def manifest_of(folder):
    return json.loads((folder / "model.json").read_text())


def trained(command, *flags, output_dir="out"):
    done = command.run(*flags, "--output-dir", output_dir)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return manifest_of(command.folder / output_dir)


def test_a_folder_of_pictures_becomes_a_model_and_its_report(command, pictures):
    manifest = trained(command, "--data", pictures, *FLAGS)
    assert sorted(path.name for path in (command.folder / "out").iterdir()) == [
        "curves.png",
        "history.json",
        "model.json",
        "model.keras",
        "report.html",
    ]
    assert manifest["data"]["classes"] == list(CLASSES)
    assert manifest["data"]["shape"] == [20, 24, 3]
    assert (manifest["data"]["train_examples"], manifest["data"]["test_examples"]) == (48, 18)
    page = (command.folder / "out" / "report.html").read_text()
    assert all(f'<th scope="row">{name}</th>' in page for name in CLASSES)
    assert "digit" not in page.replace("digits-trainer", "")
    command.program = ["-m", "trainer.evaluate"]
    done = command.run("out/model.keras", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    scores = json.loads(done.stdout)
    assert scores["accuracy"] == pytest.approx(manifest["metrics"]["val_accuracy"])
    assert scores["loss"] == pytest.approx(manifest["metrics"]["val_loss"], rel=1e-4)
    assert [row["class"] for row in scores["classes"]] == list(CLASSES)


def test_the_saved_model_is_one_that_keras_loads(command, pictures):
    manifest = trained(command, "--data", pictures, *QUIET)
    model = keras.saving.load_model(command.folder / "out" / "model.keras")
    splits = sources.load(str(pictures))
    [(x, y)] = splits.test.batches(np.arange(18), 18)
    loss, accuracy = model.evaluate(x, y, verbose=0)
    assert loss == pytest.approx(manifest["metrics"]["val_loss"], rel=1e-4)
    assert accuracy == pytest.approx(manifest["metrics"]["val_accuracy"])


def test_a_killed_run_of_pictures_goes_on_to_the_same_bits(command, tmp_path, pictures):
    flags = ("--data", pictures, *QUIET, "--checkpoint-every", "1")
    flags += ("--augment", "rotate=20", "flip", "elastic", "brightness")
    flags += ("--steps-per-execution", 1)
    undisturbed = trained(command, *flags, output_dir="undisturbed")
    pause = Pause(folder=tmp_path / "pause", after_step=(2, 2))
    run = command.start(*flags, "--output-dir", "killed", hooks=[pause])
    pause.wait(run)
    run.kill()
    run.communicate()
    resumed = trained(command, *flags, output_dir="killed")
    assert resumed["model"]["weights_sha256"] == undisturbed["model"]["weights_sha256"]
    histories = [
        json.loads((tmp_path / folder / "history.json").read_text())
        for folder in ("undisturbed", "killed")
    ]
    for history in histories:
        del history["seconds"]
    assert histories[0] == histories[1]


def test_no_data_start_tensorflow_before_the_workers_connect(command, few_digits, pictures):
    """MultiWorkerMirroredStrategy must be constructed before TensorFlow's first operation."""
    program = """
import sys
import numpy as np
from trainer.config import TrainConfig
from trainer.training import workloads
from trainer.runtime import tf
from tensorflow.python.eager import context

for source in sys.argv[1:]:
    workload = workloads.load(TrainConfig(data=source, model="resnet", batch_size=10))
    workload.data, workload.summary(), list(workload.notices()), workload.bytes_in_memory
    assert not context.context()._initialized, source
"""
    np.savez(
        command.folder / "colours.npz",
        x_train=np.zeros((12, 4, 4, 3), np.uint8),
        y_train=np.arange(12) % 3,
        x_test=np.zeros((3, 4, 4, 3), np.uint8),
        y_test=np.arange(3),
    )
    done = subprocess.run(
        [sys.executable, "-c", program, few_digits, "colours.npz", pictures],
        env=command.env,
        cwd=command.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.full
def test_two_workers_train_pictures_and_one_of_them_is_killed(command, tmp_path, pictures):
    (tmp_path / "mine.py").write_text(MINE)
    command.program = ["-m", "trainer.launch", "--workers", "2", "--"]
    flags = ("--data", pictures, *QUIET, "--model", "mine:make", "--steps-per-execution", 1)
    undisturbed = trained(command, *flags, output_dir="undisturbed")
    assert undisturbed["environment"]["workers"] == 2
    pauses = [
        Pause(folder=tmp_path / f"pause-{worker}", worker=worker, after_step=(2, 1))
        for worker in (0, 1)
    ]
    command.program = ["-m", "trainer.launch", "--workers", "2", "--max-restarts", "1", "--"]
    launch = command.start(*flags, "--output-dir", "killed", hooks=pauses)
    for pause in pauses:
        pause.wait(launch)
    os.kill(children(children(launch.pid)[1])[0], signal.SIGKILL)
    for pause in pauses:
        pause.go()
    stdout, stderr = launch.communicate()
    assert launch.returncode == 0, stderr
    assert "Resuming the unfinished run" in stdout
    resumed = manifest_of(tmp_path / "killed")
    assert resumed["model"]["weights_sha256"] == undisturbed["model"]["weights_sha256"]


def test_a_validation_split_leaves_the_test_images_to_the_end(command, pictures):
    manifest = trained(command, "--data", pictures, *FLAGS, "--validation-split", 0.25)
    data, metrics = manifest["data"], manifest["metrics"]
    assert (data["train_examples"], data["validation_examples"], data["test_examples"]) == (
        36,
        12,
        18,
    )
    assert {"val_accuracy", "test_accuracy", "test_loss"} <= metrics.keys()
    page = (command.folder / "out" / "report.html").read_text()
    assert f"{metrics['test_accuracy']:.2%} test accuracy" in page
    assert "The best validation accuracy" in page
    command.program = ["-m", "trainer.evaluate"]
    done = command.run("out/model.keras", "--json")
    assert json.loads(done.stdout)["accuracy"] == pytest.approx(metrics["test_accuracy"])


def test_a_validation_split_of_digits_leaves_the_test_images_to_the_end(command, few_digits):
    done = command.run(
        "--data", few_digits, "--epochs", 1, "--validation-split", 0.5, "--batch-size", 10
    )
    assert (done.returncode, done.stderr) == (0, "")
    manifest = json.loads((command.folder / "mnist.json").read_text())
    assert manifest["data"]["validation_examples"] == 30
    assert f"test accuracy {manifest['metrics']['test_accuracy']:.2%}" in done.stdout
    assert "30 training, 30 validation and 20 test images" in done.stdout


def test_a_folder_without_test_pictures_takes_a_share_of_them(command, pictures):
    done = command.run("--data", pictures / "train", *QUIET)
    assert done.returncode == 2
    assert "Use validation_split=0.2" in done.stderr
    assert not list(command.folder.iterdir())
    done = command.run("--data", pictures / "train", *FLAGS, "--validation-split", 0.25)
    assert (done.returncode, done.stderr) == (0, "")
    assert "validation accuracy" in done.stdout
    # Of a folder, which is sorted by class, every class has its share.
    page = (command.folder / "report.html").read_text()
    assert "validation accuracy" in page


@pytest.mark.parametrize("limit", [3, 30])
def test_a_limit_of_a_sorted_folder_takes_of_all_classes(pictures, limit):
    config = TrainConfig(data=str(pictures), train_limit=limit, batch_size=2)
    workload = workloads.load(config)
    assert workload.data["train_examples"] == limit
    [(_, labels)] = workload.train.batches(np.arange(limit), limit)
    assert len(set(labels.numpy())) > 1


def test_pictures_stay_in_memory_where_they_fit(pictures, monkeypatch):
    def kinds(**settings):
        workload = workloads.load(TrainConfig(data=str(pictures), batch_size=12, **settings))
        workload.prepare(tf.distribute.get_strategy())
        return type(workload.train), type(workload.measured)

    assert kinds() == (Cached, Cached)
    assert kinds(cache="none") == (ImageFolder, ImageFolder)
    monkeypatch.setattr("trainer.machine.available_memory", lambda: 100_000)
    assert kinds() == (ImageFolder, ImageFolder)
    with pytest.raises(DataError, match=r"fit into 0\.0 GB, half of the memory that is free"):
        kinds(cache="memory")


def test_every_picture_is_read_once(pictures, monkeypatch, tmp_path):
    read = []
    batches = ImageFolder.batches

    def counted(self, numbers, batch_size):
        read.append((self.folder.name, len(numbers)))
        return batches(self, numbers, batch_size)

    monkeypatch.setattr(ImageFolder, "batches", counted)
    config = TrainConfig(
        data=str(pictures), batch_size=12, epochs=3, output_dir=tmp_path, report=False
    )
    trainer.train(config)
    # The order of the first epoch is asked for twice, before anything is read.
    assert set(read) == {("train", 48), ("test", 18)}
    assert len(read) <= 3


@pytest.mark.full
def test_the_cache_changes_no_bit(command, pictures):
    flags = ("--data", pictures, *FLAGS, "--augment", "affine", "--no-report")
    digests = {
        trained(command, *flags, "--cache", cache, output_dir=cache)["model"]["weights_sha256"]
        for cache in ("memory", "none")
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("kind", "augment"),
    [
        *(("pictures", one) for one in ("none", "affine flip elastic contrast")),
        *(("arrays", one) for one in ("none", "affine flip elastic contrast")),
        ("larger arrays", "affine flip elastic contrast"),
    ],
)
def test_what_is_on_the_device_is_what_the_host_sends(
    tmp_path, monkeypatch, capsys, pictures, few_digits, mine, kind, augment
):
    """On a CPU, with the step of an accelerator: streamed pictures, and arrays in its memory."""
    if kind == "larger arrays":
        monkeypatch.setattr(model_workload.resident, "place", lambda data, strategy: None)
    digests, histories = set(), []
    for on_device in (False, True):
        monkeypatch.setattr(model_workload, "has_accelerator", lambda: on_device)  # noqa: B023
        config = TrainConfig(
            data=str(pictures if kind == "pictures" else few_digits),
            model="mine:make",
            batch_size=20,
            epochs=2,
            augment=augment,
            label_smoothing=0.1,
            train_limit=45,
            output_dir=tmp_path / str(on_device),
            report=False,
        )
        _, history = trainer.train(config)
        digests.add(manifest_of(config.output_dir)["model"]["weights_sha256"])
        histories.append({name: row for name, row in history.items() if name != "seconds"})
    assert len(digests) == 1
    assert histories[0] == histories[1]
    said = "do not fit into the devices' memory" in capsys.readouterr().out
    assert said == (kind == "larger arrays")


def test_the_report_shows_augmented_images(command, pictures):
    trained(command, "--data", pictures, *FLAGS, "--augment", "flip", "rotate=5")
    page = (command.folder / "out" / "report.html").read_text()
    assert "The first 48 as the first epoch was trained on them" in page
    assert "--augment rotate=5 flip=0.5" in page


def test_colours_that_the_images_do_not_have_are_not_changed(command, few_digits):
    done = command.run("--data", few_digits, "--augment", "hue")
    assert done.returncode == 2
    assert "hue of augment is for images of three channels. Received: 1." in done.stderr


# -- early stopping


@pytest.mark.full
@pytest.mark.parametrize("digits", [False, True])
def test_a_run_stops_early_in_the_same_epoch_after_a_kill(
    command, tmp_path, pictures, few_digits, digits
):
    data = few_digits if digits else pictures  # Noise, which is learned by heart.
    flags = ("--data", data, "--epochs", 30, "--batch-size", 12, "--optimizer", "adam")
    flags += ("--learning-rate", 0.003, "--validation-split", 0.25, "--early-stopping", 2)
    flags += ("--steps-per-execution", 1)
    done = command.run(*flags, "--output-dir", "undisturbed")
    assert done.returncode == 0, done.stderr
    name = "mnist.json" if digits else "model.json"
    undisturbed = json.loads((tmp_path / "undisturbed" / name).read_text())
    history = json.loads((tmp_path / "undisturbed" / "history.json").read_text())
    best = int(np.argmin(history["val_loss"]))
    assert undisturbed["best_epoch"] == best + 1
    assert undisturbed["metrics"]["val_loss"] == history["val_loss"][best]
    assert len(history["loss"]) == min(best + 3, 30) > 3
    assert f"The weights are those of epoch {best + 1}" in done.stdout + done.stderr
    page = (tmp_path / "undisturbed" / "report.html").read_text()
    assert f"the model is that of epoch {best + 1}." in page
    pause = Pause(folder=tmp_path / "pause", after_step=(len(history["loss"]), 1))
    run = command.start(*flags, "--output-dir", "killed", hooks=[pause])
    pause.wait(run)
    run.kill()
    run.communicate()
    done = command.run(*flags, "--output-dir", "killed")
    assert done.returncode == 0, done.stderr
    resumed = json.loads((tmp_path / "killed" / name).read_text())
    assert resumed["model"]["weights_sha256"] == undisturbed["model"]["weights_sha256"]
    assert resumed["metrics"] == undisturbed["metrics"]
    assert resumed["best_epoch"] == undisturbed["best_epoch"]


def test_early_stopping_takes_validation_images(command, pictures):
    done = command.run("--data", pictures, *QUIET, "--early-stopping", 2)
    assert done.returncode == 2
    assert "early_stopping takes validation images" in done.stderr
    assert "Use validation_split=0.1" in done.stderr


# -- networks


@pytest.mark.parametrize("function", ["make", "compiled"])
def test_a_function_of_the_users_makes_the_network(command, pictures, function):
    (command.folder / "mine.py").write_text(MINE)
    manifest = trained(command, "--data", pictures, *QUIET, "--model", f"mine:{function}")
    assert manifest["model"]["parameters"] == 3 * 3 * 3 * 4 + 4 + 4 * 4 + 4 * 3 + 3


@pytest.mark.full
@pytest.mark.parametrize("function", ["unbuilt", "subclassed"])
def test_a_network_of_any_kind_is_trained_and_measured(command, pictures, function):
    (command.folder / "mine.py").write_text(MINE)
    manifest = trained(command, "--data", pictures, *QUIET, "--model", f"mine:{function}")
    command.program = ["-m", "trainer.evaluate"]
    done = command.run("out/model.keras", "--json")  # Which would run what a file names.
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Use network='mine:{function}' if you trust it" in done.stderr
    done = command.run("out/model.keras", "--json", "--network", f"mine:{function}")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["loss"] == pytest.approx(
        manifest["metrics"]["val_loss"], rel=1e-4
    )


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        ("nothing:make", 2, "a module nothing for model='nothing:make'"),
        ("mine:nothing", 2, "a function nothing in mine"),
        ("mine:raises", 78, r"KeyError: 'nothing' ("),
        ("mine:unsaved", 78, "a model that Keras can save"),
        ("mine:wide", 78, "of the 3 classes, of shape (None, 3). Received: (None, 7)"),
        ("mine:text", 78, "a Keras model from mine:text. Received: str"),
        ("mine:small", 78, "takes images of shape (20, 24, 3)"),
        ("broken:make", 78, "SyntaxError"),
        ("nothing", 2, "model must be cnn, resnet or package.module:function"),
    ],
)
def test_a_function_that_makes_no_network_is_named(command, pictures, model, code, message):
    (command.folder / "mine.py").write_text(MINE)
    (command.folder / "broken.py").write_text("def make(:\n")
    done = command.run("--data", pictures, *QUIET, "--model", model, "--output-dir", "out")
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert not (command.folder / "out").exists()


def test_another_network_does_not_resume_a_run(command, tmp_path, pictures):
    (tmp_path / "mine.py").write_text(MINE)
    flags = ("--data", pictures, *QUIET, "--model", "mine:make", "--checkpoint-every", "1")
    flags += ("--steps-per-execution", 1, "--output-dir", "out")
    pause = Pause(folder=tmp_path / "pause", after_step=(1, 2))
    run = command.start(*flags, hooks=[pause])
    pause.wait(run)
    run.kill()
    run.communicate()
    (tmp_path / "mine.py").write_text(MINE.replace("Conv2D(4", "Conv2D(5"))
    done = command.run(*flags)
    assert done.returncode == 78
    assert "another model or optimizer" in done.stderr
    assert (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["cnn", "resnet"])
@pytest.mark.parametrize(
    "shape", [(4, 4, 1), (9, 5, 3), (28, 28, 1), (32, 32, 3), (96, 70, 3), (180, 240, 3)]
)
def test_the_networks_take_images_of_any_shape(name, shape):
    spec = DataSpec(shape, "uint8", tuple("abcdefg"))
    model = registry.build(TrainConfig(model=name), spec, examples=1000)
    assert model.count_params() < 5e6
    assert model.output_shape == (None, 7)
    images = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    assert np.allclose(np.asarray(model(images)).sum(axis=1), 1, atol=1e-5)


def test_the_cnn_of_digits_is_the_same_for_other_data():
    spec = DataSpec((28, 28, 1), "uint8", tuple("0123456789"))
    model = registry.build(TrainConfig(), spec, examples=1000)
    assert model.count_params() == 2_380_938  # models.cnn


def test_resnet_has_twenty_layers():
    spec = DataSpec((32, 32, 3), "uint8", tuple("0123456789"))
    model = registry.build(TrainConfig(model="resnet"), spec, examples=1000)
    kernels = [
        layer
        for layer in model.layers
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense))
        and getattr(layer, "kernel_size", 3) != (1, 1)
    ]
    assert len(kernels) == 20
    # 269,722 of option A (He et al., 2015, table 6: 0.27 M), and the shortcuts of option B.
    assert 0.27e6 < model.count_params() < 0.28e6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resnet", "dense_dropout": 0.1}, "dense_dropout is for model='cnn'"),
        ({"validation_split": 0.99}, "examples on both sides"),
        ({"train_limit": 49}, "train_limit must be at most the 48 examples"),
        ({"batch_size": 49}, "batch_size must be at most the 48 training images"),
        ({"image_size": "10x"}, "image_size must be a number of pixels"),
    ],
)
def test_settings_that_do_not_fit_are_refused(pictures, settings, message):
    settings = {"data": str(pictures), "batch_size": 12, **settings}
    with pytest.raises(UsageError, match=message):
        workloads.load(TrainConfig(**settings)).build()


def test_the_models_file_is_that_of_its_manifest(command, tmp_path, pictures):
    trained(command, "--data", pictures, *QUIET)
    command.program = ["-m", "trainer.evaluate"]
    content = bytearray((tmp_path / "out" / "model.keras").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "out" / "model.keras").write_bytes(content)
    done = command.run("out/model.keras")
    assert (done.returncode, "Received: another one" in done.stderr) == (65, True)
    (tmp_path / "out" / "model.json").unlink()
    done = command.run("out/model.keras")
    assert (done.returncode, "Received: no model.json beside it" in done.stderr) == (65, True)


def test_a_file_of_the_users_own_is_not_replaced(command, tmp_path, pictures):
    (tmp_path / "model.keras").write_text("mine")
    done = command.run("--data", pictures, *QUIET)
    assert done.returncode == 73
    assert (tmp_path / "model.keras").read_text() == "mine"
    assert "an earlier run or nothing at" in done.stderr


def test_pictures_that_are_bad_are_listed_or_left_out(command, tmp_path, pictures):
    shutil.copytree(pictures, tmp_path / "bad")
    (tmp_path / "bad" / "train" / "dots" / "3.png").write_bytes(b"")
    Image.new("RGB", (5, 5)).save(tmp_path / "bad" / "train" / "bars" / "large.png")
    done = command.run("--data", "bad", *QUIET, "--output-dir", "out")
    assert done.returncode == 65
    assert "3.png (empty)" in done.stderr
    assert "large.png (5×5 pixels)" in done.stderr
    assert not (tmp_path / "out").exists()
    done = command.run("--data", "bad", *QUIET, "--skip-bad", "--output-dir", "out")
    assert done.returncode == 0
    assert "2 pictures are left out" in done.stderr + done.stdout


@pytest.mark.full
def test_measured_pictures_are_of_the_models_classes(command, tmp_path, pictures):
    trained(command, "--data", pictures, *QUIET)
    shutil.copytree(pictures / "test", tmp_path / "some")
    shutil.rmtree(tmp_path / "some" / "bars")
    command.program = ["-m", "trainer.evaluate"]
    done = command.run("out/model.keras", "--data", "some", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    scores = json.loads(done.stdout)
    assert [row["examples"] for row in scores["classes"]] == [0, 6, 6]
    (tmp_path / "some" / "dots").rename(tmp_path / "some" / "stars")
    done = command.run("out/model.keras", "--data", "some")
    assert done.returncode == 65
    assert "Received: stars, too" in done.stderr
