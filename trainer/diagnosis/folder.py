"""Whether a run can write its output folder: as ``files`` does, without leaving anything there.

findings = check_folder(config, waits=False)
"""

import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from trainer import files
from trainer.config import TrainConfig
from trainer.diagnosis.finding import Finding
from trainer.errors import OutputError
from trainer.locking import LEASE_FILE, hold_lock

CHECKPOINTS = "checkpoints"
REPORT = 2_000_000  # Bytes of report.html and curves.png, generously.
_CLOCKS_AGREE = 5.0  # Seconds.


def check_folder(config: TrainConfig, *, waits: bool) -> Iterator[Finding]:
    """Tries in the output folder, or where it would be created, what a run does there.

    Args:
        config: The configuration of the run.
        waits: Whether the run waits for another one that is using the folder, as in a Job.
    """
    folder = config.output_dir.absolute()
    existing = nearest(folder)
    where = str(folder) if existing == folder else f"{folder}, to be created in {existing}"
    if folder.resolve() != folder:
        where += f", which is {folder.resolve()}"
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is no folder")
        lock, drift = _try_to_write(existing)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        yield Finding(
            "output folder",
            "error",
            f"{where}: {reason}",
            "Make room or permission there, or use another --output-dir.",
        )
        return
    except OutputError as error:
        yield Finding("output folder", "error", str(error))
        return
    yield Finding("output folder", "ok", f"{where}: writing, flushing, renaming work, and {lock}")
    if existing == folder:
        yield from _check_content(folder, waits)
    yield from _check_temporary_folder(folder)
    yield _clocks(drift)


def check_disk(config: TrainConfig, *, checkpoint: int, model: int) -> Finding:
    """Compares the free room with what a run writes.

    Args:
        config: The configuration of the run.
        checkpoint: Bytes of a checkpoint.
        model: Bytes of the model.
    """
    folder = config.output_dir.absolute()
    # A checkpoint or model is written before the oldest, or the one in its place, goes.
    needed = (config.keep_checkpoints + 1) * checkpoint + 2 * model + REPORT
    free = shutil.disk_usage(nearest(folder)).free
    reused = sum(path.stat().st_size for path in (folder / CHECKPOINTS).glob("steps-*.*"))
    seen = (
        f"{_mb(free)} free at {nearest(folder)}; a run takes up to {_mb(needed)}: "
        f"{config.keep_checkpoints} checkpoints of {_mb(checkpoint)}, and one while it is written"
    )
    if free + reused < needed:
        return Finding("disk", "error", seen, "Make room, or use --keep-checkpoints 1.")
    return Finding("disk", "ok", seen)


def nearest(folder: Path) -> Path:
    """Returns a path, or the nearest of its parents, that exists, if only as a link."""
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


def _try_to_write(existing: Path) -> tuple[str, float]:
    """Writes and locks in a temporary folder; returns the kind of the lock, and the seconds by
    which the file system's clock is ahead.
    """
    with tempfile.TemporaryDirectory(prefix=".digits-trainer-", dir=existing) as name:
        scratch = Path(name)
        files.replace_files(scratch, {"probe": bytes(4096)})
        drift = (scratch / "probe").stat().st_mtime - time.time()
        with hold_lock(scratch):
            leased = (scratch / LEASE_FILE).exists()
    return ("a lease in place of locks" if leased else "locking"), drift


def _check_content(folder: Path, waits: bool) -> Iterator[Finding]:
    """Looks for another run that is using the folder, and for files that are no run's."""
    try:
        files.check_output_dir(folder)
    except OutputError as error:
        in_use = "no other run is using" in str(error)
        yield Finding("output files", "warning" if in_use and waits else "error", str(error))
        return
    except OSError as error:
        yield Finding("output files", "error", f"{folder} cannot be read: {error.strerror}")
        return
    checkpoints = folder / CHECKPOINTS
    if os.path.lexists(checkpoints):
        try:
            if not checkpoints.is_dir():
                raise NotADirectoryError("it is no folder")
            _try_to_write(checkpoints)
        except (OSError, OutputError) as error:
            yield Finding(
                "output files",
                "error",
                f"{checkpoints} cannot be written: {getattr(error, 'strerror', None) or error}",
                "Move it away, or make it writable.",
            )
            return
    yield Finding("output files", "ok", "nothing that a run would have to replace is another's")


def _check_temporary_folder(folder: Path) -> Iterator[Finding]:
    """Looks for the folder of temporary files, through which odd names are reached."""
    try:
        yield Finding("temporary files", "ok", tempfile.gettempdir())
    except OSError as error:
        needed = bool(set(str(folder)) & set("*?[\\"))
        yield Finding(
            "temporary files",
            "error" if needed else "warning",
            error.strerror or str(error),
            "Let TMPDIR name a folder that can be written.",
        )


def _clocks(drift: float) -> Finding:
    """Compares the clocks that can be known: this machine's, the file system's, and the date at
    which this program was installed. Those of other workers cannot be, and no run compares them.
    """
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    installed = Path(files.__file__).stat().st_mtime
    if time.time() < installed:
        return Finding(
            "clocks",
            "warning",
            f"{now}, which is before this program was installed: downloads will fail",
            "Set the clock (timedatectl set-ntp true).",
        )
    if abs(drift) > _CLOCKS_AGREE:
        return Finding(
            "clocks",
            "warning",
            f"{now}; the output folder's file system is {drift:+,.0f} s from it, which confuses "
            "make and backups, and no run",
            "Set both clocks by NTP.",
        )
    return Finding("clocks", "ok", f"{now}, and the output folder's agrees: no run compares others")


def _mb(size: float) -> str:
    return f"{math.ceil(size / 1e6):,} MB"
