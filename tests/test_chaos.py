"""A few runs of ``make chaos``, which has many."""

import subprocess
import sys

import pytest
from support import ROOT, TIMEOUT

FAULTS = [
    ("storm", 1),
    ("disk-full", 1),
    ("power-cut", 1),
    ("damage", 1),
    ("kill", 2),
    ("stranger", 2),
]


@pytest.mark.full
@pytest.mark.parametrize(("fault", "workers"), FAULTS)
def test_a_run_with_a_fault_ends_as_it_should(fault, workers):
    chaos = [sys.executable, ROOT / "tests" / "chaos.py", "--runs", "1", "--faults", fault]
    chaos += ["--workers", str(workers)]
    done = subprocess.run(chaos, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    if f"Without {fault}" in done.stdout:
        pytest.skip(done.stdout.splitlines()[0])
    assert done.returncode == 0, done.stdout
    assert f"| {fault} | " in done.stdout
