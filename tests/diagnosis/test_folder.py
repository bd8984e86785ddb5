import json
import os
import subprocess
from pathlib import Path

import pytest

from trainer.config import TrainConfig
from trainer.diagnosis.folder import check_disk, check_folder
from trainer.locking import hold_lock


def checked(folder, *, waits=False):
    findings = check_folder(TrainConfig(output_dir=folder), waits=waits)
    return {finding.check: finding for finding in findings}


def errors(folder, **options):
    return [one for one in checked(folder, **options).values() if one.status == "error"]


def test_a_folder_that_can_be_written_is_ok_and_left_as_it_was(tmp_path):
    found = checked(tmp_path)
    assert {one.status for one in found.values()} == {"ok"}
    assert found["output folder"].seen == (
        f"{tmp_path}: writing, flushing, renaming work, and locking"
    )
    assert not list(tmp_path.iterdir())


def test_a_folder_that_does_not_exist_is_not_created(tmp_path):
    found = checked(tmp_path / "a" / "b")
    assert found["output folder"].status == "ok"
    assert f"{tmp_path}/a/b, to be created in {tmp_path}" in found["output folder"].seen
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder_or_a_parent_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "link"):
        (error,) = errors(folder)
        assert error.check == "output folder"
        assert "is no folder" in error.seen


def test_where_a_link_leads_is_shown(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert f"which is {tmp_path / 'target'}" in checked(tmp_path / "link")["output folder"].seen


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux' /proc")
def test_a_folder_that_cannot_be_written_is_an_error():
    (error,) = errors(Path("/proc/self"))  # Not for root, either.
    assert error.check == "output folder"
    assert "--output-dir" in error.remedy


def test_a_file_of_another_program_is_an_error_and_stays(tmp_path):
    (tmp_path / "mnist.h5").write_bytes(b"mine")
    (error,) = errors(tmp_path)
    assert error.check == "output files"
    assert "mnist.h5" in error.seen
    assert (tmp_path / "mnist.h5").read_bytes() == b"mine"


def test_checkpoints_that_cannot_be_written_are_an_error(tmp_path):
    (tmp_path / "checkpoints").symlink_to(tmp_path / "nowhere")
    (error,) = errors(tmp_path)
    assert str(tmp_path / "checkpoints") in error.seen


def test_a_folder_in_use_is_an_error_unless_the_run_waits(tmp_path):
    with hold_lock(tmp_path):
        (error,) = errors(tmp_path)
        assert "in use" in error.seen
        assert checked(tmp_path, waits=True)["output files"].status == "warning"


def test_what_a_killed_save_left_is_left(tmp_path):
    manifest = tmp_path / f".mnist.json.{'0' * 16}.tmp"
    manifest.write_text(json.dumps({"model": {"sha256": "0"}}))
    assert not errors(tmp_path)
    assert manifest.exists()


def test_no_folder_for_temporary_files_is_a_warning(tmp_path, monkeypatch):
    def no_folder():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("trainer.diagnosis.folder.tempfile.gettempdir", no_folder)
    assert checked(tmp_path)["temporary files"].status == "warning"
    odd = tmp_path / "r[1]"  # Its checkpoints are read through a link there.
    assert [error.check for error in errors(odd)] == ["temporary files"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
def test_a_disk_with_too_little_room_is_an_error(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", disk], check=True)
    try:
        config = TrainConfig(output_dir=disk)
        finding = check_disk(config, checkpoint=29_000_000, model=9_500_000)
        assert finding.status == "error"
        assert "a run takes up to 137 MB: 3 checkpoints of 29 MB" in finding.seen
        assert "--keep-checkpoints" in finding.remedy
        # What an earlier run has there is replaced.
        checkpoints = disk / "checkpoints"
        checkpoints.mkdir()
        for number in (1, 2, 3):
            with (checkpoints / f"steps-{number}.data-00000-of-00001").open("wb") as file:
                file.truncate(29_000_000)  # It takes no room.
        assert check_disk(config, checkpoint=29_000_000, model=9_500_000).status == "ok"
    finally:
        subprocess.run(["umount", disk], check=True)
