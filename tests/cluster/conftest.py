"""The manifests on a real cluster: the one that KUBECONFIG names, in namespaces of their own.

The image is the manifests' own, ``digits-trainer:VERSION``: load it into the cluster first.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from namespaces import SMALL, Namespace
from submission import Submit


def pytest_collection_modifyitems(items):
    reason = None
    if not shutil.which("kubectl"):
        reason = "kubectl is not on the PATH"
    elif not os.environ.get("KUBECONFIG"):
        reason = "KUBECONFIG names no cluster"
    for item in items:
        if reason and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def namespace():
    with Namespace.make() as one:
        yield one


@pytest.fixture
def submit(namespace, tmp_path):
    started = []

    def start(*flags, **options):
        started.append(Submit(namespace, tmp_path, *flags, **options))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.end()


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    """The weights' digest of ``SMALL`` with two workers on this machine."""
    folder = tmp_path_factory.mktemp("local")
    done = subprocess.run(
        [sys.executable, "-m", "trainer.launch", "--", *SMALL, "--threads=2"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "mnist.json").read_text())["model"]["weights_sha256"]
