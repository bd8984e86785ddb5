"""What several test modules share: the command as a user runs it, points at which it pauses, and
small data.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from trainer.distributed.cluster import Cluster
from trainer.distributed.local import free_ports

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy
    from PIL import Image

ROOT = Path(__file__).parents[1]
TIMEOUT = 1800  # Seconds: only what hangs takes so long, however busy the machine is.

HAS_FAST_STEP = importlib.util.find_spec("trainer.models._winograd") is not None
needs_fast_step = pytest.mark.skipif(
    not HAS_FAST_STEP,
    reason="needs the compiled fast step: no C compiler when the package was installed",
)


class Command:
    """``python -m trainer.task``, run in an empty folder with a clean environment."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder = folder
        self.home = home
        self.prefix: list[str] = []
        self.program = ["-m", "trainer.task"]
        # What a user's shell may hold must not decide a test.
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(
                ("TF_", "KERAS_", "PYTHON", "XLA_", "TFDS_", "TRAINER_", "TPU_", "SLURM_")
            )
        }
        self.env |= {"PYTHONPATH": str(ROOT), "KERAS_HOME": str(home)}

    def argv(self, *flags: object) -> list[str]:
        return [*map(str, (*self.prefix, sys.executable, *self.program, *flags))]

    def run(self, *flags: object, **options) -> subprocess.CompletedProcess:
        options = {"capture_output": True, "text": True, "timeout": TIMEOUT, **options}
        return subprocess.run(
            self.argv(*flags), cwd=self.folder, env=self.env, check=False, **options
        )

    def start(
        self, *flags: object, hooks: Sequence["Pause | Constant"] = (), **options
    ) -> subprocess.Popen:
        """Starts it; the hooks take effect in all processes of the run."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        env = with_hooks(self.env, hooks)
        return subprocess.Popen(self.argv(*flags), cwd=self.folder, env=env, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pause:
    """A point at which a process that a test starts blocks until ``go``.

        pause = Pause(folder=tmp_path / "pause", after_step=(1, 3))
        run = command.start("--steps-per-execution", 1, hooks=[pause])
        pause.wait(run)
        run.send_signal(signal.SIGTERM)
        pause.wait(run, seen="SIGTERM")  # by a parent, say, which passes it on
        pause.go()

    Attributes:
        folder: Where test and process meet; the process creates it.
        after_step: Epoch and step, counted from 1, after which the training loop blocks, once, when
            ``after_call`` has returned; (2, 0) is the end of epoch 1, with its evaluation.
        importing: A module before whose execution it blocks: "tensorflow".
        calling: A function before whose call it blocks: "os:replace".
        call: The number of that call.
        worker: The only worker that blocks; None: all do.
        error: An expression; its value is raised after the pause: "tf.errors.InternalError(...)".
    """

    folder: Path
    after_step: tuple[int, int] | None = None
    importing: str | None = None
    calling: str | None = None
    call: int = 1
    worker: int | None = None
    error: str | None = None
    constant: None = None

    def wait(self, *processes: subprocess.Popen, seen: str = "reached") -> None:
        """Waits until the point is reached, or a signal that came there has been ``seen``."""
        log = self.folder / "log"
        wait_for(lambda: log.exists() and seen in log.read_text().splitlines(), *processes)

    def go(self) -> None:
        """Lets the process go on; before it is there, too."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "go").touch()


@dataclasses.dataclass(frozen=True)
class Constant:
    """Another value of a module's constant: ``Constant("trainer.distributed.parent:STOP", 60)``."""

    constant: str
    value: object
    after_step: None = None
    importing: None = None
    calling: None = None
    worker: None = None


def with_hooks(env: dict[str, str], hooks: Sequence[Pause | Constant]) -> dict[str, str]:
    """Returns an environment in which the hooks take effect in every Python."""
    if not hooks:
        return env
    paths = [str(ROOT / "tests" / "hooks"), env.get("PYTHONPATH", "")]
    content = json.dumps([dataclasses.asdict(hook) for hook in hooks], default=str)
    return {**env, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "TEST_HOOKS": content}


def wait_for(
    condition: Callable[[], object], *processes: subprocess.Popen, seconds: float = TIMEOUT
) -> None:
    """Waits until a condition holds; fails where one of the processes ends before that.

    ``seconds`` only turn a hang into a failure.
    """
    end = time.monotonic() + seconds
    while not condition():
        for process in processes:
            if process.poll() is not None and not condition():
                raise AssertionError(
                    f"ended with {process.returncode} too early: {process.communicate()}"
                )
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    """Returns the processes that a process has started, in that order."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def save_npz(path: Path, train: int = 60, test: int = 20, **arrays) -> Path:
    """Writes an archive of Keras' layout with pictures of noise; ``arrays`` replaces some."""
    noise = np.random.default_rng(0)
    np.savez(
        path,
        **{
            "x_train": noise.integers(0, 256, (train, 28, 28), np.uint8),
            "y_train": np.arange(train) % 10,
            "x_test": noise.integers(0, 256, (test, 28, 28), np.uint8),
            "y_test": np.arange(test) % 10,
            **arrays,
        },
    )
    return path


COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 40), "red": (230, 30, 30)}


def paint(colour: str, noise: np.random.Generator, size: tuple[int, int]) -> "Image.Image":
    """Returns a picture of a colour, with noise."""
    from PIL import Image

    width, height = size
    pixels = noise.normal(COLOURS[colour], 30, (height, width, 3))
    return Image.fromarray(np.uint8(np.clip(pixels, 0, 255)))


class Replicas:
    """``replicas.py`` in processes of its own; see there."""

    numbers = itertools.count()

    def __init__(self, command: Command) -> None:
        self.command = command

    def compute(self, name: str, *, devices: int = 1, **arguments):
        """Returns what one process computes."""
        return self._compute(name, devices, [(None, arguments)])[0]

    def compute_together(self, name: str, arguments: list[dict]) -> list:
        """Returns what several workers compute, one for each of ``arguments``."""
        workers = tuple(f"127.0.0.1:{port}" for port in free_ports(len(arguments)))
        configs = [Cluster(workers, index).tf_config for index in range(len(workers))]
        return self._compute(name, 1, list(zip(configs, arguments, strict=True)))

    def _compute(self, name: str, devices: int, parts: list[tuple[str | None, dict]]) -> list:
        outputs, runs = [], []
        for tf_config, arguments in parts:
            outputs.append(self.command.folder / f"{name}-{next(self.numbers)}.json")
            self.command.env["TF_CONFIG"] = tf_config or ""
            if not tf_config:
                del self.command.env["TF_CONFIG"]
            self.command.program = [ROOT / "tests" / "replicas.py"]
            flags = (name, devices, json.dumps(arguments), outputs[-1])
            # Not a pipe, which would be full of TensorFlow's warnings before anybody reads it.
            with outputs[-1].with_suffix(".err").open("w") as stderr:
                options = {"stdin": subprocess.PIPE, "stdout": None, "stderr": stderr}
                runs.append(self.command.start(*flags, **options))
        try:
            wait_for(lambda: all(output.exists() for output in outputs), *runs)
            return [json.loads(output.read_text()) for output in outputs]
        except AssertionError as error:
            for output in outputs:
                error.add_note(output.with_suffix(".err").read_text()[-4000:])
            raise
        finally:  # Together, when all have what they reduced together.
            for run in runs:
                run.kill()
                run.communicate()


def assert_alike(several: dict, one: dict) -> None:
    """Compares losses and history of float64 runs, as ``replicas.losses`` gives them."""
    np.testing.assert_allclose(several["losses"], one["losses"], rtol=0, atol=1e-9)
    for name, values in one["history"].items():
        np.testing.assert_allclose(several["history"][name], values, rtol=0, atol=1e-9)


def assert_gradients_alike(several: Path, one: Path) -> None:
    """Compares the gradients of every step, as ``replicas.gradients`` writes them."""
    with np.load(several) as a, np.load(one) as b:
        assert len(b.files) == 2 * 8  # steps, variables
        for name in b.files:
            difference = np.linalg.norm(np.float64(a[name]) - b[name])
            assert difference <= 1e-5 * np.linalg.norm(b[name]), name


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Reads the scalars in a folder of TensorBoard's event files: by tag, steps and values."""
    from trainer.runtime import tf

    (path,) = folder.iterdir()
    seen: dict[str, list[tuple[int, float]]] = {}
    for record in tf.data.TFRecordDataset(str(path)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            assert value.metadata.plugin_data.plugin_name == "scalars"
            number = tf.make_ndarray(value.tensor).item()
            seen.setdefault(value.tag, []).append((event.step, number))
    return seen


def outcome(folder: Path) -> tuple[str, dict]:
    """Returns what two runs must have in common that end with the same bits."""
    manifest = json.loads((folder / "mnist.json").read_text())
    history = json.loads((folder / "history.json").read_text())
    history.pop("seconds")
    return manifest["model"]["sha256"], history


def fuzz(examples: int, property_: Callable[..., object], *strategies: "SearchStrategy") -> None:
    """Calls a function with arguments that hypothesis draws: the same in every run.

    What went wrong once is a test of its own: nothing is remembered between runs.
    """
    import hypothesis

    settings = hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    settings(hypothesis.given(*strategies)(property_))()


def damaged(contents: Sequence[bytes]) -> "SearchStrategy":
    """Returns a strategy for damaged copies of files: bytes changed, moved, cut out or put in."""
    from hypothesis import strategies as st

    @st.composite
    def damage(draw: Callable) -> bytes:
        content = draw(st.sampled_from(contents))
        for _ in range(draw(st.integers(0, 4))):
            # The structure is at the ends.
            at = draw(st.integers(0, 300) | st.integers(-600, -1) | st.integers(0, len(content)))
            start = at % (len(content) + 1)
            end = start + draw(st.integers(0, 8) | st.integers(0, len(content)))
            odd = st.sampled_from([b"", b"\xff" * 4, bytes(4), b"\x80", b"[", content[:40]])
            content = content[:start] + draw(st.binary(max_size=8) | odd) + content[end:]
        return content

    return damage()
