import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from trainer.errors import OutputError, StoppedError
from trainer.files import FILES, REPORT_FILES, lock_output_dir, remove_files
from trainer.models import cnn as model
from trainer.training import artifacts as output

FACTS = {"metrics": {"val_accuracy": 0.5}}
HISTORY = {"loss": [2.0, 1.0], "seconds": [9.0, 8.0]}


@pytest.fixture(scope="module")
def cnn():
    return model.build(optimizer="adadelta", learning_rate=0.25, seed=1)


def save(folder, cnn, **facts):
    with lock_output_dir(folder):
        return output.save(folder, cnn, HISTORY, {**FACTS, **facts})


def test_the_files_say_what_they_hold(tmp_path, cnn):
    manifest = save(tmp_path, cnn)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    assert json.loads((tmp_path / "history.json").read_text()) == HISTORY
    assert json.loads((tmp_path / "mnist.json").read_text()) == manifest
    shown = subprocess.run(
        ["sha256sum", tmp_path / "mnist.h5"], capture_output=True, text=True, check=True
    )
    assert manifest["model"]["sha256"] == shown.stdout.split()[0]
    assert manifest["model"]["bytes"] == (tmp_path / "mnist.h5").stat().st_size
    assert manifest["model"]["parameters"] == 2_380_938
    assert manifest["metrics"] == FACTS["metrics"]


# As where the package is not installed: an import of it fails.
STOCK = """
import sys
import threading
sys.modules["trainer"] = None
import keras, numpy as np
model = keras.models.load_model(sys.argv[1])
assert type(model) is keras.Sequential
x = np.random.default_rng(0).random((40, 28, 28, 1), np.float32)
y = np.eye(10, dtype=np.float32)[np.arange(40) % 10]
np.save(sys.argv[2], model.predict(x, verbose=0))
# A bright row for each label: what can be learnt in a few steps, in whatever order they come.
rows = np.zeros_like(x)
rows[np.arange(40), 4 + 2 * (np.arange(40) % 10)] = 1
before = model.evaluate(rows, y, verbose=0)[0]
keras.utils.set_random_seed(0)  # fit shuffles
model.fit(rows, y, epochs=5, verbose=0)
assert type(model.optimizer).__name__ == "Adadelta"
assert abs(float(model.optimizer.learning_rate) - 0.25) < 1e-9
assert model.evaluate(rows, y, verbose=0)[0] < before
"""


def test_stock_keras_loads_evaluates_and_trains_the_file(tmp_path, cnn):
    save(tmp_path, cnn)
    subprocess.run(
        [sys.executable, "-c", STOCK, tmp_path / "mnist.h5", tmp_path / "said.npy"],
        check=True,
        cwd=tmp_path,
    )
    x = np.random.default_rng(0).random((40, 28, 28, 1), np.float32)
    np.testing.assert_allclose(np.load(tmp_path / "said.npy"), cnn.predict(x, verbose=0), rtol=1e-6)


def test_a_trained_model_loads_with_its_weights_and_can_go_on(tmp_path):
    from trainer.runtime import keras

    trained = model.build(optimizer="adam", learning_rate=0.25, seed=1)
    x, y = np.ones((4, 28, 28, 1), np.float32), np.eye(4, 10, dtype=np.float32)
    trained.fit(x, y, verbose=0)
    save(tmp_path, trained)
    loaded = keras.models.load_model(tmp_path / "mnist.h5")
    assert output.weights_sha256(loaded) == output.weights_sha256(trained)
    loaded.fit(x, y, verbose=0)


def test_the_file_holds_what_keras_saves_but_for_the_optimizers_variables(tmp_path, cnn):
    # Fails when Keras begins to save something that is not carried over.
    import h5py

    save(tmp_path, cnn)
    cnn.save(tmp_path / "keras.h5")
    with h5py.File(tmp_path / "mnist.h5") as ours, h5py.File(tmp_path / "keras.h5") as theirs:
        assert dict(ours.attrs) == dict(theirs.attrs)
        assert set(theirs) - set(ours) == {"optimizer_weights"}


def test_keras_cannot_go_on_with_an_optimizers_state_from_hdf5(tmp_path):
    # The reason for what the file lacks. When this fails, the file can have it.
    from trainer.runtime import keras

    trained = model.build(optimizer="adadelta", learning_rate=1.0, seed=1)
    x, y = np.ones((4, 28, 28, 1), np.float32), np.eye(4, 10, dtype=np.float32)
    trained.save(tmp_path / "keras.h5")
    loaded = keras.models.load_model(tmp_path / "keras.h5")
    with pytest.raises(ValueError, match="Unknown variable"):
        loaded.fit(x, y, verbose=0)


