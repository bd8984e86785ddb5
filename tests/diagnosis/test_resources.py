import resource

import pytest

from trainer.config import TrainConfig
from trainer.diagnosis.resources import check_data_memory, check_resources, check_shared_memory


def groups(root, **settings):
    """Makes a machine whose process is in a control group with these settings, and 8 GB."""
    for folder in ("proc/self", "sys/fs/cgroup/a"):
        (root / folder).mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text("0::/a\n")
    (root / "proc" / "meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 7000000 kB\n")
    for name, value in settings.items():
        (root / "sys" / "fs" / "cgroup" / "a" / name.replace("_", ".")).write_text(value)
    return root


def checked(root, *, workers=1, **fields):
    findings = check_resources(TrainConfig(**fields), workers, root)
    return {finding.check: finding for finding in findings}


def test_a_machine_without_limits_is_ok(tmp_path):
    assert {one.status for one in checked(groups(tmp_path), threads=1).values()} == {"ok"}


def test_more_threads_than_the_quota_allows_are_a_warning(tmp_path):
    root = groups(tmp_path, cpu_max="100000 100000")
    found = checked(root, threads=4)["CPUs"]
    assert found.status == "warning"
    assert "threads=4" in found.seen
    assert found.remedy == "Leave --threads out for 1."


def test_a_container_with_little_memory_left_is_a_warning(tmp_path):
    stat = "anon 300000000\ninactive_file 100000000\n"
    settings = {"memory_max": "1000000000", "memory_current": "400000000", "memory_stat": stat}
    found = checked(groups(tmp_path, **settings))["memory"]
    assert found.status == "warning"
    assert found.seen.startswith("0.7 GB free of 1.0 GB")


def test_data_that_the_free_memory_does_not_hold_is_a_warning(tmp_path):
    root = groups(tmp_path)
    assert not list(check_data_memory(5_000_000_000, root))
    (finding,) = check_data_memory(9_000_000_000, root)
    assert finding.status == "warning"


def test_few_processes_are_a_warning(tmp_path):
    found = checked(groups(tmp_path, pids_max="20"), threads=2)["threads"]
    assert found.status == "warning"
    assert found.seen == "at most 20, where a run takes up to 22"


@pytest.fixture
def few_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_few_open_files_are_a_warning_for_several_workers(tmp_path, few_files):
    root = groups(tmp_path)
    assert checked(root)["open files"].status == "ok"
    found = checked(root, workers=4)["open files"]
    assert (found.status, found.remedy) == ("warning", "ulimit -n 1024")


def test_little_shared_memory_is_a_warning_for_several_gpus(tmp_path):
    (finding,) = check_shared_memory(2, tmp_path / "absent")
    assert (finding.status, "--shm-size" in finding.remedy) == ("warning", True)
    (finding,) = check_shared_memory(1, tmp_path / "absent")
    assert finding.status == "ok"
