"""What this machine offers: its CPUs, its processor, and its memory.

Importing it loads neither NumPy nor TensorFlow.
"""

import contextlib
import ctypes
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import DTypeLike

ALIGNMENT = 64  # bytes; EIGEN_MAX_ALIGN_BYTES of TensorFlow's builds

_M_ARENA_MAX = -8  # of <malloc.h>


def available_cpus(root: Path = Path("/")) -> int:
    """Counts the CPUs this process may use: its affinity, and its control groups' quota rounded up.

    A quota of any group from the process' own up to the mounted root holds: that of a systemd slice
    or of a container around it, too. Versions 2 and 1 are understood (``man 7 cgroups``).

    Args:
        root: The folder in which ``proc`` and ``sys`` are mounted.

    Returns:
        At least 1.
    """
    return max(1, min([affinity_cpus(), *map(math.ceil, _cpu_quotas(root))]))


def affinity_cpus() -> int:
    """Counts the CPUs in this process' affinity mask: TensorFlow's default number of threads."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS and Windows have no affinity to ask for.


def total_memory(root: Path = Path("/")) -> int | None:
    """Returns the bytes of memory this process may use: the machine's, or what its control groups
    limit it to; None where the system does not tell.

    Args:
        root: The folder in which ``proc`` and ``sys`` are mounted.
    """
    try:
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf.
        return None
    limits = _group_settings(root, "memory", ["memory.max"], ["memory.limit_in_bytes"])
    return min([installed, *(int(limit) for limit in limits if limit.isdecimal())])


def available_memory(root: Path = Path("/")) -> int | None:
    """Returns the bytes of memory that are free for this process, or can be freed for it: of the
    machine, and below each limit of its control groups; None where the system does not tell.

    Args:
        root: The folder in which ``proc`` and ``sys`` are mounted.
    """
    free = []
    with contextlib.suppress(OSError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        free.append(int(line.split()[1]) * 1024)
    for text in _group_settings(
        root,
        "memory",
        ["memory.max", "memory.current", "memory.stat"],
        ["memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"],
    ):
        limit, used, *statistics = text.split()
        if limit.isdecimal():
            pages = dict(zip(statistics[::2], statistics[1::2], strict=False))
            # Of version 1 the first is the group's alone, without those in it.
            cached = pages.get("total_inactive_file", pages.get("inactive_file", "0"))
            free.append(int(limit) - int(used) + int(cached))
    return max(0, min(free)) if free else None


def thread_limit(root: Path = Path("/")) -> int | None:
    """Returns the number of processes and threads that this process' control groups allow; None
    where they limit none.

    Args:
        root: The folder in which ``proc`` and ``sys`` are mounted.
    """
    limits = _group_settings(root, "pids", ["pids.max"], ["pids.max"])
    return min((int(limit) for limit in limits if limit.isdecimal()), default=None)


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Yields the quota, in CPUs, of each control group of this process that has one."""
    files = ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    for text in _group_settings(root, "cpu", ["cpu.max"], files):
        with contextlib.suppress(ValueError, ZeroDivisionError):
            quota, period = text.split()
            if quota not in ("max", "-1"):
                yield int(quota) / int(period)


def _group_settings(
    root: Path, controller: str, version2: list[str], version1: list[str]
) -> Iterator[str]:
    """Yields the text of these files, joined, in each control group of this process that has them:
    its own and those around it, of either version.
    """
    mount = root / "sys/fs/cgroup"
    paths = {"": "/", controller: "/"}  # by controller; version 2 names none
    try:
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            paths |= dict.fromkeys(controllers.split(","), path)
    except (OSError, ValueError):
        pass  # The groups at the mounts are left.
    for files, folder, path in (
        (version2, mount, paths[""]),
        (version1, mount / controller, paths[controller]),
    ):
        # Without a cgroup namespace the path is the host's, of which nothing exists below a
        # container's mount; the mount itself is the container's group then.
        group = PurePosixPath(path.lstrip("/"))
        for name in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):
                yield " ".join((folder / name / file).read_text().strip() for file in files)


def processor() -> str:
    """Returns the model name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def aligned_empty(shape: tuple[int, ...], dtype: "DTypeLike") -> "np.ndarray":
    """Returns an uninitialized array that begins where TensorFlow wants its tensors to begin, so
    that TensorFlow can use the same memory without a copy.

    Args:
        shape: The array's.
        dtype: The array's.

    Returns:
        A C-contiguous, writeable array whose address is a multiple of ``ALIGNMENT``.
    """
    import numpy as np

    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def use_one_heap() -> None:
    """Makes glibc use one malloc arena for all threads of this process (``man mallopt``), not up
    to eight per core, each of which keeps freed memory. It changes no result.
    """
    if mallopt := _glibc("mallopt"):
        mallopt(_M_ARENA_MAX, 1)


def trim_heap() -> None:
    """Makes glibc return freed memory to the system (``man malloc_trim``)."""
    if malloc_trim := _glibc("malloc_trim"):
        malloc_trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    """Returns a function of glibc; None where there is another library (macOS, Windows, musl)."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
