import os

import pytest

from trainer.machine import available_memory, thread_limit, total_memory

needs_sysconf = pytest.mark.skipif(not hasattr(os, "sysconf"), reason="Windows tells nothing.")


@needs_sysconf
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"sys/fs/cgroup/memory.max": "1000000\n"}, 1_000_000),
        ({"sys/fs/cgroup/memory.max": "max\n"}, None),
        ({"sys/fs/cgroup/memory.max": f"{2**62}\n"}, None),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000\n"}, 2_000_000),
        (
            {
                "proc/self/cgroup": "0::/a.slice/b.scope\n",
                "sys/fs/cgroup/a.slice/memory.max": "3000000\n",
                "sys/fs/cgroup/a.slice/b.scope/memory.max": "4000000\n",
            },
            3_000_000,
        ),
    ],
)
def test_the_memory_is_the_machines_or_the_smallest_limit(tmp_path, files, expected):
    write(tmp_path, files)
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert total_memory(tmp_path) == (expected or installed)


GROUP = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    7 kB\n"}, 7 * 1024),
        (
            {
                "proc/meminfo": "MemAvailable: 9000000 kB\n",
                "sys/fs/cgroup/memory.max": "5000\n",
                "sys/fs/cgroup/memory.current": "4000\n",
                "sys/fs/cgroup/memory.stat": "anon 2500\ninactive_file 1500\n",
            },
            2500,
        ),
        (
            {
                f"{GROUP}/memory.limit_in_bytes": "5000\n",
                f"{GROUP}/memory.usage_in_bytes": "4000\n",
                f"{GROUP}/memory.stat": "inactive_file 100\ntotal_inactive_file 500\n",
            },
            1500,
        ),
    ],
)
def test_the_free_memory_includes_files_that_are_only_cached(tmp_path, files, expected):
    write(tmp_path, files)
    assert available_memory(tmp_path) == expected


def test_the_smallest_limit_of_threads_is_that_of_any_group_around(tmp_path):
    assert thread_limit(tmp_path) is None
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/pids.max": "30\n",
            "sys/fs/cgroup/a/b/pids.max": "max\n",
        },
    )
    assert thread_limit(tmp_path) == 30


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
