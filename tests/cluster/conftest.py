"""The manifests on a real cluster: the one that KUBECONFIG names, in namespaces of their own.

The image is the manifests' own, ``digits-trainer:VERSION``: load it into the cluster first.
"""

import os
import shutil
from pathlib import Path

import pytest
from namespaces import Namespace


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
