"""What the probe has reported, as findings; and what NVIDIA's driver says.

findings = describe(report, config)
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from trainer.config import TrainConfig
from trainer.diagnosis.finding import Finding
from trainer.diagnosis.folder import check_disk
from trainer.diagnosis.probe import Report
from trainer.diagnosis.resources import check_data_memory, check_shared_memory

SMI_TIMEOUT = 30.0  # Seconds; with a broken driver it may never end.
_NAMES = {
    "data": "data",
    "tensorflow": "TensorFlow",
    "strategy": "devices",
    "libraries": "CUDA libraries",
    "step": "training step",
    "model": "model",
    "resume": "checkpoints",
}


def check_driver(devices: Path = Path("/dev")) -> Finding:
    """Asks NVIDIA's driver for its version and GPUs.

    Args:
        devices: Folder of the device files.
    """
    present = sorted(path.name for path in devices.glob("nvidia[0-9]*"))
    command = shutil.which("nvidia-smi")
    remedy = "Install NVIDIA's driver; for a container, NVIDIA's container toolkit (--gpus all)."
    if command is None:
        if not present:
            return Finding("driver", "ok", "no NVIDIA device, and no nvidia-smi")
        seen = f"{', '.join(present)}, but no nvidia-smi"
        return Finding("driver", "warning", seen, remedy)
    query = [command, "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, timeout=SMI_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("driver", "warning", f"nvidia-smi: {error}", remedy)
    lines = [line.strip() for line in (done.stdout if not done.returncode else "").splitlines()]
    if not any(lines):
        said = " ".join((done.stdout + done.stderr).split())[:200]
        return Finding("driver", "warning", f"nvidia-smi: {said}", remedy)
    return Finding("driver", "ok", "; ".join(filter(None, lines)))


def describe(report: Report, config: TrainConfig, *, writes: bool) -> Iterator[Finding]:
    """Yields what the stages of ``probe`` have found.

    Args:
        report: Of ``probe.start``.
        config: The configuration of the run.
        writes: Whether this worker writes the output folder.
    """
    describers = {
        "data": _data,
        "tensorflow": _tensorflow,
        "strategy": _strategy,
        "libraries": _libraries,
        "step": _step,
    }
    for stage, name in _NAMES.items():
        values = report.get(stage)
        if values is None:
            continue
        if "error" in values:
            yield Finding(name, "error", values["error"])
        elif stage in describers:
            yield from describers[stage](values, config)
        elif writes and stage == "model":
            yield check_disk(config, **values)
        elif writes and stage == "resume":
            yield from _resume(values)


def _data(values: dict, config: TrainConfig) -> Iterator[Finding]:
    if values.get("downloads"):
        yield Finding(
            "data",
            "warning",
            f"data={config.data!r} is read, or downloaded, when a run starts: not checked here",
            "--data bundled, or a file, needs no network.",
        )
        return
    seen = f"{values['train']:,} training and {values['test']:,} test images ({config.data})"
    yield Finding("data", "ok", f"{seen}, SHA-256 {values['sha256']}")
    for notice in values["notices"]:
        yield Finding("data", "warning", notice)
    yield from check_data_memory(values["bytes"])


def _tensorflow(values: dict, config: TrainConfig) -> Iterator[Finding]:
    yield Finding(
        "TensorFlow",
        "ok",
        f"TensorFlow {values['tensorflow']} starts, with Keras {values['keras']}",
    )
    if variables := values["variables"]:
        settings = ", ".join(f"{name}={value}" for name, value in variables.items())
        yield Finding(
            "variables",
            "warning",
            f"{settings}: they decide the last bits of results, or more",
            "Unset them, unless that is meant; the manifest of a run records them.",
        )


def _strategy(values: dict, config: TrainConfig) -> Iterator[Finding]:
    names = f": {', '.join(values['names'])}" if values["names"] else ""
    # A sentence about a GPU that is there and not used is the strategy's.
    unused = "though this machine has one" in values["reason"]
    yield Finding("devices", "warning" if unused else "ok", values["reason"] + names)
    if values["notice"]:
        yield Finding("devices", "warning", values["notice"])
    yield Finding("TPU", "ok", "there is one" if values["tpu"] else "none here, and no TPU_NAME")
    yield from check_shared_memory(values["gpus"])


def _libraries(values: dict, config: TrainConfig) -> Iterator[Finding]:
    if values["cuda"] is None:
        yield Finding("CUDA libraries", "ok", "this TensorFlow is built without CUDA, for CPUs")
    elif missing := values["missing"]:
        driver = missing[0] == "libcuda.so.1"
        yield Finding(
            "CUDA libraries",
            "warning" if config.gpus is None else "error" if config.gpus else "ok",
            f"missing, of those for CUDA {values['cuda']} and cuDNN {values['cudnn']}: "
            f"{', '.join(missing)}",
            " ".join(
                ["libcuda.so.1 comes with the driver."] * driver
                + ["pip install 'digits-trainer[gpu]'"] * (len(missing) > driver)
            ),
        )
    else:
        yield Finding("CUDA libraries", "ok", f"CUDA {values['cuda']}, cuDNN {values['cudnn']}")


def _step(values: dict, config: TrainConfig) -> Iterator[Finding]:
    if not values["reason"]:
        yield Finding("training step", "ok", f"{values['name']}, verified here")
        return
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    remedy = "Install gcc or clang, then digits-trainer again."
    if compiler:
        remedy = f"{compiler} is here: install digits-trainer again, from its sources."
    if "not compiled" not in values["reason"]:
        remedy = "--fast off leaves it out without a word."
    yield Finding("training step", "warning", values["reason"], remedy)


def _resume(values: dict) -> Iterator[Finding]:
    if values["damaged"]:
        yield Finding(
            "checkpoints",
            "warning",
            f"{values['damaged']} of the newest cannot be read: the one before is used, if any",
        )
    if values["position"] is None:
        yield Finding("checkpoints", "ok", "nothing to resume")
        return
    yield Finding("checkpoints", "ok", f"a run resumes at {values['position']}")
    if changes := values.get("changes"):
        yield Finding("checkpoints", "warning", f"the last bits will differ: {', '.join(changes)}")
