"""The files of a run, and placing a file or folder, whole or not at all."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from trainer import files
from trainer.errors import InputError, OutputError


def tree(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*.*")}


@pytest.fixture
def source(tmp_path):
    """A folder with a file and a folder in it."""
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "a.txt").write_text("new")
    (source / "inner" / "b.txt").write_text("new")
    return source


def test_a_file_takes_the_place_of_another(source, tmp_path):
    target = tmp_path / "made" / "here" / "a.txt"
    for content in ("first", "second"):
        (source / "a.txt").write_text(content)
        files.place(source / "a.txt", target)
        assert target.read_text() == content
        assert list(target.parent.iterdir()) == [target]  # and nothing temporary


def test_a_folder_takes_the_place_of_another_whole(source, tmp_path):
    target = tmp_path / "here" / "target"
    files.place(source, target)
    (target / "old.txt").write_text("of the former one alone")
    files.place(source, target)
    assert tree(target) == {"a.txt": "new", "inner/b.txt": "new"}
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_was_there_stays_if_the_disk_fails(source, tmp_path, monkeypatch, kind):
    place = source / "a.txt" if kind == "file" else source
    target = tmp_path / "here" / "target"
    files.place(place, target)
    before = target.read_text() if kind == "file" else tree(target)
    flushed = []

    def fail(path):  # At the last thing that is copied.
        flushed.append(path)
        if path.name.endswith(".tmp"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "flush", fail)
    (source / "a.txt").write_text("newer")
    with pytest.raises(OSError, match="No space left"):
        files.place(place, target)
    assert flushed
    assert before == (target.read_text() if kind == "file" else tree(target))
    assert list(target.parent.iterdir()) == [target]


def test_the_former_folder_is_put_back_if_the_new_one_cannot_take_its_name(
    source, tmp_path, monkeypatch
):
    target = tmp_path / "here" / "target"
    files.place(source, target)
    (target / "a.txt").write_text("old")
    rename = Path.rename

    def fail(path, to):
        if path.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        files.place(source, target)
    assert tree(target)["a.txt"] == "old"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such permissions.")
def test_permissions_are_those_of_new_files(source, tmp_path):
    (source / "a.txt").chmod(0o600)
    files.place(source, tmp_path / "target")
    umask = os.umask(0)
    os.umask(umask)
    for path in (tmp_path / "target").rglob("*.txt"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


FOREIGN = {
    "mnist.h5": b"a model of the user's own",
    "mnist.json": b'{"name": "mnist", "version": "1.0.0"}',
    "history.json": b'{"loss": [0.5, 0.25], "accuracy": [0.9, 0.95]}',
    "report.html": b"<!doctype html><title>Quarterly report</title>",
    "curves.png": b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_program_is_not_replaced(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FOREIGN[name])
    with (
        pytest.raises(OutputError, match=f"{name}. Received: one that no run") as refused,
        files.lock_output_dir(tmp_path),
    ):
        pytest.fail("the folder was taken")
    assert "Move it away" in str(refused.value)
    assert path.read_bytes() == FOREIGN[name]
    assert list(tmp_path.iterdir()) == [path]


def run_files(seed=0):
    """Returns the files of a run, small."""
    model = b"the weights of seed %d" % seed
    manifest = {"run": str(seed), "model": {"sha256": hashlib.sha256(model).hexdigest()}}
    return {
        "mnist.h5": model,
        "history.json": json.dumps({"loss": [seed], "seconds": [1]}).encode(),
        "mnist.json": json.dumps(manifest).encode(),
    }


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_files_of_an_earlier_run_are_replaced(tmp_path):
    for seed in (1, 2):
        with files.lock_output_dir(tmp_path):
            files.write_files(tmp_path, run_files(seed))
    assert contents(tmp_path) == run_files(2)


def test_a_model_that_was_changed_since_is_the_users(tmp_path):
    files.write_files(tmp_path, run_files(1))
    (tmp_path / "mnist.h5").write_bytes(b"trained further")
    with pytest.raises(OutputError, match=r"mnist\.h5"), files.lock_output_dir(tmp_path):
        pytest.fail("the folder was taken")
    assert (tmp_path / "mnist.h5").read_bytes() == b"trained further"


KILLED = """
import os, pathlib, sys
from test_files import run_files
from trainer import files
renames = int(sys.argv[2])
rename = pathlib.Path.replace
def replace(self, target):
    global renames
    if renames == 0:
        os._exit(9)
    renames -= 1
    rename(self, target)
pathlib.Path.replace = replace
files.write_files(pathlib.Path(sys.argv[1]), run_files(2))
"""


@pytest.mark.parametrize(("renames", "seed"), [(0, 1), (1, 2), (2, 2)])
def test_a_save_that_was_killed_leaves_the_files_of_one_run(tmp_path, renames, seed):
    files.write_files(tmp_path, run_files(1))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, str(renames)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        check=False,
    )
    assert done.returncode == 9
    assert len(contents(tmp_path)) > 3  # What it left is there, until the next run.
    with files.lock_output_dir(tmp_path):
        assert contents(tmp_path) == run_files(seed)


@pytest.mark.parametrize("name", [".mnist.h5.tmp", ".mnist.h5.0123456789abcdef.tmp"])
def test_a_link_under_a_temporary_name_is_not_followed(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files.secrets, "token_hex", lambda length: "0123456789abcdef")
    victim = tmp_path / "victim"
    victim.write_text("of the user's")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / name).symlink_to(victim)
    with contextlib.suppress(OutputError), files.lock_output_dir(folder):
        files.write_files(folder, run_files())
    assert victim.read_text() == "of the user's"
    assert (folder / name).is_symlink()


def test_files_that_another_run_wrote_meanwhile_are_noticed(tmp_path):
    files.write_files(tmp_path, run_files(1))
    assert files.is_complete(tmp_path)
    (tmp_path / "mnist.h5").write_bytes(run_files(2)["mnist.h5"])
    assert not files.is_complete(tmp_path)


def test_a_run_that_is_refused_leaves_no_folder(tmp_path):
    folder = tmp_path / "models" / "digits"
    with pytest.raises(InputError), files.lock_output_dir(folder):
        raise InputError("No such data.")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_leaves_the_folder_that_was_there(tmp_path):
    with pytest.raises(InputError), files.lock_output_dir(tmp_path):
        raise InputError("No such data.")
    assert tmp_path.is_dir()


def test_a_run_that_fails_leaves_the_folder_it_has_written_to(tmp_path):
    with contextlib.suppress(InputError), files.lock_output_dir(tmp_path / "out"):
        files.write_files(tmp_path / "out", {"history.json": b"{}"})
        raise InputError("No such data.")
    assert (tmp_path / "out" / "history.json").exists()
