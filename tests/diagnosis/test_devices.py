import _ctypes

import pytest

from trainer.config import TrainConfig
from trainer.diagnosis.devices import check_driver, describe
from trainer.diagnosis.probe import cuda_libraries, library_loads

# Of a run on one GPU, as ``probe.start`` returns it.
HEALTHY = {
    "data": {"sha256": "0" * 64, "train": 60, "test": 20, "bytes": 62_720, "notices": []},
    "tensorflow": {"tensorflow": "2.21.0", "keras": "3.15.1", "variables": {}},
    "strategy": {
        "reason": "one device: GPU 0 of 1",
        "notice": "",
        "gpus": 1,
        "names": ["NVIDIA L4"],
        "tpu": False,
    },
    "libraries": {"cuda": "12.5.1", "cudnn": "9", "missing": []},
    "step": {"name": "keras", "reason": ""},
    "model": {"checkpoint": 28_571_300, "model": 9_523_784},
    "resume": {"position": None, "damaged": 0},
}


def described(stage="data", writes=True, gpus=None, folder=None, **values):
    report = {**HEALTHY, stage: {**HEALTHY[stage], **values}}
    config = TrainConfig(gpus=gpus, output_dir=folder or ".")
    return list(describe(report, config, writes=writes))


def unwell(*arguments, **values):
    return [finding for finding in described(*arguments, **values) if finding.status != "ok"]


def test_a_healthy_run_is_ok(tmp_path):
    findings = described(folder=tmp_path)
    assert {finding.status for finding in findings} == {"ok"}
    (devices,) = (finding for finding in findings if finding.check == "devices")
    assert devices.seen == "one device: GPU 0 of 1: NVIDIA L4"


@pytest.mark.parametrize(("gpus", "status"), [(None, "warning"), (1, "error")])
def test_each_cuda_library_that_is_missing_is_named(tmp_path, gpus, status):
    missing = ["libcusparse.so.12", "libcudnn.so.9"]
    (finding,) = unwell("libraries", gpus=gpus, folder=tmp_path, missing=missing)
    assert (finding.check, finding.status) == ("CUDA libraries", status)
    assert finding.seen.endswith("libcusparse.so.12, libcudnn.so.9")
    assert "driver" not in finding.remedy
    (finding,) = unwell("libraries", gpus=gpus, folder=tmp_path, missing=["libcuda.so.1"])
    assert finding.remedy == "libcuda.so.1 comes with the driver."


def test_the_libraries_are_those_of_the_version_of_cuda():
    assert {"libcufft.so.11", "libcusparse.so.12"} <= set(cuda_libraries("12.5.1", "9"))
    assert {"libcufft.so.12", "libcudnn.so.9"} <= set(cuda_libraries("13.0", "9.8.0"))


def test_a_library_is_found_where_pythons_packages_have_it(tmp_path):
    assert not library_loads("libnothing.so.1", [str(tmp_path)])
    folder = tmp_path / "nvidia" / "nothing" / "lib"
    folder.mkdir(parents=True)
    (folder / "libnothing.so.1").symlink_to(_ctypes.__file__)
    assert library_loads("libnothing.so.1", [str(tmp_path)])


def test_a_gpu_that_is_not_used_is_a_warning(tmp_path):
    reason = "one device: the CPU (no GPU is seen, though this machine has one. Do this.)"
    (finding,) = unwell("strategy", folder=tmp_path, reason=reason, names=[])
    assert (finding.status, finding.seen) == ("warning", reason)


@pytest.mark.parametrize("stage", HEALTHY)
def test_what_would_end_a_run_is_an_error_with_its_sentence(tmp_path, stage):
    error = "Expected this. Received: that."
    (finding,) = unwell(stage, folder=tmp_path, error=error)
    assert (finding.status, finding.seen) == ("error", error)


def test_variables_that_decide_bits_are_named(tmp_path):
    (finding,) = unwell("tensorflow", folder=tmp_path, variables={"XLA_FLAGS": "--xla_a"})
    assert (finding.status, "XLA_FLAGS=--xla_a" in finding.seen) == ("warning", True)


def test_what_a_resumed_run_would_do_is_shown(tmp_path):
    values = {"position": "epoch 2, step 3", "damaged": 1, "changes": ["keras is 3 and was 2"]}
    damaged, changed = unwell("resume", folder=tmp_path, **values)
    assert (damaged.status, changed.status) == ("warning", "warning")
    assert "keras is 3 and was 2" in changed.seen


def test_a_worker_that_writes_nothing_has_no_word_of_the_disk(tmp_path):
    checks = {finding.check for finding in described(writes=False, folder=tmp_path)}
    assert not {"disk", "checkpoints"} & checks


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Returns a function that makes ``nvidia-smi`` a script, for a machine with one GPU."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv("PATH", str(tmp_path))

    def make(script):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    return make


def test_the_driver_tells_its_version(tmp_path, smi):
    smi("echo '550.54.15, NVIDIA L4, 23034 MiB'")
    finding = check_driver(tmp_path)
    assert (finding.status, finding.seen) == ("ok", "550.54.15, NVIDIA L4, 23034 MiB")


def test_a_driver_that_does_not_work_is_a_warning(tmp_path, smi):
    assert check_driver(tmp_path).seen == "nvidia0, but no nvidia-smi"
    smi("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    finding = check_driver(tmp_path)
    assert finding.status == "warning"
    assert "version mismatch" in finding.seen


def test_a_machine_without_gpus_needs_no_driver(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_driver(tmp_path).status == "ok"
