"""Each format in its own runtime, and what becomes of a file that is in the way."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support import ROOT

from trainer import export
from trainer.errors import UsageError
from trainer.files import lock_output_dir
from trainer.inference import model_file
from trainer.models import cnn as model
from trainer.training import artifacts as output

NAMES = {
    "keras": "mnist.keras",
    "savedmodel": "mnist_savedmodel",
    "onnx": "mnist.onnx",
    "litert": "mnist.tflite",
}

# What the documentation says is all that a user needs.
_SECTION = (ROOT / "docs" / "using.md").read_text().partition("## Other formats")[2]
SNIPPETS = dict(zip(NAMES, re.findall("```python\n(.*?)```", _SECTION, re.DOTALL), strict=False))

# As where neither the package nor TensorFlow is installed.
ALONE = """
import sys
for name in ("trainer", "tensorflow", "keras"):
    sys.modules[name] = None
import numpy as np
for part in ("many", "one", "seven"):
    images = np.load(f"{part}.npy")
    exec(sys.argv[1])
    np.save(f"{part}-said.npy", probabilities)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, mnist):
    """A folder with a model that has learnt a little: its answers differ, and are not round."""
    folder = tmp_path_factory.mktemp("run")
    cnn = model.build(optimizer="adam", learning_rate=1e-3, seed=0)
    images = np.float32(mnist.x_train[:2048, ..., None]) / 255
    labels = np.eye(10)[mnist.y_train[:2048]]
    cnn.fit(images, labels, batch_size=64, shuffle=False, verbose=0)
    with lock_output_dir(folder):
        output.save(folder, cnn, {}, {})
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """A folder of the test's own with the model, and the current one."""
    os.link(folder / "mnist.h5", tmp_path / "mnist.h5")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def images(mnist):
    pictures = np.float32(mnist.x_test[:1007, ..., None]) / 255
    return {"many": pictures[:1000], "one": pictures[1000:1001], "seven": pictures[1000:]}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def content(path):
    """Returns what is at a path, with its names where it is a folder."""
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*.*")}
    return path.read_bytes()


def answers(code, images, folder, alone):
    """Returns what the code says of each of the arrays of images."""
    if not alone:
        scopes = {part: {"images": array} for part, array in images.items()}
        for scope in scopes.values():
            exec(code, scope)  # noqa: S102
        return {part: scope["probabilities"] for part, scope in scopes.items()}
    for part, array in images.items():
        np.save(folder / f"{part}.npy", array)
    subprocess.run([sys.executable, "-c", ALONE, code], cwd=folder, check=True)
    return {part: np.load(folder / f"{part}-said.npy") for part in images}


