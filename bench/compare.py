"""Measures the trainer beside the notebook's program in Keras' fit, PyTorch, and JAX with Flax.

    make bench ARGS="--repeats 5"            # everything: some hours; writes bench/results.*
    python bench/compare.py step --repeats 3 # one part; the others' results stay

Each peer's program (``bench/peers/``) does the same work, in an environment of its own of the exact
versions that its requirements name. Within a part all take turns, so that whatever else the machine
does meets all of them; shown are medians, the least and the most, and ratios within a round.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import results

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "bench" / "peers"
DATA = ROOT / "trainer" / "data" / "assets" / "mnist.npz"
ENVIRONMENTS = ROOT / ".venv-bench"
OURS, NOTEBOOK = "this trainer", "Keras fit"

Round = dict[str, float]


@dataclasses.dataclass
class Ran:
    """What was seen of a process: seconds are from its start."""

    seconds: float = 0.0
    megabytes: float = 0.0
    steps: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    epochs: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # with accuracy
    rate: float = float("nan")  # of what it says that it measures

    def step_ms(self, skip: int = 20) -> float:
        """Returns the median time of a step, without the first ones of the first epoch."""
        steps = [(step, at) for step, at in self.steps if step > skip]
        return statistics.median(
            (b_at - a_at) / (b - a) * 1000
            for (a, a_at), (b, b_at) in itertools.pairwise(steps)
            if b > a
        )


def main() -> None:
    """Runs the parts, and writes what is known of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"some of: {', '.join(PARTS)}; all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    flags = parser.parse_args()
    if unknown := set(flags.parts) - set(PARTS):
        parser.error(f"expected some of {', '.join(PARTS)}; received {', '.join(unknown)}")
    for part in flags.parts or PARTS:
        measured: list[Round] = []
        for number in range(flags.repeats):
            measured.append(PARTS[part](flags.threads, number))
            print(f"{part} {number + 1}/{flags.repeats}: {measured[-1]}", flush=True)
            results.write(part, measured, machine())
    results.render()


def machine() -> str:
    """Describes the machine in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    flags = next(line for line in lines if line.startswith("flags")).split()
    best = next((name for name in ("avx512f", "avx2") if name in flags), "neither AVX2")
    return (
        f"{len(os.sched_getaffinity(0))} cores of {model} ({best}), Linux {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def step(threads: int, number: int) -> Round:
    """The time of a step at batch 128, in milliseconds; and the machine's matrix product."""
    product = run([python(), PEERS / "matrix_product.py", "--threads", threads])
    flags = ("--steps", 120, "--epochs", 1, "--threads", threads)
    measured = {
        OURS: peer("trainer_fit", *flags).step_ms(),
        f"{OURS}, --fast off": peer("trainer_fit", *flags, "--fast", "off").step_ms(),
        NOTEBOOK: peer("keras_fit", *flags).step_ms(),
        f"{NOTEBOOK}, same settings": peer("keras_fit", *flags, settings=SETTINGS).step_ms(),
        "PyTorch": peer("pytorch", *flags).step_ms(),
        "JAX": peer("jax_flax", *("--steps", 50, *flags[2:])).step_ms(),
    }
    return {**measured, "matrix product, GFLOP/s": product.rate}


def whole(threads: int, number: int) -> Round:
    """The default run and the notebook's, from the command to the file: seconds, megabytes, and
    the seconds until the notebook's is at 99%.
    """
    with folder() as out:
        ours = command("--threads", threads, "--seed", number, "--output-dir", out)
        accuracy = manifest(out)["metrics"]["val_accuracy"]
        notebook = peer("keras_fit", "--threads", threads, "--output", out / "notebook.h5")
    there = [at for at, reached in notebook.epochs if reached >= 0.99]
    return {
        f"{OURS}, s": ours.seconds,
        f"{NOTEBOOK}, s": notebook.seconds,
        f"{OURS}, MB": ours.megabytes,
        f"{NOTEBOOK}, MB": notebook.megabytes,
        f"{OURS}, accuracy": accuracy,
        f"{NOTEBOOK}, accuracy": notebook.epochs[-1][1],
        f"{NOTEBOOK}, s to 99%": there[0] if there else float("nan"),
    }


