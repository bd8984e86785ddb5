"""Reads the files that a run has left in its claim, through a pod that lives for that long.

files = fetch(server, "digits-a1b2c", image="digits-trainer:0.1.0", screen=screen, stop=stop)
write_files(folder, files)
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable

from trainer.errors import ConfigurationError, DataError, TrainerError
from trainer.files import (
    CURVES_FILE,
    FILES,
    HISTORY_FILE,
    MANIFEST_FILE,
    MODEL_FILE,
    PAGE_FILE,
    REPORT_FILES,
)
from trainer.k8s import manifests
from trainer.k8s.api import Server
from trainer.k8s.follow import Screen, pending

BEGIN = 300.0  # Seconds in which the pod begins.
TRIES = 3  # How often the files are read, when that fails.
TICK = 0.5  # Seconds between two looks at the pod.

# No manifest names their SHA-256.
_ENDS = {PAGE_FILE: b"</html>\n", CURVES_FILE: b"IEND\xaeB`\x82"}


def fetch(
    server: Server, name: str, *, image: str, screen: Screen, stop: Callable[[], str | None]
) -> dict[str, bytes] | None:
    """Reads the files of a run.

    Args:
        server: Where the run is.
        name: Of the run.
        image: Of the pod, one that the cluster has.
        screen: Takes what the pod waits for.
        stop: Tells whether to leave it.

    Returns:
        Contents by name, as ``output.write`` takes them; None: it was told to stop.

    Raises:
        ConfigurationError: The pod does not begin, or the server refuses.
        DataError: The model has not the SHA-256 that the manifest names, or the report is cut off.
    """
    tries = 0
    while True:
        try:
            return _read(server, name, image, screen, stop)
        except (ConfigurationError, DataError) as error:
            tries += 1
            if stop():
                return None
            if tries == TRIES:
                raise
            screen.say(f"Fetching the files failed, trying again: {error}")


def _read(
    server: Server, name: str, image: str, screen: Screen, stop: Callable[[], str | None]
) -> dict[str, bytes] | None:
    manifest = manifests.fetch_pod(name, image=image)
    pod = manifest["metadata"]["name"]
    server.delete("Pod", pod)  # one that an earlier try left
    while server.get("Pod", pod):
        time.sleep(TICK)
    server.apply(manifest)
    try:
        if not _begins(server, pod, screen, stop):
            return None
        files = _report(server, pod)
        # The manifest is the last, as output.write has it.
        files |= {file: server.read_file(pod, f"/output/{file}") for file in FILES}
    finally:
        with contextlib.suppress(TrainerError):
            server.delete("Pod", pod)
    _check(files)
    return files


def _begins(server: Server, pod: str, screen: Screen, stop: Callable[[], str | None]) -> bool:
    """Waits until a pod runs, and says why it does not yet; False: it was told to stop."""
    until = time.monotonic() + BEGIN
    said = None
    while (found := server.get("Pod", pod)) and found["status"]["phase"] != "Running":
        if stop():
            return False
        reason = pending(found) or found["status"].get("message")
        if reason and reason != said:
            said = reason
            screen.say(f"{pod} is pending: {reason}")
        if found["status"]["phase"] == "Failed" or time.monotonic() > until:
            raise ConfigurationError(
                f"Expected the pod {pod} to run within {BEGIN:g} s, to fetch the files. Received: "
                f"{reason or found['status']['phase']}."
            )
        time.sleep(TICK)
    return True


def _report(server: Server, pod: str) -> dict[str, bytes]:
    """Reads what was drawn of the run: nothing, where its pod was stopped before."""
    files = {}
    for file in REPORT_FILES:
        try:
            files[file] = server.read_file(pod, f"/output/{file}")
        except ConfigurationError as error:
            if "No such file" not in str(error):
                raise
    return files


def _check(files: dict[str, bytes]) -> None:
    model = files[MODEL_FILE]
    try:
        json.loads(files[HISTORY_FILE])
        expected = json.loads(files[MANIFEST_FILE])["model"]["sha256"]
    except (ValueError, KeyError, TypeError):
        expected = None
    if hashlib.sha256(model).hexdigest() != expected:
        raise DataError(
            f"Expected {MODEL_FILE} to have the SHA-256 that {MANIFEST_FILE} names. "
            f"Received: {len(model):,} bytes with another one."
        )
    for file, end in _ENDS.items():
        if not files.get(file, end).endswith(end):
            raise DataError(f"Expected {file} to be whole. Received: a part of it.")