def test_the_folder_is_created(tmp_path, cnn):
    save(tmp_path / "a" / "b", cnn)
    assert (tmp_path / "a" / "b" / "mnist.h5").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("a file"), "File exists"),
        (lambda path: path.mkdir() or (path / "mnist.h5").mkdir(), "Received: a folder"),
        (lambda path: path.symlink_to("/proc/nothing/here"), "No such file|File exists"),
    ],
)
def test_a_folder_that_cannot_be_used_is_found_at_once(tmp_path, make, message):
    make(tmp_path / "out")
    with pytest.raises(OutputError, match=message), lock_output_dir(tmp_path / "out"):
        pytest.fail("the folder was taken")


def test_two_runs_cannot_use_one_folder(tmp_path):
    with (
        lock_output_dir(tmp_path),
        pytest.raises(OutputError, match="no other run is using"),
        lock_output_dir(tmp_path),
    ):
        pytest.fail("the folder was taken twice")
    with lock_output_dir(tmp_path):
        pass  # and afterwards it is free again


def test_what_a_killed_run_left_is_removed(tmp_path, cnn):
    save(tmp_path, cnn)
    for name in ("mnist.h5", "report.html", "curves.png"):
        (tmp_path / f".{name}.0123456789abcdef.tmp").write_bytes(b"half a file")
    with lock_output_dir(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


# The folder is full, or a file may not grow: each at several sizes, so that the model, and then
# what is written after it, is where it ends.
FULL = """
import resource, sys
from pathlib import Path
from trainer.models import cnn as model
from trainer.training import artifacts as output
from trainer.files import lock_output_dir
from trainer.errors import OutputError, StoppedError
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
cnn = model.build(optimizer="adadelta", learning_rate=1.0, seed=int(sys.argv[3]))
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with lock_output_dir(folder):
        output.save(folder, cnn, {"seconds": []}, {})
except OutputError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def save_in_process(command, folder, limit, seed):
    return subprocess.run(
        [sys.executable, "-c", FULL, folder, str(limit), str(seed)],
        env=command.env,
        capture_output=True,
        text=True,
        check=False,
    )


def assert_old_files_stand(command, folder, limit=0):
    old = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in FILES}
    assert sorted(old) == sorted(FILES)
    done = save_in_process(command, folder, limit, seed=2)
    assert done.returncode == 73, done.stderr
    assert "Make room or permission there" in done.stdout
    for name, content in old.items():
        assert (folder / name).read_bytes() == content
    assert {path.name for path in folder.iterdir()} - set(FILES) <= {"filler"}


@pytest.mark.parametrize("limit", [5_000_000, 9_530_000])
def test_a_file_that_may_not_grow_leaves_the_old_ones(tmp_path, cnn, command, limit):
    folder = tmp_path / "out"
    save(folder, cnn)
    assert_old_files_stand(command, folder, limit)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
def test_a_disk_that_fills_up_leaves_the_old_files(tmp_path, cnn, command):
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder], check=True)
    try:
        save(folder, cnn)
        # There is room for a second model, less 1 MB; then for none at all.
        (folder / "filler").write_bytes(bytes(2_500_000))
        assert_old_files_stand(command, folder)
        (folder / "filler").write_bytes(bytes(11_000_000))
        assert_old_files_stand(command, folder)
    finally:
        subprocess.run(["umount", folder], check=True)


def test_what_is_removed_is_gone_or_said_to_stay(tmp_path):
    (tmp_path / "report.html").write_text("of an earlier run")
    remove_files(tmp_path, REPORT_FILES)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match="Make room or permission there"):
        remove_files(tmp_path, REPORT_FILES)


def test_a_folder_in_use_is_waited_for_until_it_is_too_long(tmp_path):
    got = threading.Event()

    def wait():
        with lock_output_dir(tmp_path, wait=60):
            got.set()

    waiting = threading.Thread(target=wait)
    with lock_output_dir(tmp_path):
        with (
            pytest.raises(StoppedError, match="no other run is using"),
            lock_output_dir(tmp_path, wait=0.1),
        ):
            pass
        waiting.start()
        assert not got.wait(1)
    assert got.wait(30)
    waiting.join()
