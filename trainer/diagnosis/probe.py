"""What a run does before its first step, done for a diagnosis in a process of its own: there it may
crash or hang, as TensorFlow does with a wrong processor or driver.

    report = start(config, job=None)
    report["strategy"]["reason"]        # "one device: the CPU (no GPU is seen)"
    report["strategy"]["error"]         # or why it failed

The process writes a JSON object for each stage when the stage has ended.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import files, keras_json
from trainer.cli import module_command
from trainer.config import TrainConfig
from trainer.errors import InputError, TrainerError

if TYPE_CHECKING:
    from trainer.training.workload import Workload

SECONDS = 300.0  # To import TensorFlow and build the model, on a slow disk; beside the TPU's time.
STAGES = ("data", "tensorflow", "strategy", "libraries", "step", "model", "resume")

Report = dict[str, dict]

# The names that TensorFlow loads CUDA's libraries by: the major versions that belong to CUDA 12 and
# 13 (https://docs.nvidia.com/cuda/cuda-toolkit-release-notes).
_CUDA_LIBRARIES = {
    "12": {"cufft": "11", "cusolver": "11"},
    "13": {"cufft": "12", "cusolver": "12"},
}


def start(config: TrainConfig, *, job: str | None, seconds: float = SECONDS) -> Report:
    """Runs the stages; returns what each has reported: its ``error``, where it failed. The first
    one that the process did not survive has one, too, and later ones are missing.

    Args:
        config: The configuration of the run.
        job: UID of the Kubernetes Job; None outside one.
        seconds: How long it may take, beside ``startup_timeout``.
    """
    # What it logs is shown where it dies of that.
    environ, end = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0"}, ""
    with tempfile.TemporaryDirectory(prefix="digits-trainer-") as home:
        if not keras_json.read(environ).path.exists():
            environ["KERAS_HOME"] = home  # Keras would leave one behind.
        try:
            done = subprocess.run(
                module_command(__name__),
                input=json.dumps({"config": config.as_dict(), "job": job}),
                env=environ,
                capture_output=True,
                timeout=seconds + config.startup_timeout,
                text=True,
                errors="replace",
                check=False,
            )
            printed, said, code = done.stdout, done.stderr, done.returncode
        except subprocess.TimeoutExpired as expired:
            printed, said, code = _text(expired.stdout), _text(expired.stderr), 0
            end = f"no answer within {expired.timeout:g} s"
    report: Report = {}
    for line in printed.splitlines():
        with contextlib.suppress(ValueError):  # The last one, of a process that was ended.
            report |= json.loads(line)
    missing = [stage for stage in STAGES if stage not in report]
    if missing and "error" not in report.get("tensorflow", {}):
        if code < 0:
            end = f"its process was ended by {signal.Signals(-code).name}"
        last = " ".join(said.strip().splitlines()[-1:])
        report[missing[0]] = {"error": f"{end or 'its process ended'}. {last}".strip()}
    return report


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def main() -> None:
    """Does the stages one by one, and reports each on stdout."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # A library's print is no report.
    request = json.load(sys.stdin)
    config = TrainConfig(**request["config"])
    run = _Run(config, request["job"])
    for stage in STAGES:
        try:
            report = getattr(run, stage)()
        except TrainerError as error:
            report = {"error": str(error)}
        except Exception as error:  # Of any package: the run would end with it, too.
            report = {"error": _described(error)}
        print(json.dumps({stage: report}), file=reports, flush=True)
        if stage == "tensorflow" and "error" in report:
            break


def _described(error: Exception) -> str:
    """Describes an error in one line; one without a text by the line of code that raised it."""
    text = " ".join(str(error).split())
    if not text and (frames := traceback.extract_tb(error.__traceback__)):
        text = f"{frames[-1].line} ({frames[-1].filename})"
    return f"{type(error).__name__}: {text[:300]}"


