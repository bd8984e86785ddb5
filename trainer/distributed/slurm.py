"""The tasks of a Slurm job step, from the environment variables that ``srun`` sets in each of them.

    srun --nodes 2 --ntasks-per-node 1 python -m trainer.task --epochs 2

    addresses, index = step_tasks(os.environ)    # ["n01:12345", "n02:12345"], 1

    SLURM_STEP_NUM_TASKS        number of tasks
    SLURM_STEP_NODELIST         their nodes: n[01-02],m7
    SLURM_STEP_TASKS_PER_NODE   number of tasks on each node: 1(x2),3
    SLURM_PROCID, SLURM_NODEID, SLURM_LOCALID
                                number of this task, of its node, and of the task on that node
    SLURM_JOB_ID                decides the ports, unless TRAINER_PORT does

Those of the job (SLURM_NTASKS, SLURM_JOB_NODELIST) are not read: a batch script and the shell of
``salloc`` have them too, where one process runs and not one per task
(https://slurm.schedmd.com/srun.html lists all).
"""

import itertools
import re
from collections.abc import Mapping

from trainer.errors import ConfigurationError

# Ports of a job, of 2,500 jobs: from 10000, below those that systems give to outgoing connections.
_PORTS_PER_JOB = 8
_JOBS = 2_500

_SPAN = r"\d{1,6}(?:-\d{1,6})?"
_NODES = rf"(?:[\w.-]|\[{_SPAN}(?:,{_SPAN})*\])+"
_COUNT = r"\d{1,6}(?:\(x\d{1,6}\))?"


def is_step(environ: Mapping[str, str]) -> bool:
    """Tells whether this process is one of several tasks of a job step."""
    return environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def step_tasks(environ: Mapping[str, str]) -> tuple[list[str], int]:
    """Returns the addresses of all tasks of this job step, and the number of this task.

    Each task has the name of its node, and a port of its own there.

    Raises:
        ConfigurationError: The variables are malformed or contradict one another; the message names
            one.
    """
    number = _whole(environ, "SLURM_STEP_NUM_TASKS")
    index = _whole(environ, "SLURM_PROCID")
    place = _whole(environ, "SLURM_NODEID"), _whole(environ, "SLURM_LOCALID")
    port = 10_000 + _PORTS_PER_JOB * (_whole(environ, "SLURM_JOB_ID") % _JOBS)
    if "TRAINER_PORT" in environ:
        port = _whole(environ, "TRAINER_PORT")
    nodes = expand_nodes(_matched(environ, "SLURM_STEP_NODELIST", rf"{_NODES}(?:,{_NODES})*"))
    counts = expand_counts(
        _matched(environ, "SLURM_STEP_TASKS_PER_NODE", rf"{_COUNT}(?:,{_COUNT})*")
    )
    places = [(node, task) for node, count in enumerate(counts) for task in range(count)]
    if len(nodes) != len(counts) or len(places) != number:
        raise ConfigurationError(
            f"Expected SLURM_STEP_NODELIST and SLURM_STEP_TASKS_PER_NODE to name {number} tasks, "
            f"as SLURM_STEP_NUM_TASKS does. Received: {len(nodes)} nodes, and {len(places)} tasks "
            f"on {len(counts)}. {_REMEDY}"
        )
    if index >= number or places[index] != place:
        raise ConfigurationError(
            "Expected tasks that are numbered node by node. Received: "
            f"SLURM_PROCID={index} of {number}, SLURM_NODEID={place[0]}, "
            f"SLURM_LOCALID={place[1]}. Use srun --distribution=block."
        )
    return [f"{nodes[node]}:{port + task}" for node, task in places], index


def expand_nodes(text: str) -> list[str]:
    """Expands a list of nodes, as ``scontrol show hostnames`` does.

    >>> expand_nodes("login,n[1-2,08-09],r[0-1]c[3,5]-ib")
    ['login', 'n1', 'n2', 'n08', 'n09', 'r0c3-ib', 'r0c5-ib', 'r1c3-ib', 'r1c5-ib']
    """
    names: list[str] = []
    for node in re.findall(_NODES, text, re.ASCII):
        choices = [
            [literal] if literal else [name for span in spans.split(",") for name in _expand(span)]
            for literal, spans in re.findall(r"([^][]+)|\[([^][]+)\]", node)
        ]
        names += map("".join, itertools.product(*choices))
    return names


def expand_counts(text: str) -> list[int]:
    """Expands numbers per node.

    >>> expand_counts("3(x2),1")
    [3, 3, 1]
    """
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text, re.ASCII):
        counts += [int(count)] * int(times or 1)
    return counts


def _expand(span: str) -> list[str]:
    first, _, last = span.partition("-")
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]


def _whole(environ: Mapping[str, str], name: str) -> int:
    return int(_matched(environ, name, r"\d{1,9}"))


def _matched(environ: Mapping[str, str], name: str, pattern: str) -> str:
    value = environ.get(name)
    if value is None or not re.fullmatch(pattern, value, re.ASCII):
        raise ConfigurationError(
            f"Expected {name} as srun sets it. Received: "
            f"{'nothing' if value is None else repr(value[:80])}. {_REMEDY}"
        )
    return value


_REMEDY = "TF_CONFIG can describe the workers in its place; TRAINER_WORKERS=1 trains alone."