def start(threads: int, number: int) -> Round:
    """From the command to the first step, in seconds: ours to the end of a run of one step, with
    its evaluation and its file.
    """
    with folder() as out:
        one = ("--epochs", 1, "--train-limit", 128, "--test-limit", 128, "--no-report")
        ours = command(*one, "--threads", threads, "--output-dir", out)
    flags = ("--steps", 2, "--epochs", 1, "--threads", threads)
    return {
        f"{OURS}, one whole step and mnist.h5": ours.seconds,
        NOTEBOOK: peer("keras_fit", *flags).steps[0][1],
        "PyTorch": peer("pytorch", *flags).steps[0][1],
        "JAX": peer("jax_flax", *flags).steps[0][1],
    }


def pipeline(threads: int, number: int) -> Round:
    """Images a second: what the pipeline alone delivers, and what the step consumes."""
    flags = ("--steps", 120, "--epochs", 1, "--threads", threads)
    return {
        "delivered": run([python(), PEERS / "pipeline_alone.py", DATA, "--threads", threads]).rate,
        "consumed": 128_000 / peer("trainer_fit", *flags).step_ms(),
    }


def recipe_fast(threads: int, number: int) -> Round:
    """``--recipe fast``, whole: seconds and test accuracy of a seed."""
    return _recipe("fast", threads, number)


def recipe_best(threads: int, number: int) -> Round:
    """``--recipe best``, whole: seconds and test accuracy of a seed."""
    return _recipe("best", threads, number)


def _recipe(name: str, threads: int, number: int) -> Round:
    with folder() as out:
        flags = ("--recipe", name, "--seed", number, "--threads", threads, "--output-dir", out)
        ran = command(*flags)
        return {"s": ran.seconds, "accuracy": manifest(out)["metrics"]["val_accuracy"]}


def paths(threads: int, number: int) -> Round:
    """Test accuracy after two epochs of one seed, by the fast step and by Keras'."""
    accuracies = {}
    for fast in ("auto", "off"):
        with folder() as out:
            flags = ("--epochs", 2, "--no-report", "--fast", fast, "--seed", number)
            command(*flags, "--threads", threads, "--output-dir", out)
            accuracies[f"--fast {fast}"] = manifest(out)["metrics"]["val_accuracy"]
    return accuracies


def batch(threads: int, number: int) -> Round:
    """The time of an image, in microseconds, at batch sizes from 32 to 1024."""
    measured = {}
    for size in (32, 64, 128, 256, 512, 1024):
        steps = max(24, 6400 // size)
        flags = ("--steps", steps, "--epochs", 1, "--batch-size", size, "--threads", threads)
        for name, program in ((OURS, "trainer_fit"), (NOTEBOOK, "keras_fit")):
            measured[f"{name}, {size}"] = peer(program, *flags).step_ms(skip=8) / size * 1000
    return measured


def data(threads: int, number: int) -> Round:
    """An epoch of 60,000 images and of ten times as many, by the command: seconds, and megabytes
    beyond those of the images themselves.
    """
    measured = {}
    for copies in (1, 10):
        with folder() as out:
            run([python(), PEERS / "copied_data.py", DATA, copies, out / "data.npz"])
            flags = ("--data", out / "data.npz", "--epochs", 1, "--seed", number)
            ran = command(*flags, "--threads", threads, "--output-dir", out)
            seconds = json.loads((out / "history.json").read_text())["seconds"]
            images = copies * 60_000 * 28 * 28 / 1e6
            measured[f"{copies}x, s an epoch"] = seconds[-1]
            measured[f"{copies}x, MB beyond the images"] = ran.megabytes - images
    return measured


def workers(threads: int, number: int) -> Round:
    """Images a second of one worker on one core; of two, each on one and with as many images a
    step, by ``--collectives ring``; and of two replicas in one process.

    All with one thread inside an operation: the replicas of a process run side by side already, and
    with two threads each they are in one another's way.
    """
    flags = ("--epochs", 2, "--train-limit", 12800, "--test-limit", 128, "--no-report")
    flags = (*flags, "--threads", 1, "--resume", "never")
    twice = (*flags, "--batch-size", 256)
    one, two = (("taskset", "--cpu-list", core) for core in (0, 1))
    measured = {}
    with folder() as out:
        command(*flags, "--output-dir", out, prefix=one)
        measured["one worker"] = _images_per_second(out)
    with folder() as out:
        addresses = [f"127.0.0.1:{_free_port()}" for _ in range(2)]
        settings = [
            {"TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": task})}
            for task in ({"type": "worker", "index": index} for index in range(2))
        ]
        line = (python(), "-m", "trainer.task", *twice, "--collectives", "ring")
        line = (*line, "--output-dir", out)
        other = subprocess.Popen(
            _words(*two, *line), env={**os.environ, **settings[1]}, stdout=subprocess.DEVNULL
        )
        run([*one, *line], settings=settings[0])
        other.wait()
        measured["two workers"] = _images_per_second(out)
    with folder() as out:
        line = (python(), "-c", TWO_DEVICES, *twice, "--strategy", "mirrored")
        run([*line, "--output-dir", out])
        measured["MirroredStrategy, two logical devices"] = _images_per_second(out)
    return measured


