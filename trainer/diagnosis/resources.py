"""What this machine or container gives a run: CPUs, memory, threads and files.

findings = check_resources(config)
"""

import math
from collections.abc import Iterator
from pathlib import Path

from trainer import machine
from trainer.config import TrainConfig
from trainer.diagnosis.finding import Finding
from trainer.distributed.messages import CALLERS

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# A run with the bundled data and its report was seen to take up to 0.87 GB, 11 open files, and 18
# threads with --threads 2, 48 with 16.
RUN_MEMORY = 900_000_000  # Bytes.
BUNDLED_DATA = 55_000_000  # Bytes of that.
RUN_FILES = 16
RUN_THREADS = 16  # And three for each of --threads.


def check_resources(
    config: TrainConfig, workers: int = 1, root: Path = Path("/")
) -> Iterator[Finding]:
    """Compares what this process may use with what a run takes.

    Args:
        config: The configuration of the run.
        workers: Number of workers of the run.
        root: The folder in which ``proc`` and ``sys`` are mounted.
    """
    yield _cpus(config, root)
    yield _memory(root)
    yield from _limits(config, workers, root)


def check_data_memory(size: int, root: Path = Path("/")) -> Iterator[Finding]:
    """Compares the free memory with what a run on data of a size takes.

    Args:
        size: Bytes of the data set.
        root: The folder in which ``proc`` and ``sys`` are mounted.
    """
    free, needed = machine.available_memory(root), RUN_MEMORY + max(0, size - BUNDLED_DATA)
    if free is not None and size > BUNDLED_DATA and free < needed:
        yield Finding(
            "memory",
            "warning",
            f"{_gb(free)} are free, where a run on this data takes about {_gb(needed)}",
            "End other programs, raise the limit, or use --train-limit.",
        )


def check_shared_memory(gpus: int, folder: Path = Path("/dev/shm")) -> Iterator[Finding]:  # noqa: S108
    """Looks at the shared memory, through which NCCL exchanges gradients between GPUs.

    Args:
        gpus: Number of GPUs that the run uses on this machine.
        folder: Where the shared memory is mounted.
    """
    import shutil

    try:
        size = shutil.disk_usage(folder).total
    except OSError:
        size = 0
    if gpus > 1 and size <= 64 * 2**20:
        yield Finding(
            "shared memory",
            "warning",
            f"{size / 2**20:.0f} MiB at {folder}, through which NCCL connects the {gpus} GPUs",
            "In a container: docker run --shm-size=1g; in a pod: k8s/components/gpu",
        )
    else:
        used = "" if gpus > 1 else "; only several GPUs use it"
        yield Finding("shared memory", "ok", f"{size / 2**20:,.0f} MiB at {folder}{used}")


def _cpus(config: TrainConfig, root: Path) -> Finding:
    usable, present = machine.available_cpus(root), machine.affinity_cpus()
    seen = f"{usable} of {machine.processor()}"
    if usable < present:
        seen = f"{usable} of {present}, by the quota of a control group: {machine.processor()}"
    if config.threads > usable:
        return Finding(
            "CPUs",
            "warning",
            f"{seen}, for threads={config.threads}, which will wait for one another",
            f"Leave --threads out for {usable}.",
        )
    return Finding("CPUs", "ok", seen)


def _memory(root: Path) -> Finding:
    free, total = machine.available_memory(root), machine.total_memory(root)
    if free is None or total is None:
        return Finding("memory", "ok", "the system does not tell")
    seen = f"{_gb(free)} free of {_gb(total)}"
    if free < RUN_MEMORY:
        return Finding(
            "memory",
            "warning",
            f"{seen}, where a run takes up to {_gb(RUN_MEMORY)}",
            "End other programs, or raise the container's limit: a run that exceeds it is killed.",
        )
    return Finding("memory", "ok", seen)


def _limits(config: TrainConfig, workers: int, root: Path) -> Iterator[Finding]:
    if resource is None:
        return
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = RUN_FILES + (CALLERS + 2 * workers if workers > 1 else 0)
    yield _compared("open files", files, needed, f"ulimit -n {max(1024, needed)}")
    threads = RUN_THREADS + 3 * config.threads
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    yield _compared(
        "threads",
        min(_unlimited(processes), _unlimited(machine.thread_limit(root))),
        threads,
        "ulimit -u, or the container's limit of processes (docker run --pids-limit)",
    )
    for name, kind, least in (
        ("file size", resource.RLIMIT_FSIZE, 0),
        ("address space", resource.RLIMIT_AS, 0),
        ("data segment", resource.RLIMIT_DATA, 0),
    ):
        limit, _ = resource.getrlimit(kind)
        if _unlimited(limit) != math.inf:
            yield _compared(name, limit, least, "")


def _compared(check: str, limit: float, needed: int, remedy: str) -> Finding:
    limit = _unlimited(limit)
    seen = "no limit" if limit == math.inf else f"at most {limit:,.0f}"
    if limit < needed:
        return Finding(check, "warning", f"{seen}, where a run takes up to {needed:,}", remedy)
    return Finding(check, "ok", seen)


def _unlimited(limit: float | None) -> float:
    """Returns a limit, or infinity where there is none (RLIM_INFINITY is -1)."""
    return math.inf if limit is None or limit < 0 else limit


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
