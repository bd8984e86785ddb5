"""The command, as a user runs it: healthy, and with what it looks at broken on purpose. The checks
one by one are tested in ``diagnosis``.
"""

import io
import json
import shutil

import pytest
from support import HAS_FAST_STEP, ROOT, free_ports

from trainer import cli, doctor
from trainer.config import TrainConfig
from trainer.diagnosis import probe
from trainer.errors import ConfigurationError, DataError


@pytest.fixture
def diagnose(command):
    command.program = ["-m", "trainer.doctor"]

    def run(*flags):
        done = command.run("--json", *flags)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        return done, lines

    return run


def test_a_machine_that_a_run_can_train_on_is_ok_and_left_as_it_was(command, diagnose, tmp_path):
    done, lines = diagnose("--output-dir", "out", "--threads", 1)
    assert (done.returncode, done.stderr) == (0, "")
    statuses = {line["check"]: line["status"] for line in lines}
    assert "error" not in statuses.values()
    expected = {"Python", "versions", "CPUs", "memory", "open files", "threads", "keras.json"}
    expected |= {"proxies", "output folder", "disk", "clocks", "driver", "data", "TensorFlow"}
    expected |= {"devices", "TPU", "CUDA libraries", "training step", "checkpoints", "workers"}
    assert expected <= statuses.keys()
    assert (statuses["training step"] == "ok") == HAS_FAST_STEP
    assert not list(tmp_path.iterdir())
    assert not list(command.home.iterdir())


def test_all_that_is_broken_at_once_is_named(command, diagnose, tmp_path):
    without = shutil.ignore_patterns("_winograd*", "__pycache__")
    shutil.copytree(ROOT / "trainer", tmp_path / "copy" / "trainer", ignore=without)
    (command.home / "keras.json").write_text('{"floatx": "float8"}')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mnist.h5").write_bytes(b"mine")
    own, other = free_ports(2)
    workers = [f"127.0.0.1:{own}", f"digits-1.invalid:{other}"]
    task = {"type": "worker", "index": 0}
    command.env |= {
        "PYTHONPATH": str(tmp_path / "copy"),
        "TF_CONFIG": json.dumps({"cluster": {"worker": workers}, "task": task}),
        "https_proxy": "http://127.0.0.1:9",
        "TRAINER_TERMINATION_LOG": str(tmp_path / "termination-log"),
    }
    command.prefix = ["sh", "-c", 'ulimit -n 64 && exec "$@"', "sh"]
    done, lines = diagnose("--output-dir", "out", "--keep-checkpoints", 10**9)
    assert done.returncode == 78
    bad = {(line["check"], line["status"]) for line in lines if line["status"] != "ok"}
    assert {
        ("keras.json", "error"),
        ("output files", "error"),
        ("TensorFlow", "error"),  # Because of keras.json.
        ("workers", "error"),
        ("proxies", "warning"),
        ("open files", "warning"),
        ("secret", "warning"),
    } <= bad
    (tensorflow,) = (line for line in lines if line["check"] == "TensorFlow")
    assert "floatx" in tensorflow["seen"]
    assert "keras.json, output files, TensorFlow, workers" in done.stderr
    assert (tmp_path / "termination-log").read_text() == done.stderr

    (command.home / "keras.json").unlink()
    done, lines = diagnose("--output-dir", "out", "--keep-checkpoints", 10**9)
    bad = {line["check"]: line for line in lines if line["status"] != "ok"}
    assert bad["disk"]["status"] == "error"
    assert "was not compiled" in bad["training step"]["seen"]
    assert bad["training step"]["remedy"]


def test_each_line_names_the_worker(capsys, monkeypatch, tmp_path):
    workers = ["127.0.0.1:1", "127.0.0.1:2"]
    task = {"type": "worker", "index": 1}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"worker": workers}, "task": task}))
    monkeypatch.setattr(probe, "start", lambda config, *, job: {})
    monkeypatch.setattr("trainer.diagnosis.connections.listen", lambda address: io.BytesIO())
    doctor.main(["--json", "--output-dir", str(tmp_path)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["worker"] for line in lines} == {1}


def test_the_flags_are_those_of_the_training_command(capsys):
    assert doctor.main(["--epochs", "0"]) == 2
    assert "epochs must be" in capsys.readouterr().err
    config = cli.parse(doctor.PROG, doctor.DoctorConfig, ["--seed", "7", "--json"])
    assert (config.json, config.run()) == (True, TrainConfig(seed=7))


def test_a_tensorflow_that_never_starts_is_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "tensorflow.py").write_text("import time\ntime.sleep(1e6)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    report = probe.start(TrainConfig(startup_timeout=1), job=None, seconds=0)
    (error,) = (values["error"] for values in report.values() if "error" in values)
    assert error.startswith("no answer within 1 s")
    assert "strategy" not in report


def test_a_tensorflow_that_crashes_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")  # As in the command.
    (tmp_path / "tensorflow.py").write_text(
        "import os, sys\nprint('no AVX', file=sys.stderr, flush=True)\nos.kill(os.getpid(), 4)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    report = probe.start(TrainConfig(), job=None)
    assert list(report) == ["data", "tensorflow"]
    assert report["tensorflow"]["error"] == "its process was ended by SIGILL. no AVX"


@pytest.mark.parametrize(
    ("error", "named"), [(ConfigurationError("a"), True), (DataError("a"), False)]
)
def test_an_error_of_the_machine_names_the_doctor(capsys, error, named):
    def fail(config):
        raise error

    assert cli.run("prog", TrainConfig, fail, [], advice=cli.ADVICE) == error.exit_code
    assert (cli.DOCTOR in capsys.readouterr().err) == named


def test_a_traceback_names_the_doctor():
    def fail(config):
        raise ImportError("libcudart.so.12")

    with pytest.raises(ImportError) as raised:
        cli.run("prog", TrainConfig, fail, [], advice=cli.ADVICE)
    assert raised.value.__notes__ == [cli.ADVICE]
