"""Measures the trainer on a GPU, beside Keras' fit, PyTorch and JAX on the same card.

    make bench-gpu                              # at most six minutes on an H100
    python bench/gpu.py step peers              # some parts; the others' results stay
    python bench/gpu.py --smoke                 # all of it, small, in a minute: does it work?

Each program (``bench/peers/gpu_*.py``) is a process of its own, so that each has the whole memory
of the card. What is known is written after each of them, as JSON and Markdown, into ``--output``; a
program that fails or whose packages are missing has its last line there in place of figures.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "bench" / "peers"
DATA = ROOT / "trainer" / "data" / "assets" / "mnist.npz"
PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "numpy", "torch", "jax", "jaxlib")
GFLOP_PER_IMAGE = 10.07 / 128  # products of a step, forward and backward (bench/results.py)

# Small enough for a CPU, on which XLA's convolutions take seconds.
SMOKE = ("--batch-sizes", 8, "--train-limit", 16, "--epochs", 2, "--seeds", 1)


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a part.

    Attributes:
        name: For the table.
        needs: The package that it needs.
        words: Arguments of Python.
        smoke: Arguments that a smoke test adds.
    """

    name: str
    needs: str
    words: Sequence[object]
    smoke: Sequence[object] = ()


def _trainer(part: str, *smoke: object) -> Program:
    words = (PEERS / "gpu_trainer.py", DATA, part)
    return Program(f"this trainer: {part}", "tensorflow", words, (*SMOKE, *smoke))


def _peer(name: str, package: str, program: str) -> Program:
    words = (PEERS / program, DATA, "steps", "--batch-sizes", "128,2048")
    return Program(name, package, words, (*SMOKE, *_ONE))


_ONE = ("--precisions", "float32")
_COMMAND = Program(
    "python -m trainer.task",
    "tensorflow",
    ("-m", "trainer.task", "--output-dir", "."),
    ("--train-limit", 16, "--test-limit", 8, "--batch-size", 8, "--epochs", 2),
)

PARTS: dict[str, list[Program]] = {
    "run": [_COMMAND, _trainer("run")],
    "limits": [_trainer("limits")],
    "step": [_trainer("steps", *_ONE)],
    "program": [_trainer("program", *_ONE)],
    "peers": [
        _peer("Keras fit", "tensorflow", "gpu_keras_fit.py"),
        _peer("PyTorch", "torch", "gpu_pytorch.py"),
        _peer("JAX", "jax", "gpu_jax.py"),
    ],
    "recipes": [_trainer("recipes")],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts; returns 1 where a program failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"some of: {', '.join(PARTS)}; all")
    parser.add_argument("--smoke", action="store_true", help="small, on the CPU too")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "gpu")
    parser.add_argument("--seconds", type=float, default=360.0, help="for all of them")
    flags = parser.parse_args(argv)
    if unknown := set(flags.parts) - set(PARTS):
        parser.error(f"expected some of {', '.join(PARTS)}; received {', '.join(unknown)}")
    card = graphics_card()
    if not card and not flags.smoke:
        print("bench/gpu.py: no NVIDIA GPU is seen (nvidia-smi). Use --smoke on a CPU.")
        return 78
    flags.output.mkdir(parents=True, exist_ok=True)
    file = flags.output / ("smoke.json" if flags.smoke else "results.json")
    kept = json.loads(file.read_text()) if file.exists() and flags.parts else {}
    kept |= {"card": card or "none: a smoke test on the CPU", "versions": versions()}
    kept |= {"machine": f"{platform.platform()}, {os.cpu_count()} CPUs"}
    until = time.monotonic() + flags.seconds
    failed = []
    for part in flags.parts or PARTS:
        kept[part] = []
        for program in PARTS[part]:
            start = time.monotonic()
            events, problem = run(program, smoke=flags.smoke, seconds=until - start)
            kept[part] += [{"program": program.name, **event} for event in events]
            if problem:
                kept[part].append({"program": program.name, "event": "problem", "text": problem})
                if not problem.startswith("not installed"):
                    failed.append(program.name)
            print(f"{part}: {program.name}, {time.monotonic() - start:.0f} s {problem}", flush=True)
            file.write_text(json.dumps(kept, indent=1) + "\n")
            file.with_suffix(".md").write_text(render(kept))
    print(file.with_suffix(".md").read_text())
    return 1 if failed else 0