class _Run:
    """The beginning of a run, in the order of ``trainer.training.run``. Each method is a stage and
    returns its report.
    """

    def __init__(self, config: TrainConfig, job: str | None) -> None:
        self.config = config
        self.job = job
        self.workload: Workload | None = None
        self.accelerator, self.replicas = False, 1
        self.step_name = "keras"

    def data(self) -> dict:
        from trainer.data import sources
        from trainer.training import workloads

        sources.check_installed(self.config.data)
        if sources.downloads(self.config.data):
            return {"downloads": True}
        self.workload = workloads.load(self.config)
        described = self.workload.data
        return {
            "sha256": described["sha256"],
            "train": described["train_examples"],
            "test": described["test_examples"] or described.get("validation_examples", 0),
            "bytes": self.workload.bytes_in_memory,
            "notices": list(self.workload.notices()),
        }

    def tensorflow(self) -> dict:
        from trainer import runtime
        from trainer.reporting import progress  # noqa: F401  (what a run imports, too)
        from trainer.training import assembly, session  # noqa: F401
        from trainer.training.run import configure_tensorflow

        configure_tensorflow(self.config)
        return {
            "tensorflow": runtime.tf.__version__,
            "keras": runtime.keras.__version__,
            "variables": runtime.deciding_variables(os.environ),
        }

    def strategy(self) -> dict:
        from trainer.distributed import cluster
        from trainer.distributed import strategy as strategies
        from trainer.runtime import tf
        from trainer.training import assembly

        workers = cluster.resolve(os.environ)
        if workers:  # Not constructed, which would wait for the others.
            gpus = strategies.check(
                self.config.strategy,
                cluster=workers,
                gpus=self.config.gpus,
                collectives=self.config.collectives,
            )
            each = max(gpus, 1)
            replicas, notice = each * len(workers.workers), ""
            devices = f"{gpus} GPUs" if gpus else "one CPU"
            reason = f"MultiWorkerMirroredStrategy, with {devices} on this worker"
            self.accelerator, self.replicas = gpus > 0, each
        else:
            choice = assembly.create_strategy(self.config)
            self.replicas = replicas = choice.strategy.num_replicas_in_sync
            reason, notice = choice.reason, choice.notice
            self.accelerator = strategies.has_accelerator()
            gpus = strategies.count_gpus(self.config.gpus)
        strategies.check_batch_size(self.config.batch_size, replicas)
        names = [
            tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
            for gpu in tf.config.list_physical_devices("GPU")
        ]
        return {
            "reason": reason,
            "notice": notice,
            "gpus": gpus,
            "names": names,
            "tpu": strategies.has_tpu(os.environ),
        }

    def libraries(self) -> dict:
        from trainer.runtime import tf

        build = tf.sysconfig.get_build_info()
        if not build.get("is_cuda_build"):
            return {"cuda": None}
        cuda, cudnn = str(build["cuda_version"]), str(build["cudnn_version"])
        missing = [
            name for name in cuda_libraries(cuda, cudnn) if not library_loads(name, sys.path)
        ]
        return {"cuda": cuda, "cudnn": cudnn, "missing": missing}

    def step(self) -> dict:
        from trainer.training.assembly import find_step

        if self.workload:
            found = self.workload.find_step(accelerator=self.accelerator)
        else:
            found = find_step(self.config, accelerator=self.accelerator)
        step = found.verify(
            optimizer=self.config.optimizer_name,
            threads=self.config.threads,
            replicas=self.replicas,
        )
        self.step_name = step.name
        return {"name": step.name, "reason": step.reason}

    def model(self) -> dict:
        from trainer import runtime
        from trainer.models import cnn
        from trainer.training.checkpoint import variables_of

        with runtime.keras_defaults():
            # Without the data, which may be downloaded, the network is taken for that for digits.
            model = self.workload.build() if self.workload else cnn.from_config(self.config, 1)
        sizes = {
            part: sum(variable.dtype.size * variable.shape.num_elements() for variable in variables)
            for part, variables in variables_of(model).items()
        }
        return {"checkpoint": sum(sizes.values()), "model": sizes["model"]}

    def resume(self) -> dict:
        from trainer.training import resume
        from trainer.training.checkpoint import Checkpoints
        from trainer.training.manifest import RunManifest
        from trainer.training.position import Position

        checkpoints = Checkpoints(self.config.output_dir, keep=self.config.keep_checkpoints)
        checkpoints.check_ours()
        damaged = 0
        for path in checkpoints.newest_first():
            try:
                state = checkpoints.read_state(path)
            except Exception:  # TensorFlow and JSON have one for each kind of damage.
                damaged += 1
                continue
            if self.workload is None:
                return {"position": str(Position(**state["position"])), "damaged": damaged}
            manifest = RunManifest.create(
                self.config,
                data=self.workload.data,
                step=self.step_name,
                workers=state["environment"]["workers"],
                replicas=state["environment"]["replicas"],
                job=self.job,
            )
            finished = files.read_manifest(self.config.output_dir, self.workload.names).get("run")
            policy = self.config.resume
            if resume.is_obsolete(state, manifest, policy=policy, finished_run=finished):
                break
            resume.check_same_run(state, manifest, where=str(checkpoints.folder))
            return {
                "position": str(Position(**state["position"])),
                "damaged": damaged,
                "changes": resume.changed_environment(state, manifest),
            }
        if self.config.resume == "must":
            raise InputError(
                f"Expected an unfinished run to resume in {checkpoints.folder}. Received: none "
                "that can be read. Use resume='auto' to start one."
            )
        return {"position": None, "damaged": damaged}


def cuda_libraries(cuda: str, cudnn: str) -> list[str]:
    """Names the libraries that TensorFlow loads to compute on GPUs.

    Args:
        cuda: The version of CUDA that TensorFlow was built with.
        cudnn: That of cuDNN.

    >>> cuda_libraries("12.5.1", "9")[:3]
    ['libcuda.so.1', 'libcudart.so.12', 'libcublas.so.12']
    """
    major = cuda.partition(".")[0]
    own = _CUDA_LIBRARIES.get(major, {})
    parts = ("cudart", "cublas", "cublasLt", "cufft", "cusolver", "cusparse", "cupti")
    return [
        "libcuda.so.1",  # The driver's.
        *(f"lib{part}.so.{own.get(part, major)}" for part in parts),
        f"libcudnn.so.{cudnn.partition('.')[0]}",
        "libnccl.so.2",
    ]


def library_loads(name: str, paths: Iterable[str]) -> bool:
    """Tells whether a library can be loaded, by the system or from NVIDIA's Python packages."""
    packaged = [file for path in paths for file in Path(path).glob(f"nvidia/*/lib/{name}")]
    for place in (name, *map(str, packaged)):
        try:
            ctypes.CDLL(place)
            return True
        except OSError:
            continue
    return False


if __name__ == "__main__":
    main()
