import os

import pytest

from trainer.machine import total_memory

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
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert total_memory(tmp_path) == (expected or installed)
