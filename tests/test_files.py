"""Placing a file or folder whole or not at all."""

import os
from pathlib import Path

import pytest

from trainer import files


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
