"""What is read out of a claim is what the manifest says, or is said to be not."""

import hashlib
import json

import pytest

from trainer.errors import ConfigurationError, DataError
from trainer.files import (
    CURVES_FILE,
    FILES,
    HISTORY_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    PAGE_FILE,
    REPORT_FILES,
)
from trainer.k8s.fetch import TRIES, fetch

MODEL = b"a model"
SOUND = {
    MODEL_FILE: MODEL,
    HISTORY_FILE: b"{}",
    MANIFEST_FILE: json.dumps({"model": {"sha256": hashlib.sha256(MODEL).hexdigest()}}).encode(),
}
DRAWN = {
    PAGE_FILE: b"<html></html>\n",
    CURVES_FILE: b"\x89PNG IEND\xaeB`\x82",
}


class Server:
    """A claim's files, as each try to read them gives them, and the pod that reads them."""

    def __init__(self, *tries, phase="Running", **status):
        self.tries = iter(tries)
        self.status = {"phase": phase, **status}
        self.pod = None

    def apply(self, manifest):
        self.pod = {"metadata": manifest["metadata"], "status": self.status}
        self.files = next(self.tries)

    def get(self, kind, name):
        assert (kind, name) == ("Pod", "mine-fetch")
        return self.pod

    def delete(self, kind, name):
        self.pod = None

    def read_file(self, pod, path):
        try:
            return self.files[path.removeprefix("/output/")]
        except KeyError:  # as apiserver.Server says it
            raise ConfigurationError(
                f"Expected {path} in the volume. Received: cat: {path}: No such file or directory."
            ) from None


class Screen:
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def read(server, *, stop=None):
    screen = Screen()
    files = fetch(server, "mine", image="image", screen=screen, stop=lambda: stop)
    return files, screen.lines


def test_sound_files_are_read_and_the_pod_is_deleted():
    server = Server(SOUND)
    assert read(server) == (SOUND, [])
    assert server.pod is None


def test_what_was_drawn_of_the_run_comes_with_it():
    files, lines = read(Server({**SOUND, **DRAWN}))
    assert (files, lines) == ({**SOUND, **DRAWN}, [])
    assert list(files)[-1] == MANIFEST_FILE


@pytest.mark.parametrize("file", FILES)
def test_a_run_is_not_without_its_files(file):
    incomplete = {name: content for name, content in SOUND.items() if name != file}
    with pytest.raises(ConfigurationError, match=f"{file}: No such file or directory"):
        read(Server(*[incomplete] * TRIES))


@pytest.mark.parametrize("file", [*FILES, *REPORT_FILES])
def test_what_was_cut_off_is_read_again(file):
    sound = {**SOUND, **DRAWN}
    files, lines = read(Server({**sound, file: sound[file][:-1]}, sound))
    assert files == sound
    (line,) = lines
    assert line.startswith("Fetching the files failed, trying again: Expected ")


def test_a_model_that_stays_another_is_an_error():
    server = Server(*[{**SOUND, MODEL_FILE: b"another"}] * TRIES)
    with pytest.raises(DataError, match="7 bytes with another one"):
        read(server)
    assert server.pod is None
    assert next(server.tries, None) is None


def test_a_pod_that_fails_is_not_waited_for():
    server = Server(*[SOUND] * TRIES, phase="Failed", message="no room")
    with pytest.raises(ConfigurationError, match="Received: no room"):
        read(server)


def test_it_leaves_off_when_it_is_told_to():
    server = Server(SOUND, phase="Pending")
    assert read(server, stop="SIGINT") == (None, [])
    assert server.pod is None
