"""The command: what it prints and writes, and what becomes of a file that is in the way."""

import hashlib
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import TIMEOUT, Pause

from trainer import export
from trainer.errors import UsageError
from trainer.inference.formats import SUFFIXES
from trainer.runtime import keras, tf

NAMES = {
    "keras": "mnist.keras",
    "savedmodel": "mnist_savedmodel",
    "onnx": "mnist.onnx",
    "litert": "mnist.tflite",
}


@pytest.fixture
def here(weak_model_file, tmp_path, monkeypatch):
    """A folder of the test's own with the model, and the current one."""
    os.link(weak_model_file, tmp_path / "mnist.h5")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def content(path):
    """Returns what is at a path, with its names where it is a folder."""
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*.*")}
    return path.read_bytes()


@pytest.mark.parametrize(
    "kind",
    [name if name == "litert" else pytest.param(name, marks=pytest.mark.full) for name in NAMES],
)
def test_it_says_what_it_has_written(here, capfd, kind):
    assert export.main(["mnist.h5", "--format", kind]) == 0
    printed = capfd.readouterr()
    made = here / NAMES[kind]
    assert names(here) == sorted(("mnist.h5", NAMES[kind]))  # and nothing temporary
    files = [path for path in (made, *made.rglob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    assert printed.out == f"{NAMES[kind]}  {size / 1e6:.1f} MB  SHA-256 {export.sha256(made)}\n"
    assert printed.err == ""
    if os.name == "posix":  # What others may read of a new file, they may of these.
        umask = os.umask(0)
        os.umask(umask)
        assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask for path in files)


@pytest.mark.full
def test_quantized_and_elsewhere(here, capfd):
    assert export.main(["mnist.h5", "--format", "litert", "--quantize"]) == 0
    assert capfd.readouterr().out.startswith("mnist_quantized.tflite  2.4 MB  SHA-256 ")
    assert export.main(["mnist.h5", "--format", "litert", "--output", "a/b/x.tflite"]) == 0
    assert names(here / "a" / "b") == ["x.tflite"]


def test_the_sum_of_a_folder_is_that_of_sha256sum(tmp_path):
    for name in ("saved_model.pb", "variables/b.index", "variables/a", "Z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    line = "find . -type f | LC_ALL=C sort | xargs sha256sum | sha256sum"
    shown = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)  # noqa: S602
    assert shown.stdout.split()[0] == export.sha256(tmp_path)
    assert export.sha256(tmp_path / "Z") == hashlib.sha256(b"Z").hexdigest()


@pytest.mark.full
def test_what_was_there_is_replaced(here):
    (here / "mnist.tflite").write_text("old")
    (here / "mnist_savedmodel" / "variables").mkdir(parents=True)
    (here / "mnist_savedmodel" / "saved_model.pb").write_text("old")
    (here / "mnist_savedmodel" / "variables" / "variables.data-00000-of-00009").write_text("old")
    # What killed commands have left.
    (here / ".mnist.tflite.0123abcd.tmp").write_text("half")
    (here / ".mnist_savedmodel.0123abcd.tmp").mkdir()
    (here / ".mnist_savedmodel.0123abcd.old").mkdir()
    before = names(here)
    (here / "link.tflite").symlink_to("mnist.tflite")
    assert export.main(["mnist.h5", "--format", "litert", "--output", "link.tflite"]) == 0
    assert export.main(["mnist.h5", "--format", "savedmodel"]) == 0
    assert names(here) == sorted((*before, "link.tflite"))
    assert (here / "link.tflite").is_symlink()
    assert (here / "mnist.tflite").stat().st_size > 9_000_000
    shards = names(here / "mnist_savedmodel" / "variables")
    assert shards == ["variables.data-00000-of-00001", "variables.index"]


@pytest.mark.parametrize(
    ("flags", "make", "part"),
    [
        (["onnx"], lambda path: (path / "mnist.onnx").mkdir(), "Received: a folder."),
        (["savedmodel", "mnist.h5"], lambda path: None, "Received: a file."),
        (["savedmodel", "."], lambda path: None, "a folder with mnist.h5 in it"),
        (["keras", "mnist.h5/x.keras"], lambda path: None, "Not a directory"),
        (["litert", "/proc/none/x.tflite"], lambda path: None, "No such file"),
        (["onnx", "x.onnx"], lambda path: (path / "x.onnx").symlink_to("/dev/null"), "a device"),
        (["onnx", f"{'x' * 300}.onnx"], lambda path: None, "File name too long"),
    ],
)
def test_what_is_in_the_way_stays(here, capfd, flags, make, part):
    make(here)
    before, model_before = names(here), content(here / "mnist.h5")
    kind, *place = flags
    where = ["--output", *place] if place else []
    assert export.main(["mnist.h5", "--format", kind, *where]) == 73
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("python -m trainer.export: error: Expected ")
    assert printed.err.count("\n") == 1
    assert part in printed.err
    assert (names(here), content(here / "mnist.h5")) == (before, model_before)


@pytest.mark.full
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
@pytest.mark.parametrize("kind", ["onnx", "savedmodel"])
def test_a_full_disk_leaves_what_was_there(here, capfd, kind):
    disk = here / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], check=True)
    try:
        flags = ["mnist.h5", "--format", kind, "--output", f"disk/x{SUFFIXES[kind]}"]
        assert export.main(flags) == 0
        (made,) = disk.iterdir()
        before = content(made)
        capfd.readouterr()
        assert export.main(flags) == 73
        assert "Received: No space left on device. Make room" in capfd.readouterr().err
        assert list(disk.iterdir()) == [made]
        assert content(made) == before
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.full
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
@pytest.mark.parametrize("kind", NAMES)
def test_no_room_for_temporary_files_is_said(here, capfd, monkeypatch, kind):
    disk = here / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", disk], check=True)
    try:
        monkeypatch.setattr("tempfile.tempdir", str(disk))
        assert export.main(["mnist.h5", "--format", kind]) == 73
        error = capfd.readouterr().err
        assert f"temporary files in {disk}. Received: No space left on device" in error
        assert error.count("\n") == 1
        assert names(here) == ["disk", "mnist.h5"]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ({"format": "onnx", "quantize": True}, "Leave --quantize out"),
        ({"format": "onnx", "output": "mnist.h5"}, "output must end in .onnx"),
        ({"format": "keras", "output": ""}, "Received: output='.'"),
        ({"format": "litert", "output": ".."}, "Received: output='..'"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(here, flags, part):
    if "output" in flags:
        flags["output"] = here.joinpath(flags["output"]).relative_to(here)
    with pytest.raises(UsageError, match=part):
        export.ExportConfig(model=here / "mnist.h5", **flags)


@pytest.mark.parametrize(
    ("flags", "code", "part"),
    [
        (["mnist.h5"], 2, "--format"),
        (["mnist.h5", "--format", "tflite"], 2, "tflite"),
        (["mnist.h5", "--format", "keras", "--quantize"], 2, "Received: quantize=True"),
        (["nowhere.h5", "--format", "keras"], 66, "nowhere.h5"),
        (["damaged.h5", "--format", "keras"], 65, "damaged.h5"),
    ],
)
def test_what_is_wrong_is_one_line(here, capfd, flags, code, part):
    (here / "damaged.h5").write_bytes((here / "mnist.h5").read_bytes()[:100_000])
    before = names(here)
    assert export.main(flags) == code
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("python -m trainer.export: error: ")
    assert printed.err.count("\n") == 1
    assert part in printed.err
    assert names(here) == before


MISSING = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from trainer import export
sys.exit(export.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("missing", ["onnx", "tf2onnx", "onnx,tf2onnx"])
def test_missing_packages_are_named(here, command, missing):
    command.program = ["-c", MISSING, missing]
    done = command.run("mnist.h5", "--format", "onnx")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.count("\n") == 1
    assert f"without {missing.replace(',', ' and ')}. " in done.stderr
    assert "pip install 'digits-trainer[export]'" in done.stderr


@pytest.mark.full
def test_packages_that_fail_are_one_line(here, command, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "tf2onnx").mkdir()
    (other / "tf2onnx" / "__init__.py").write_text("import numpy\nnumpy.no_longer_there\n")
    command.env["PYTHONPATH"] = f"{other}{os.pathsep}{command.env['PYTHONPATH']}"
    command.program = ["-m", "trainer.export"]
    done = command.run("mnist.h5", "--format", "onnx")
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.count("\n") == 1
    assert "no_longer_there" in done.stderr
    assert names(here) == ["mnist.h5"]


@pytest.mark.full
@pytest.mark.parametrize("kind", NAMES)
def test_the_command_says_one_line(here, command, kind):
    command.program = ["-m", "trainer.export"]
    done = command.run("mnist.h5", "--format", kind)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{NAMES[kind]}  9.")
    assert done.stdout.count("\n") == 1


@pytest.mark.full
def test_sigterm_leaves_what_was_there_and_nothing_temporary(here, command, tmp_path_factory):
    temporary = tmp_path_factory.mktemp("temporary")
    command.env["TMPDIR"] = str(temporary)
    command.program = ["-m", "trainer.export"]
    (here / "mnist.onnx").write_text("old")
    # In the middle of a conversion, and before anything takes its place.
    pause = Pause(folder=temporary / "pause", calling="trainer.inference.formats:_onnx")
    started = command.start("mnist.h5", "--format", "onnx", hooks=[pause])
    pause.wait(started)
    assert list(temporary.glob("trainer-export-*"))
    started.send_signal(signal.SIGTERM)
    pause.wait(started, seen="SIGTERM")
    pause.go()
    out, err = started.communicate(timeout=TIMEOUT)
    assert (started.returncode, out) == (130, "")
    assert err == "python -m trainer.export: interrupted. SIGTERM\n"
    assert (here / "mnist.onnx").read_text() == "old"
    assert names(here) == ["mnist.h5", "mnist.onnx"]
    assert not list(temporary.glob("trainer-export-*"))


# -- a model of other images


@pytest.mark.parametrize(
    "kind",
    ["savedmodel", *(pytest.param(name, marks=pytest.mark.full) for name in ("onnx", "litert"))],
)
def test_a_model_of_other_images_is_exported(colour_run, tmp_path, capfd, kind):
    made = tmp_path / f"colours{SUFFIXES[kind]}"
    path = colour_run / "run" / "model.keras"
    assert export.main([str(path), "--format", kind, "--output", str(made)]) == 0
    assert capfd.readouterr().err == ""
    images = np.random.default_rng(0).integers(0, 256, (5, 20, 24, 3)).astype(np.float32)
    expected = keras.saving.load_model(path).predict(images, verbose=0)
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(made)
        [answer] = session.run(["probabilities"], {"images": images})
    elif kind == "litert":
        from ai_edge_litert.interpreter import Interpreter

        serve = Interpreter(str(made)).get_signature_runner()
        answer = serve(images=images)["probabilities"]
    else:
        serve = tf.saved_model.load(made).signatures["serving_default"]
        answer = serve(images=tf.constant(images))["probabilities"].numpy()
    np.testing.assert_allclose(answer, expected, atol=1e-5)


def test_its_name_is_that_of_the_model(colour_run, capfd):
    config = export.ExportConfig(model=colour_run / "run" / "model.keras", format="onnx")
    assert export._beside(config) == colour_run / "run" / "model.onnx"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "model.keras", "format": "keras"}, "format must be savedmodel, onnx or litert"),
        ({"model": "mnist.h5", "format": "onnx", "network": "a:b"}, "network is for a model.keras"),
    ],
)
def test_what_a_model_cannot_become_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        export.ExportConfig(**{**options, "model": Path(options["model"])})