# As on a machine with two GPUs, which is where the command itself finds two devices.
TWO_DEVICES = """
import sys
from trainer.runtime import tf
from trainer import task
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, 2 * [tf.config.LogicalDeviceConfiguration()])
sys.exit(task.main())
"""


def _images_per_second(out: Path) -> float:
    seconds = json.loads((out / "history.json").read_text())["seconds"]
    return 12800 / seconds[-1]  # the second epoch: nothing is compiled in it


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


# Each is a function of the threads and the number of the round.
PARTS: dict[str, Callable[[int, int], Round]] = {
    "step": step,
    "start": start,
    "pipeline": pipeline,
    "whole": whole,
    "recipe-fast": recipe_fast,
    "recipe-best": recipe_best,
    "paths": paths,
    "batch": batch,
    "data": data,
    "workers": workers,
}

# What the trainer sets for itself.
SETTINGS = {"TF_ENABLE_ONEDNN_OPTS": "1"}


def peer(name: str, *flags: object, settings: dict[str, str] | None = None) -> Ran:
    """Runs one of the programs in ``peers/``, in its environment."""
    return run([python(name), PEERS / f"{name}.py", DATA, *flags], settings=settings)


def command(*flags: object, prefix: Sequence[object] = ()) -> Ran:
    """Runs ``python -m trainer.task``, as a user does."""
    return run([*prefix, python(), "-m", "trainer.task", *flags])


def python(name: str = "trainer_fit") -> Path | str:
    """Returns the Python of an environment, which is made where it is not there yet."""
    requirements = PEERS / f"requirements-{name}.txt"
    if not requirements.exists():
        return sys.executable
    made = ENVIRONMENTS / name
    kept = made / requirements.name
    if not kept.exists() or kept.read_text() != requirements.read_text():
        print(f"Making {made}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", made], check=True)
        pip = (made / "bin" / "python", "-m", "pip", "install", "--quiet", "--requirement")
        subprocess.run(_words(*pip, requirements), check=True)
        kept.write_text(requirements.read_text())
    return made / "bin" / "python"


def run(words: Sequence[object], *, settings: dict[str, str] | None = None) -> Ran:
    """Runs a program to its end; looks at the clock whenever it says something.

    Raises:
        CalledProcessError: It failed.
    """
    # What this shell has set must not decide a comparison.
    foreign = ("TF_", "KERAS_", "XLA_", "OMP_", "OPENBLAS_", "MKL_", "JAX_", "TRAINER_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    env |= {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", **(settings or {})}
    ran = Ran()
    start = time.perf_counter()
    with subprocess.Popen(
        _words(*words), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            at = time.perf_counter() - start
            event = json.loads(line) if line.startswith("{") else {}
            if event.get("event") == "step" and not ran.epochs:
                ran.steps.append((event["step"], at))
            elif event.get("event") == "epoch" and "accuracy" in event:
                ran.epochs.append((at, event["accuracy"]))
            elif event.get("event") == "rate":
                ran.rate = event["rate"]
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    ran.seconds = time.perf_counter() - start
    ran.megabytes = usage.ru_maxrss / 1024
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, _words(*words), stderr=errors)
    return ran


def manifest(out: Path) -> dict:
    """Returns what a run says of itself."""
    return json.loads((out / "mnist.json").read_text())


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """Gives an empty folder for a moment."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def _words(*words: object) -> list[str]:
    return [str(word) for word in words]


if __name__ == "__main__":
    main()
