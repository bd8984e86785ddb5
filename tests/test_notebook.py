"""The notebook as it is stored, and as it runs."""

import json
import os
import re
import signal
import threading

import nbformat
import pytest
from execute_notebook import DIGEST, NOTEBOOK, code_cells, code_sha256
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from support import ROOT, TIMEOUT, Pause, with_hooks

from trainer.config import TrainConfig


def read(path=NOTEBOOK):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def texts(cell):
    """Everything that a cell has said, as text."""
    for out in cell.outputs:
        if out.output_type == "stream":
            yield out.text
        else:
            yield from (text for kind, text in out.data.items() if kind.startswith("text/"))


def source(name):
    return next(cell.source for cell in read().cells if cell.id == name)


def test_what_is_stored_is_what_was_executed():
    stored = read()
    assert stored.metadata[DIGEST] == code_sha256(stored), "make notebook executes it anew"
    counts = [cell.execution_count for cell in code_cells(stored)]
    assert counts == list(range(1, len(counts) + 1))


def test_its_run_reached_what_the_readme_says():
    (said,) = texts(next(cell for cell in read().cells if cell.id == "evaluate"))
    assert float(re.search(r"^Test accuracy: (\S+)%$", said, re.MULTILINE)[1]) >= 99


def test_its_outputs_hold_no_error_and_no_warning():
    for cell in code_cells(read()):
        for out in cell.outputs:
            assert out.output_type != "error", cell.id
            assert out.get("name") != "stderr", out.text


def test_its_outputs_do_not_tell_where_it_ran():
    for cell in code_cells(read()):
        for text in texts(cell):
            assert str(ROOT) not in text
            assert not re.search(r"(?<![\w.<])/(home|root|tmp|Users|usr|var)/", text), text


def test_it_is_small():
    assert NOTEBOOK.stat().st_size < 300_000


def test_its_cells_are_short():
    for cell in code_cells(read()):
        assert len(cell.source.splitlines()) <= 20, cell.id


def test_its_configuration_is_the_default_one(monkeypatch):
    for name in ("EPOCHS", "TRAIN_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    written = re.search(r"TrainConfig\(.*?\n\)", source("configure"), re.DOTALL)[0]
    config = eval(written, {"TrainConfig": TrainConfig, "os": os})  # noqa: S307
    assert config == TrainConfig(train_limit=60_000)


@pytest.mark.parametrize(
    ("there", "devices", "expected"),
    [
        ({"tensorflow", "trainer", "tyro", "matplotlib"}, (), None),
        ({"tensorflow", "matplotlib"}, ("nvidia-smi", "dev/accel0"), "digits-trainer"),
        ({"matplotlib"}, (), "digits-trainer[cpu]"),
        ({"matplotlib"}, ("nvidia-smi",), "digits-trainer[gpu]"),
        ({"matplotlib"}, ("dev/accel0",), "digits-trainer[tpu]"),
        ({"matplotlib"}, ("dev/vfio/0",), "digits-trainer[tpu]"),
        ({"matplotlib"}, ("dev/vfio/vfio",), "digits-trainer[cpu]"),
        ({"trainer"}, ("trainer/task.py",), "--editable=.[cpu]"),
        ({"trainer", "tensorflow"}, ("trainer/task.py",), "--editable=."),
    ],
)
def test_it_installs_what_this_machine_lacks(there, devices, expected, tmp_path, monkeypatch):
    for name in devices:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in there else None)
    code = source("install").replace('"/dev', f'"{tmp_path}/dev')
    code = TransformerManager().transform_cell(code)
    installed = []

    class Shell:
        def run_line_magic(self, magic, line):
            installed.append(f"{magic} {line}".replace("$SOURCE", names["SOURCE"]))

    names = {"get_ipython": Shell}
    exec(code, names)  # noqa: S102
    assert installed == [f'pip install --quiet "{expected}"'] * (expected is not None)


@pytest.fixture
def executed(command):
    """The environment of a run that takes seconds."""
    command.env |= {"EPOCHS": "2", "TRAIN_LIMIT": "512"}
    return command


@pytest.mark.full
def test_all_of_it_runs(executed):
    executed.program = [ROOT / "tests" / "execute_notebook.py"]
    done = executed.run("run.ipynb")
    assert done.returncode == 0, done.stderr
    run = read(executed.folder / "run.ipynb")
    assert run.metadata[DIGEST] == code_sha256(run) == code_sha256(read())
    assert not [out for cell in code_cells(run) for out in cell.outputs if "ename" in out]
    assert len(json.loads((executed.folder / "history.json").read_text())["val_accuracy"]) == 2

    import keras  # Not by this package: as any other program would.

    model = keras.models.load_model(executed.folder / "mnist.h5")
    assert model.count_params() == 2_380_938

    (progress,) = next(cell for cell in run.cells if cell.id == "train").outputs
    lines = progress.data["text/plain"].splitlines()
    epochs = [line.split("  ")[0] for line in lines if line.startswith("epoch")]
    assert epochs == ["epoch 1/2", "epoch 2/2"]
    assert lines[-2].startswith("test accuracy ")
    assert lines[-1].startswith("mnist.h5  9.6 MB  SHA-256 ")
    assert progress.data["text/html"] == "<pre>" + "".join(f"{line}\n" for line in lines) + "</pre>"


@pytest.mark.full
def test_an_interrupted_kernel_shows_how_far_it_came_and_resumes(executed, tmp_path):
    executed.env["EPOCHS"] = "1"
    notebook = read()
    names = ("configure", "load", "train")
    notebook.cells = [cell for cell in notebook.cells if cell.id in names]
    train = notebook.cells[-1]
    train.outputs = []
    again = {**train, "id": "again", "outputs": []}
    notebook.cells.append(nbformat.from_dict(again))
    client = NotebookClient(notebook, timeout=TIMEOUT, allow_errors=True)
    pause = Pause(folder=tmp_path / "pause", after_step=(1, 1))

    def interrupt():
        pause.wait()
        os.kill(client.km.provisioner.pid, signal.SIGINT)
        pause.wait(seen="SIGINT")
        pause.go()

    threading.Thread(target=interrupt, daemon=True).start()
    client.execute(cwd=executed.folder, env=with_hooks(executed.env, [pause]))
    progress, error = train.outputs
    assert error.ename == "StoppedError"
    assert re.search(r"step \d/4  loss ", progress.data["text/plain"])
    (progress,) = notebook.cells[-1].outputs
    assert "Resuming the unfinished run" in progress.data["text/plain"]
    assert "\nepoch 1/1  loss " in progress.data["text/plain"]