@pytest.mark.parametrize(
    "kind",
    [name if name == "litert" else pytest.param(name, marks=pytest.mark.full) for name in NAMES],
)
def test_its_own_runtime_says_what_keras_says(here, capfd, images, kind):
    assert export.main(["mnist.h5", "--format", kind]) == 0
    printed = capfd.readouterr()
    made = here / NAMES[kind]
    assert names(here) == sorted(("mnist.h5", NAMES[kind]))  # and nothing temporary
    files = [path for path in (made, *made.rglob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    assert printed.out == f"{NAMES[kind]}  {size / 1e6:.1f} MB  SHA-256 {export.sha256(made)}\n"
    assert printed.err == ""
    assert size < 1.01 * (here / "mnist.h5").stat().st_size
    if os.name == "posix":  # What others may read of a new file, they may of these.
        umask = os.umask(0)
        os.umask(umask)
        assert all(path.stat().st_mode & 0o777 == 0o666 & ~umask for path in files)

    cnn = model_file.load(here / "mnist.h5")
    alone = kind in ("onnx", "litert")
    for part, said in answers(SNIPPETS[kind], images, here, alone).items():
        assert (said.shape, said.dtype) == ((len(images[part]), 10), np.float32)
        expected = cnn.predict(images[part], verbose=0)
        np.testing.assert_allclose(said, expected, rtol=0, atol=1e-5)
        assert part == "one" or expected.std(axis=0).min() > 0.01  # There is something to say.


def test_the_sum_of_a_folder_is_that_of_sha256sum(tmp_path):
    for name in ("saved_model.pb", "variables/b.index", "variables/a", "Z"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    line = "find . -type f | LC_ALL=C sort | xargs sha256sum | sha256sum"
    shown = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)  # noqa: S602
    assert shown.stdout.split()[0] == export.sha256(tmp_path)
    assert export.sha256(tmp_path / "Z") == hashlib.sha256(b"Z").hexdigest()


@pytest.mark.full
def test_the_files_carry_names_and_a_free_number_of_images(here):
    import onnx
    from ai_edge_litert.interpreter import Interpreter

    from trainer.runtime import keras, tf

    for kind in NAMES:
        assert (
            export.main(["mnist.h5", "--format", kind, "--output", f"a/b/x{export.SUFFIXES[kind]}"])
            == 0
        )
    written = onnx.load("a/b/x.onnx")
    onnx.checker.check_model(written, full_check=True)
    assert {entry.domain: entry.version for entry in written.opset_import}[""] == 15
    for values, name, shape in (
        (written.graph.input, "digits", ["n", 28, 28, 1]),
        (written.graph.output, "probabilities", ["n", 10]),
    ):
        (value,) = values
        tensor = value.type.tensor_type
        assert (value.name, tensor.elem_type) == (name, onnx.TensorProto.FLOAT)
        assert [dim.dim_param or dim.dim_value for dim in tensor.shape.dim] == shape

    interpreter = Interpreter("a/b/x.tflite")
    (signature,) = interpreter.get_signature_list().values()
    assert signature == {"inputs": ["digits"], "outputs": ["probabilities"]}
    assert interpreter.get_input_details()[0]["shape_signature"].tolist() == [-1, 28, 28, 1]

    serving = tf.saved_model.load("a/b/x").signatures["serving_default"]
    digits = serving.structured_input_signature[1]["digits"]
    assert (digits.shape.as_list(), digits.dtype) == ([None, 28, 28, 1], tf.float32)
    assert serving.structured_outputs["probabilities"].shape.as_list() == [None, 10]

    # And training can go on with what Keras loads, once it is compiled.
    loaded = keras.models.load_model("a/b/x.keras")
    assert output.weights_sha256(loaded) == output.weights_sha256(
        model_file.load(here / "mnist.h5")
    )
    loaded.compile("adam", "categorical_crossentropy")
    loaded.fit(np.ones((4, 28, 28, 1), np.float32), np.eye(4, 10), verbose=0)


@pytest.mark.full
def test_quantized_it_is_a_quarter_of_the_size_and_says_the_same_digits(here, capfd, images):
    assert export.main(["mnist.h5", "--format", "litert", "--quantize"]) == 0
    assert capfd.readouterr().out.startswith("mnist_quantized.tflite  2.4 MB  SHA-256 ")
    assert (here / "mnist_quantized.tflite").stat().st_size < 0.26 * 9_528_224
    code = SNIPPETS["litert"].replace("mnist.tflite", "mnist_quantized.tflite")
    said = answers(code, images, here, alone=True)["many"]
    expected = model_file.load(here / "mnist.h5").predict(images["many"], verbose=0)
    assert np.abs(said - expected).max() > 1e-5  # It is quantized.
    assert np.mean(said.argmax(axis=1) == expected.argmax(axis=1)) >= 0.99


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
        flags = ["mnist.h5", "--format", kind, "--output", f"disk/x{export.SUFFIXES[kind]}"]
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
    started = command.start("mnist.h5", "--format", "onnx")
    end = time.monotonic() + 120
    while not list(temporary.glob("trainer-export-*")):
        assert started.poll() is None, started.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)
    started.send_signal(signal.SIGTERM)
    out, err = started.communicate(timeout=120)
    assert (started.returncode, out) == (130, "")
    assert err == "python -m trainer.export: interrupted. SIGTERM\n"
    assert (here / "mnist.onnx").read_text() == "old"
    assert names(here) == ["mnist.h5", "mnist.onnx"]
    assert not list(temporary.glob("trainer-export-*"))
