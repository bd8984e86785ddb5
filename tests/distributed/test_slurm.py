"""The tasks of a Slurm job step, from its variables, and the batch script of the documentation."""

import re
import stat
import subprocess
import sys

import pytest
from support import ROOT, TIMEOUT

from trainer.distributed.cluster import resolve
from trainer.distributed.local import free_ports
from trainer.errors import ConfigurationError

# What sbatch, and salloc in its shell, set for a job of two nodes with two tasks each.
JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "n[01-02]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
PORT = 10_000 + 8 * (4711 % 2500)


def step(task, nodes="n[01-02]", counts=(2, 2), **variables):
    """Returns the environment of a task that srun has started, numbered node by node."""
    places = [(node, local) for node, count in enumerate(counts) for local in range(count)]
    return {
        **JOB,
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_NUM_NODES": str(len(counts)),
        "SLURM_STEP_NUM_TASKS": str(len(places)),
        "SLURM_STEP_TASKS_PER_NODE": ",".join(map(str, counts)),
        "SLURM_PROCID": str(task),
        "SLURM_NODEID": str(places[task][0]),
        "SLURM_LOCALID": str(places[task][1]),
        **variables,
    }


@pytest.mark.parametrize(
    ("environ", "workers", "index"),
    [
        (
            step(2),
            (f"n01:{PORT}", f"n01:{PORT + 1}", f"n02:{PORT}", f"n02:{PORT + 1}"),
            2,
        ),
        (
            step(3, "gpu-[7,9-10],login", (1, 1, 1, 1), SLURM_STEP_TASKS_PER_NODE="1(x4)"),
            (f"gpu-7:{PORT}", f"gpu-9:{PORT}", f"gpu-10:{PORT}", f"login:{PORT}"),
            3,
        ),
        (step(1, "n1", (2,), TRAINER_PORT="2222"), ("n1:2222", "n1:2223"), 1),
        # Each of them says more than Slurm.
        (
            step(
                3,
                TF_CONFIG='{"cluster": {"worker": ["a:1", "b:1"]}, "task": '
                '{"type": "worker", "index": 1}}',
            ),
            ("a:1", "b:1"),
            1,
        ),
        (
            step(3, TRAINER_WORKERS="2", TRAINER_HOSTS="a{index}", JOB_COMPLETION_INDEX="1"),
            ("a0:2222", "a1:2222"),
            1,
        ),
    ],
)
def test_the_tasks_of_a_step_are_the_workers(environ, workers, index):
    cluster = resolve(environ)
    assert (cluster.workers, cluster.index) == (workers, index)


def test_jobs_that_share_a_node_do_not_share_ports():
    jobs = [resolve(step(0, "n1", (8,), SLURM_JOB_ID=str(job))).workers for job in (4711, 4712)]
    assert not set(jobs[0]) & set(jobs[1])


@pytest.mark.parametrize(
    "environ",
    [
        JOB,  # the shell of salloc
        {**JOB, "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"},  # a batch script
        # The shell of salloc with LaunchParameters=use_interactive_step, or of srun --pty.
        {**JOB, **step(0, "n01", (1,), SLURM_STEP_ID="4294967290")},
        step(0, TRAINER_WORKERS="1", TRAINER_HOSTS="localhost"),
        step(0, TRAINER_WORKERS="1"),
        step(0, TF_CONFIG="{}"),
    ],
)
def test_one_process_of_a_job_trains_alone(environ):
    assert resolve(environ) is None


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"SLURM_STEP_NUM_TASKS": "many"},
            "Expected SLURM_STEP_NUM_TASKS as srun sets it. Received",
        ),
        ({"SLURM_PROCID": "-1"}, "Expected SLURM_PROCID as srun sets it. Received: '-1'"),
        ({"SLURM_PROCID": None}, "Expected SLURM_PROCID as srun sets it. Received: nothing"),
        ({"SLURM_JOB_ID": ""}, "Expected SLURM_JOB_ID as srun sets it. Received: ''"),
        ({"SLURM_STEP_NODELIST": "n[01-02"}, "Received: 'n[01-02'. TF_CONFIG can"),
        ({"SLURM_STEP_NODELIST": "n01,,n02"}, "Received: 'n01,,n02'"),
        ({"SLURM_STEP_NODELIST": "n01;n02"}, "Received: 'n01;n02'"),
        ({"SLURM_STEP_NODELIST": "n[01-03]"}, "Received: 3 nodes, and 4 tasks on 2"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(2)"}, "SLURM_STEP_TASKS_PER_NODE as srun sets it."),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1"}, "Received: 2 nodes, and 3 tasks on 2"),
        ({"SLURM_NODEID": "1"}, "Use srun --distribution=block"),  # --distribution=cyclic
        ({"SLURM_PROCID": "4"}, "Received: SLURM_PROCID=4 of 4"),
        ({"TRAINER_PORT": "65535"}, "Received: 'n01:65536'"),
        ({"SLURM_STEP_NODELIST": "n01,n01"}, f"Received: 'n01:{PORT}' twice"),
    ],
)
def test_a_malformed_step_is_named(variables, message):
    environ = {name: value for name, value in {**step(1), **variables}.items() if value is not None}
    with pytest.raises(ConfigurationError) as refused:
        resolve(environ)
    assert message in str(refused.value)


# Starts two tasks on this machine, and ends as srun does: with the highest of their exit codes.
SRUN = """#!{python}
import os, subprocess, sys
step = dict(
    SLURM_STEP_NODELIST="localhost", SLURM_STEP_TASKS_PER_NODE="2", SLURM_STEP_NUM_TASKS="2",
    SLURM_NODEID="0",
)
tasks = [
    subprocess.Popen(sys.argv[1:], env=os.environ | step | dict(SLURM_PROCID=n, SLURM_LOCALID=n))
    for n in "01"
]
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.fixture
def batch(command, tmp_path):
    """Returns a function that runs the batch script of docs/workers.md as sbatch does."""
    page = (ROOT / "docs" / "workers.md").read_text()
    (script,) = re.findall(r"```sh\n(#!/bin/bash\n#SBATCH .*?)```", page, re.S)
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, text in (
        ("srun", SRUN.format(python=sys.executable)),
        ("scontrol", '#!/bin/sh\necho "$@" >"$HOME/scontrol"\n'),
        ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n'),
        ("script", script),
    ):
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(stat.S_IRWXU)

    def run(*flags):
        (port,) = free_ports(1)
        env = command.env | JOB | {"TRAINER_PORT": str(port), "HOME": str(tmp_path)}
        env |= {"PATH": f"{bin_dir}:{env['PATH']}", "SLURM_PROCID": "0"}
        return subprocess.run(
            [bin_dir / "script", *map(str, flags)],
            **{"cwd": tmp_path, "env": env, "capture_output": True, "text": True},
            timeout=TIMEOUT,
            check=False,
        )

    return run


@pytest.mark.full
def test_the_batch_script_of_the_documentation_trains_with_all_tasks(batch, tmp_path):
    done = batch("--epochs", 1, "--train-limit", 256, "--test-limit", 100, "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert "no shared secret" not in done.stderr
    assert not list(tmp_path.glob("digits-token-*"))
    assert "MultiWorkerMirroredStrategy over 2 workers" in done.stdout
    assert (tmp_path / "digits" / "mnist.h5").exists()
    assert not (tmp_path / "scontrol").exists()


def test_the_batch_script_of_the_documentation_requeues_what_can_be_resumed(batch, tmp_path):
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nexit 75\n")
    assert batch().returncode == 75
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"
