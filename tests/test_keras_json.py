import json
import os
import subprocess
import sys

import pytest

from trainer import keras_json

IMPORTABLE = [
    "{}",
    "{",
    '{"floatx": "float16", "epsilon": 0.1, "image_data_format": "channels_first"}',
]
FAULTY = {
    '{"floatx": "float8"}': "has floatx='float8'",
    '{"floatx": "bfloat16"}': "has floatx='bfloat16'",
    '{"floatx": ["float32"], "epsilon": 1}': "has floatx=['float32'], epsilon=1",
    '{"image_data_format": null}': "has image_data_format=None",
    "[]": "has no object",
    "[" * 200_000: "is nested too deeply",
}


@pytest.fixture
def environ(tmp_path):
    return {"KERAS_HOME": str(tmp_path)}


@pytest.mark.parametrize("content", IMPORTABLE)
def test_what_keras_reads_or_ignores_is_no_fault(tmp_path, environ, content):
    (tmp_path / "keras.json").write_text(content)
    assert keras_json.read(environ).fault == ""


@pytest.mark.parametrize(("content", "fault"), FAULTY.items(), ids=range(len(FAULTY)))
def test_what_keras_fails_with_is_a_fault(tmp_path, environ, content, fault):
    (tmp_path / "keras.json").write_text(content)
    assert keras_json.read(environ) == (tmp_path / "keras.json", *_settings(content), fault)


def _settings(content):
    try:
        settings = json.loads(content)
    except RecursionError:
        settings = None
    return [settings if isinstance(settings, dict) else None]


def test_a_pipe_is_a_fault_and_not_waited_for(tmp_path, environ):
    os.mkfifo(tmp_path / "keras.json")
    assert keras_json.read(environ).fault.startswith("cannot be read: a pipe")


def test_the_folder_is_the_one_that_keras_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert keras_json.read({}).path == tmp_path / ".keras" / "keras.json"
    assert keras_json.read({"KERAS_HOME": "~/k"}).path == tmp_path / "k" / "keras.json"


@pytest.mark.full
@pytest.mark.parametrize("content", [*IMPORTABLE, *FAULTY], ids=range(len([*IMPORTABLE, *FAULTY])))
def test_the_packages_are_of_the_same_opinion(tmp_path, environ, content):
    (tmp_path / "keras.json").write_text(content)
    done = subprocess.run(
        [sys.executable, "-c", "import tensorflow, keras"],
        env={**os.environ, **environ, "KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode == 0) is (content in IMPORTABLE), done.stderr.decode()[-2000:]
