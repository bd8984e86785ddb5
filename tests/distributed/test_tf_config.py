"""TF_CONFIG for programs that are not this package's, as the image sets it."""

import json
import subprocess
import sys

import pytest
from support import ROOT

from trainer.distributed.cluster import resolve
from trainer.distributed.tf_config import set_tf_config

JOB = {
    "TRAINER_WORKERS": "2",
    "TRAINER_HOSTS": "a-node-0-{index}.a",
    "JOB_COMPLETION_INDEX": "1",
}
SHOW = "import os, site; site.addsitedir('docker'); print(os.environ.get('TF_CONFIG'))"


def run(*arguments, **environ):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_program_in_a_pod_of_several_finds_the_others():
    done = run("-c", SHOW, **JOB)
    assert done.stderr == ""
    assert json.loads(done.stdout) == {
        "cluster": {"worker": ["a-node-0-0.a:2222", "a-node-0-1.a:2222"]},
        "task": {"type": "worker", "index": 1},
    }


@pytest.mark.parametrize(
    "environ",
    [{}, {**JOB, "TRAINER_WORKERS": "1", "JOB_COMPLETION_INDEX": "0"}],
    ids=["none", "one"],
)
def test_a_program_that_is_alone_finds_nothing(environ):
    assert run("-c", SHOW, **environ).stdout == "None\n"


def test_variables_that_are_wrong_end_the_program():
    done = run("-c", SHOW, **{**JOB, "TRAINER_WORKERS": "many"})
    assert (done.returncode, done.stdout) == (78, "")
    assert "TRAINER_WORKERS" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_is_set_already_stays():
    environ = {**JOB, "TF_CONFIG": "{}"}
    set_tf_config(environ, ["python", "train.py"])
    assert environ["TF_CONFIG"] == "{}"


def test_the_packages_own_commands_read_the_variables_themselves():
    environ = dict(JOB)
    set_tf_config(environ, ["python", "-m", "trainer.task", "--epochs", "2"])
    assert environ == JOB
    set_tf_config(environ, ["python", "-m", "mine"])
    assert resolve({"TF_CONFIG": environ["TF_CONFIG"]}) == resolve(JOB)
