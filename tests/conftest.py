"""What several test modules need: the command as a user runs it, and small data."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


class Command:
    """``python -m trainer.task``, run in an empty folder with a clean environment."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder = folder
        self.home = home
        self.prefix: list[str] = []
        # What a user's shell may hold must not decide a test.
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("TF_", "KERAS_", "PYTHON", "XLA_", "TFDS_"))
        }
        self.env |= {"PYTHONPATH": str(ROOT), "KERAS_HOME": str(home)}

    def argv(self, *flags: object) -> list[str]:
        return [*self.prefix, sys.executable, "-m", "trainer.task", *map(str, flags)]

    def run(self, *flags: object, **options) -> subprocess.CompletedProcess:
        options = {"capture_output": True, "text": True, "timeout": 300, **options}
        return subprocess.run(
            self.argv(*flags), cwd=self.folder, env=self.env, check=False, **options
        )

    def start(self, *flags: object, **options) -> subprocess.Popen:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        return subprocess.Popen(self.argv(*flags), cwd=self.folder, env=self.env, **options)


@pytest.fixture
def command(tmp_path, tmp_path_factory):
    return Command(tmp_path, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def mnist():
    from trainer import data

    return data.load("bundled")


def save_npz(path: Path, train: int = 60, test: int = 20, **arrays) -> Path:
    """Writes an archive of Keras' layout with pictures of noise; ``arrays`` replaces some."""
    noise = np.random.default_rng(0)
    np.savez(
        path,
        **{
            "x_train": noise.integers(0, 256, (train, 28, 28), np.uint8),
            "y_train": np.arange(train) % 10,
            "x_test": noise.integers(0, 256, (test, 28, 28), np.uint8),
            "y_test": np.arange(test) % 10,
            **arrays,
        },
    )
    return path
