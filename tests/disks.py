"""File systems of their own, in a file: small ones that fill up, and those whose power is cut."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def available() -> bool:
    """Tells whether this user can mount a file system here."""
    tools = shutil.which("mkfs.ext4") and Path("/dev/loop-control").exists()
    return os.geteuid() == 0 and bool(tools)


needs_mount = pytest.mark.skipif(
    not available(), reason="only root can mount a file system, with mkfs.ext4 and loop devices"
)


def make(image: Path, megabytes: int) -> None:
    """Makes a file with an empty ext4 file system, with a journal."""
    with image.open("wb") as file:
        file.truncate(megabytes * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)


@contextlib.contextmanager
def mounted(image: Path, folder: Path) -> Iterator[Path]:
    """Mounts the file system in a file; the journal is replayed, as after a power cut."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def cut(image: Path, copy: Path) -> None:
    """Copies a mounted file system as its disk is at this moment, without what is in memory."""
    subprocess.run(["cp", "--sparse=always", image, copy], check=True)
