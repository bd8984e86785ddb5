"""What each format's own runtime says, by the lines that the documentation has for it."""

import re
import subprocess
import sys

import numpy as np
import pytest
from support import ROOT

from trainer.inference import formats

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
def images(mnist):
    pictures = np.float32(mnist.x_test[:1007, ..., None]) / 255
    return {"many": pictures[:1000], "one": pictures[1000:1001], "seven": pictures[1000:]}


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
def test_its_own_runtime_says_what_keras_says(
    weak_model, images, tmp_path, monkeypatch, capfd, kind
):
    monkeypatch.chdir(tmp_path)
    made = tmp_path / NAMES[kind]
    formats.convert(weak_model, made, kind)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == [made]
    size = sum(path.stat().st_size for path in (made, *made.rglob("*")) if path.is_file())
    assert size < 1.01 * 4 * weak_model.count_params() + 50_000  # Nothing is stored twice.
    alone = kind in ("onnx", "litert")
    for part, said in answers(SNIPPETS[kind], images, tmp_path, alone).items():
        assert (said.shape, said.dtype) == ((len(images[part]), 10), np.float32)
        expected = weak_model.predict(images[part], verbose=0)
        np.testing.assert_allclose(said, expected, rtol=0, atol=1e-5)
        assert part == "one" or expected.std(axis=0).min() > 0.01  # The answers differ.


@pytest.mark.full
def test_the_files_carry_names_and_a_free_number_of_images(weak_model, tmp_path, monkeypatch):
    import onnx
    from ai_edge_litert.interpreter import Interpreter

    from trainer.runtime import keras, tf
    from trainer.training.artifacts import weights_sha256

    monkeypatch.chdir(tmp_path)
    for kind, suffix in formats.SUFFIXES.items():
        formats.convert(weak_model, tmp_path / f"x{suffix}", kind)
    written = onnx.load("x.onnx")
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

    interpreter = Interpreter("x.tflite")
    (signature,) = interpreter.get_signature_list().values()
    assert signature == {"inputs": ["digits"], "outputs": ["probabilities"]}
    assert interpreter.get_input_details()[0]["shape_signature"].tolist() == [-1, 28, 28, 1]

    serving = tf.saved_model.load("x").signatures["serving_default"]
    digits = serving.structured_input_signature[1]["digits"]
    assert (digits.shape.as_list(), digits.dtype) == ([None, 28, 28, 1], tf.float32)
    assert serving.structured_outputs["probabilities"].shape.as_list() == [None, 10]

    # And training can go on with what Keras loads, once it is compiled.
    loaded = keras.models.load_model("x.keras")
    assert weights_sha256(loaded) == weights_sha256(weak_model)
    loaded.compile("adam", "categorical_crossentropy")
    loaded.fit(np.ones((4, 28, 28, 1), np.float32), np.eye(4, 10), verbose=0)


@pytest.mark.full
def test_quantized_it_is_a_quarter_of_the_size_and_says_the_same_digits(
    weak_model, images, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "mnist.tflite"
    formats.convert(weak_model, made, "litert", quantize=True)
    assert made.stat().st_size < 1.1 * weak_model.count_params()  # A byte each.
    said = answers(SNIPPETS["litert"], images, tmp_path, alone=True)["many"]
    expected = weak_model.predict(images["many"], verbose=0)
    assert np.abs(said - expected).max() > 1e-5  # It is quantized.
    assert np.mean(said.argmax(axis=1) == expected.argmax(axis=1)) >= 0.99