def run(program: Program, *, smoke: bool, seconds: float) -> tuple[list[dict], str]:
    """Runs a program; returns what it says, and what went wrong, or an empty string."""
    if importlib.util.find_spec(program.needs) is None:
        return [], f"not installed: {program.needs}"
    words = [sys.executable, *program.words, *(program.smoke if smoke else ())]
    foreign = ("TF_", "KERAS_", "XLA_", "JAX_", "TRAINER_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])}
    env |= {"TF_CPP_MIN_LOG_LEVEL": "3", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    events: list[dict] = []
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [str(word) for word in words],
            env=env,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            printed, _ = process.communicate(timeout=max(seconds, 1.0))
            problem = f"ended with {process.returncode}" if process.returncode else ""
        except subprocess.TimeoutExpired:
            process.kill()
            printed, _ = process.communicate()
            problem = f"no time left of the {seconds:.0f} s"
        for line in printed.splitlines():
            if line.startswith("{"):
                events.append(json.loads(line))
        errors.seek(0)
        said = [line for line in errors.read().splitlines() if line.strip()]
    if not problem:
        events.append({"event": "ended", "s": time.monotonic() - start})
    if problem and said:
        problem = f"{problem}: {said[-1][:300]}"
    return events, problem


def graphics_card() -> str:
    """Returns name, memory and driver of the first GPU; empty where none is seen."""
    query = ("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(
            ["nvidia-smi", *query],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.splitlines() or [""])[0]


def versions() -> dict[str, str]:
    """Returns the versions of the packages that are measured."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# -- the page


def render(kept: dict) -> str:
    """Returns the page of what is known."""
    packages = ", ".join(f"{name} {version}" for name, version in kept["versions"].items())
    lines = ["# Measured on a GPU", "", f"{kept['card']}; {kept['machine']}; {packages}.", ""]
    lines += ["Written by `make bench-gpu`; `bench/gpu.py` says how.", ""]
    sections: dict[str, Callable[[list[dict]], list[str]]] = {
        "run": _run,
        "limits": _limits,
        "step": lambda events: _steps("A step of this trainer", events, kept),
        "program": _program,
        "peers": lambda events: _steps("A step of the others", events, kept),
        "recipes": _recipes,
    }
    for part, section in sections.items():
        if part in kept:
            lines += [*section(kept[part]), *_problems(kept[part]), ""]
    return "\n".join(lines)


def _of(events: list[dict], kind: str) -> list[dict]:
    return [event for event in events if event["event"] == kind]


def _problems(events: list[dict]) -> list[str]:
    return [f"- {event['program']}: {event['text']}" for event in _of(events, "problem")]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return ["", *(f"| {' | '.join(line)} |" for line in lines), ""]


def _run(events: list[dict]) -> list[str]:
    columns = {
        "total_s": "training to report, s",
        "first_call_s": "first call of the step, s",
        "training_s": "epochs, s",
        "epochs_after_the_first_s": "epochs after the first, s",
        "step_us": "a step, µs",
        "evaluation_s": "an evaluation, s",
        "save_s": "saving, s",
        "report_s": "report, s",
    }
    rows = [
        [event["name"], *(f"{event[name]:,.2f}" for name in columns), f"{event['accuracy']:.2%}"]
        for event in _of(events, "run")
    ]
    lines = ["## The default run", *_table(["", *columns.values(), "test accuracy"], rows)]
    for event in _of(events, "ended"):
        if event["program"] == _COMMAND.name:
            lines += [f"`python -m trainer.task`, from the command to its end: {event['s']:.1f} s"]
    return lines


def _limits(events: list[dict]) -> list[str]:
    lines = ["## What the card does at most", ""]
    for event in _of(events, "limit"):
        if "tflops" in event:
            lines.append(
                f"- products of large matrices, {event['name']}: {event['tflops']:,.1f} TFLOP/s"
            )
        else:
            lines.append(f"- copies in its memory: {event['gbps']:,.0f} GB/s")
    return lines


def _steps(title: str, events: list[dict], kept: dict) -> list[str]:
    most = {e["name"]: e["tflops"] for e in _of(kept.get("limits", []), "limit") if "tflops" in e}
    rows = []
    for event in _of(events, "step"):
        rate = GFLOP_PER_IMAGE * event["batch_size"] / event["us"] * 1e3  # TFLOP/s
        limit = most.get(event["precision"])
        peak = event.get("peak_mb")
        rows.append(
            [
                event["name"],
                event["precision"],
                f"{event['batch_size']:,}",
                f"{event['us']:,.0f}",
                f"{event['batch_size'] / event['us'] * 1e6:,.0f}",
                f"{rate / limit:.0%}" if limit else "not measured",
                f"{event['first_epoch_s']:.1f}",
                f"{peak:,.0f}" if peak else "not measured",
            ]
        )
    columns = ["", "precision", "batch size", "a step, µs", "images/s", "of the matrix rate"]
    return [f"## {title}", *_table([*columns, "first epoch, s", "peak memory, MB"], rows)]


def _program(events: list[dict]) -> list[str]:
    rows = [
        [
            event["precision"],
            f"{event['batch_size']:,}",
            f"{event['launches']:,}",
            f"{event['megabytes']:,.0f}",
        ]
        for event in _of(events, "program")
    ]
    columns = ["precision", "batch size", "launches a step", "read and written, MB a step"]
    return ["## What XLA makes of a step", *_table(columns, rows)]


def _recipes(events: list[dict]) -> list[str]:
    rows = []
    for recipe in ("fast", "best"):
        seeds = [event for event in _of(events, "recipe") if event["name"] == recipe]
        if seeds:
            rows.append(
                [
                    f"--recipe {recipe}",
                    str(len(seeds)),
                    f"{statistics.median(event['fit_s'] for event in seeds):.1f}",
                    f"{statistics.mean(event['accuracy'] for event in seeds):.2%}",
                ]
            )
    return ["## Recipes", *_table(["", "seeds", "with compilation, s", "mean accuracy"], rows)]


if __name__ == "__main__":
    sys.exit(main())
