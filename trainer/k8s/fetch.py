"""Reads the files of a run from its PersistentVolumeClaim, through a short-lived pod.

    contents = fetch(server, "digits-a1b2c", image="digits-trainer:0.1.0", screen=screen, stop=stop)
    files.write_files(folder, contents)

It verifies the SHA-256 of the model. The files are read by running ``cat`` in the pod; where the
user may not (``pods/exec``), from an HTTP server in it, through a port-forward
(``pods/portforward``).
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Container, Iterator, Mapping

from trainer.errors import ConfigurationError, DataError, TrainerError
from trainer.files import (
    CURVES_FILE,
    HISTORY_FILE,
    KINDS,
    PAGE_FILE,
    REPORT_FILES,
    Names,
)
from trainer.k8s import manifests
from trainer.k8s.api import RefusedError, Server
from trainer.k8s.follow import Screen
from trainer.k8s.status import is_ready, pending_reason

START_SECONDS = 300.0  # for the pod to run
ATTEMPTS = 3  # to read the files
PORT = 8000  # of the HTTP server in the pod
POLL_SECONDS = 0.5  # between two looks at the pod

# The manifest names no SHA-256 of these: by its end a file is known to be complete.
_ENDINGS = {PAGE_FILE: b"</html>\n", CURVES_FILE: b"IEND\xaeB`\x82"}


def fetch(
    server: Server,
    name: str,
    *,
    image: str,
    like: Mapping | None = None,
    screen: Screen,
    stop: Callable[[], str | None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, bytes] | None:
    """Reads the files of a run.

    Args:
        server: The namespace of the run.
        name: Name of the run.
        image: The pod's image, one that the cluster can pull.
        like: Specification of a pod of the run, as ``manifests.fetch_pod`` takes it.
        screen: Shows why the pod is pending.
        stop: Returns the name of a signal once one was received.
        clock: Monotonic time in seconds.
        sleep: Waits for a number of seconds.

    Returns:
        Contents by file name, as ``trainer.files.write_files`` takes them; None after ``stop``.

    Raises:
        ConfigurationError: The pod does not start, or the server refuses a request.
        DataError: The model's SHA-256 is not the manifest's, or the report is incomplete.
    """
    manifest = manifests.fetch_pod(name, image=image, like=like)
    pod = _Pod(server, manifest, screen, stop, clock, sleep)
    attempt = 0
    while True:
        try:
            contents = pod.read()
            if contents:
                _check(contents)
            return contents
        except RefusedError as error:
            if pod.serves:
                raise ConfigurationError(
                    f"{error} Fetching takes the permission for pods/exec or for pods/portforward. "
                    f"The files are in the PersistentVolumeClaim {name}: without either, mount it "
                    "in a pod of your own."
                ) from error
            screen.say(f"{pod.name} will serve the files to a port-forward: {error}")
            pod.serve()
        except (ConfigurationError, DataError) as error:
            attempt += 1
            if stop():
                return None
            if attempt == ATTEMPTS:
                raise
            screen.say(f"Fetching the files failed, trying again: {error}")


class _Pod:
    """The pod that mounts the volume."""

    def __init__(
        self,
        server: Server,
        manifest: dict,
        screen: Screen,
        stop: Callable[[], str | None],
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self.server = server
        self.manifest = manifest
        self.name = self.manifest["metadata"]["name"]
        self.serves = False
        self.screen = screen
        self.stop = stop
        self.clock = clock
        self.sleep = sleep

    def serve(self) -> None:
        """Has the next pod serve the files by HTTP, on its loopback interface alone."""
        (container,) = self.manifest["spec"]["containers"]
        server = ["python", "-m", "http.server", str(PORT), "--bind", "127.0.0.1"]
        container["command"] = [*server, "--directory", "/output"]
        ask = f"import socket; socket.create_connection(('127.0.0.1', {PORT})).close()"
        container["readinessProbe"] = {"exec": {"command": ["python", "-c", ask]}}
        container["resources"]["requests"]["memory"] = "64Mi"
        self.serves = True

    def read(self) -> dict[str, bytes] | None:
        """Creates the pod, reads the files and deletes it; None after ``stop``."""
        self.server.delete("Pod", self.name)  # An earlier attempt may have left one.
        while self.server.get("Pod", self.name):
            self.sleep(POLL_SECONDS)
        self.server.apply(self.manifest)
        try:
            if not self._wait_until_running():
                return None
            names = self._find_names()
            # The manifest is the last, as write_files wants it.
            files = (names.model, HISTORY_FILE, names.manifest)
            return self._read_report() | {file: self._read_file(file) for file in files}
        finally:
            with contextlib.suppress(TrainerError):
                self.server.delete("Pod", self.name)

    def _wait_until_running(self) -> bool:
        """Waits, and shows why the pod is pending; False after ``stop``."""
        deadline = self.clock() + START_SECONDS
        shown = None
        while (pod := self.server.get("Pod", self.name)) and not self._runs(pod):
            if self.stop():
                return False
            phase = pod["status"]["phase"]
            reason = pending_reason(pod) or pod["status"].get("message")
            if reason and reason != shown:
                shown = reason
                self.screen.say(f"{self.name} is pending: {reason}")
            if phase == "Failed" or self.clock() > deadline:
                raise ConfigurationError(
                    f"Expected the pod {self.name} to run within {START_SECONDS:g} s, to fetch the "
                    f"files. Received: {reason or phase}."
                )
            self.sleep(POLL_SECONDS)
        return True

    def _runs(self, pod: dict) -> bool:
        if pod["status"]["phase"] != "Running":
            return False
        return not self.serves or is_ready(pod)

    def _find_names(self) -> Names:
        """Returns the names of the run's files, which depend on what it has trained."""
        for names in KINDS:
            with self._if_it_exists():
                self._read_file(names.manifest)
                return names
        return KINDS[0]

    def _read_report(self) -> dict[str, bytes]:
        """Reads the report. A run whose pod was lost after saving the model has none."""
        contents = {}
        for file in REPORT_FILES:
            with self._if_it_exists():
                contents[file] = self._read_file(file)
        return contents

    @contextlib.contextmanager
    def _if_it_exists(self) -> Iterator[None]:
        try:
            yield
        except ConfigurationError as error:
            if "No such file" not in str(error):
                raise

    def _read_file(self, file: str) -> bytes:
        if self.serves:
            return self.server.download(self.name, PORT, file)
        return self.server.read_file(self.name, f"/output/{file}")


def names_of(contents: Container[str]) -> Names:
    """Returns the names of a run's files from those that were fetched."""
    return next(names for names in KINDS if names.manifest in contents)


def _check(contents: dict[str, bytes]) -> None:
    names = names_of(contents)
    model = contents[names.model]
    try:
        json.loads(contents[HISTORY_FILE])
        expected = json.loads(contents[names.manifest])["model"]["sha256"]
    except (ValueError, KeyError, TypeError):
        expected = None
    if hashlib.sha256(model).hexdigest() != expected:
        raise DataError(
            f"Expected {names.model} to have the SHA-256 that {names.manifest} names. "
            f"Received: {len(model):,} bytes with another one."
        )
    for file, ending in _ENDINGS.items():
        if not contents.get(file, ending).endswith(ending):
            raise DataError(f"Expected all of {file}. Received: a part of it.")
