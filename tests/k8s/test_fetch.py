"""What is read from a PersistentVolumeClaim is what the run's manifest describes, or an error."""

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
from trainer.k8s.fetch import ATTEMPTS, START_SECONDS, fetch

MODEL = b"a model"
SOUND = {
    MODEL_FILE: MODEL,
    HISTORY_FILE: b"{}",
    MANIFEST_FILE: json.dumps({"model": {"sha256": hashlib.sha256(MODEL).hexdigest()}}).encode(),
}
REPORT = {
    PAGE_FILE: b"<html></html>\n",
    CURVES_FILE: b"\x89PNG IEND\xaeB`\x82",
}


class Server:
    """The files of a volume as each attempt to read them finds them, and the pod mounting it."""

    def __init__(self, *attempts, phase="Running", **status):
        self.attempts = iter(attempts)
        self.status = {"phase": phase, **status}
        self.pod = None

    def apply(self, manifest):
        self.pod = {"metadata": manifest["metadata"], "status": self.status}
        self.files = next(self.attempts)

    def get(self, kind, name):
        assert (kind, name) == ("Pod", "mine-fetch")
        return self.pod

    def delete(self, kind, name):
        self.pod = None

    def read_file(self, pod, path):
        try:
            return self.files[path.removeprefix("/output/")]
        except KeyError:  # as trainer.k8s.api.Server does
            raise ConfigurationError(
                f"Expected {path} in the volume. Received: cat: {path}: No such file or directory."
            ) from None


class Screen:
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


class Clock:
    """A clock that only ``sleep`` advances."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def read(server, *, stop=None, clock=None):
    screen, clock = Screen(), clock or Clock()
    files = fetch(
        server,
        "mine",
        image="image",
        screen=screen,
        stop=lambda: stop,
        clock=clock,
        sleep=clock.sleep,
    )
    return files, screen.lines


def test_sound_files_are_read_and_the_pod_is_deleted():
    server = Server(SOUND)
    assert read(server) == (SOUND, [])
    assert server.pod is None


def test_the_report_is_read_too_and_the_manifest_last():
    files, lines = read(Server({**SOUND, **REPORT}))
    assert (files, lines) == ({**SOUND, **REPORT}, [])
    assert list(files)[-1] == MANIFEST_FILE


def test_a_model_of_another_name_is_read():
    files = {
        "model.keras": MODEL,
        HISTORY_FILE: b"{}",
        "model.json": SOUND[MANIFEST_FILE],
    }
    assert read(Server(files)) == (files, [])
    with pytest.raises(DataError, match=r"model\.keras to have the SHA-256 that model\.json names"):
        read(Server(*[{**files, "model.keras": b"another"}] * ATTEMPTS))


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_an_error(file):
    incomplete = {name: content for name, content in SOUND.items() if name != file}
    with pytest.raises(ConfigurationError, match=f"{file}: No such file or directory"):
        read(Server(*[incomplete] * ATTEMPTS))


@pytest.mark.parametrize("file", [*FILES, *REPORT_FILES])
def test_a_truncated_file_is_read_again(file):
    sound = {**SOUND, **REPORT}
    files, lines = read(Server({**sound, file: sound[file][:-1]}, sound))
    assert files == sound
    (line,) = lines
    assert line.startswith("Fetching the files failed, trying again: Expected ")


def test_a_model_with_another_sha256_is_an_error_after_all_attempts():
    server = Server(*[{**SOUND, MODEL_FILE: b"another"}] * ATTEMPTS)
    with pytest.raises(DataError, match="7 bytes with another one"):
        read(server)
    assert server.pod is None
    assert next(server.attempts, None) is None


def test_a_pod_that_fails_is_not_waited_for():
    server = Server(*[SOUND] * ATTEMPTS, phase="Failed", message="no room")
    with pytest.raises(ConfigurationError, match="Received: no room"):
        read(server)


def test_a_signal_ends_the_wait_for_the_pod():
    server = Server(SOUND, phase="Pending")
    assert read(server, stop="SIGINT") == (None, [])
    assert server.pod is None


def test_a_pod_that_stays_pending_is_given_up_after_its_time():
    waiting = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    clock = Clock()
    server = Server(*[SOUND] * ATTEMPTS, phase="Pending", containerStatuses=[waiting])
    with pytest.raises(ConfigurationError, match="Received: ImagePullBackOff: no such image"):
        read(server, clock=clock)
    assert ATTEMPTS * START_SECONDS <= clock.now <= ATTEMPTS * (START_SECONDS + 1)
    assert server.pod is None
