"""What measures the trainer on a GPU, tried on the CPU, lest it fail when a GPU is at hand."""

import json
import os
import subprocess
import sys

import pytest
from support import ROOT, TIMEOUT

GPU = ROOT / "bench" / "gpu.py"


@pytest.mark.full
def test_the_measurement_on_a_gpu_runs_on_a_cpu(tmp_path):
    done = subprocess.run(
        [sys.executable, GPU, "--smoke", "--output", tmp_path, "--seconds", str(TIMEOUT)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads((tmp_path / "smoke.json").read_text())
    events = {part: [event["event"] for event in kept[part]] for part in PARTS}
    for part, kind in PARTS.items():
        assert kind in events[part], part
    problems = [
        event["text"] for part in PARTS for event in kept[part] if event["event"] == "problem"
    ]
    assert set(problems) <= {"not installed: torch", "not installed: jax"}
    (program,) = (event for event in kept["program"] if event["event"] == "program")
    assert program["launches"] > 20
    page = (tmp_path / "smoke.md").read_text()
    assert "| this trainer, --jit-compile | float32 | 8 |" in page
    assert "a smoke test on the CPU" in page


PARTS = {
    "run": "run",
    "limits": "limit",
    "step": "step",
    "program": "program",
    "peers": "step",
    "recipes": "recipe",
}


def test_without_a_gpu_nothing_is_measured_but_by_a_smoke_test(tmp_path):
    done = subprocess.run(
        [sys.executable, GPU, "--output", tmp_path],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 78
    assert (
        done.stdout == "bench/gpu.py: no NVIDIA GPU is seen (nvidia-smi). Use --smoke on a CPU.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_fails_has_its_last_line_in_the_page(tmp_path):
    import gpu

    program = gpu.Program("broken", "sys", ("-c", "raise SystemExit('out of order')"))
    events, problem = gpu.run(program, smoke=False, seconds=TIMEOUT)
    assert (events, problem) == ([], "ended with 1: out of order")
    missing = gpu.Program("missing", "no_such_package", ("-c", ""))
    assert gpu.run(missing, smoke=True, seconds=TIMEOUT) == ([], "not installed: no_such_package")
    slow = gpu.Program("slow", "sys", ("-c", "import time; time.sleep(1000)"))
    assert gpu.run(slow, smoke=False, seconds=0)[1].startswith("no time left")
    kept = {"card": "a card", "machine": "a machine", "versions": {}, "run": []}
    kept["limits"] = [{"program": "broken", "event": "problem", "text": problem}]
    assert "- broken: ended with 1: out of order" in gpu.render(kept)
