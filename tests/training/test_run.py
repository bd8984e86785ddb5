"""The library's calls: they do what the command does, or say why not."""

import ast
import functools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support import ROOT, TIMEOUT, Command, outcome

from trainer.training.session import Session

SMALL = {"epochs": 2, "train_limit": 256, "test_limit": 100, "batch_size": 64, "report": False}

FIT = """
import json, sys
import trainer
config = trainer.TrainConfig(**json.loads(sys.argv[1]))
model, history = trainer.train(config)
print(json.dumps(history["val_accuracy"]))
"""


def flags(settings):
    return [
        word
        for name, value in settings.items()
        for word in (
            [f"--{'' if value else 'no-'}{name.replace('_', '-')}"]
            if isinstance(value, bool)
            else [f"--{name.replace('_', '-')}", value]
        )
    ]


def call(command, program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=command.folder,
        env=command.env,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )


@pytest.fixture(scope="module")
def by_command(tmp_path_factory):
    """Gives the folder of a run of the command, with ``TF_ENABLE_ONEDNN_OPTS`` or without."""

    @functools.cache
    def with_onednn(value=None):
        folder = tmp_path_factory.mktemp("command")
        command = Command(folder, folder)
        if value:
            command.env["TF_ENABLE_ONEDNN_OPTS"] = value
        done = command.run(*flags(SMALL))
        assert done.returncode == 0, done.stderr
        return folder

    return with_onednn


# Without oneDNN the operations are others: those that TensorFlow has where a processor has AVX2
# alone, unless it is switched on.
@pytest.mark.parametrize("onednn", [None, pytest.param("0", marks=pytest.mark.full)])
def test_fit_ends_with_the_same_files_as_the_command(command, by_command, tmp_path, onednn):
    if onednn:
        command.env["TF_ENABLE_ONEDNN_OPTS"] = onednn
    called = call(command, FIT, json.dumps({**SMALL, "output_dir": "call"}))
    assert called.returncode == 0, called.stderr
    assert outcome(tmp_path / "call") == outcome(by_command(onednn))
    manifest = json.loads((tmp_path / "call" / "mnist.json").read_text())
    assert manifest["environment"]["TF_ENABLE_ONEDNN_OPTS"] == (onednn or "1")
    assert (
        json.loads(called.stdout.splitlines()[-1])
        == json.loads((tmp_path / "call" / "history.json").read_text())["val_accuracy"]
    )


def test_fit_resumes_the_run_that_another_process_left(command, by_command, tmp_path):
    settings = {**SMALL, "output_dir": "out", "steps_per_execution": 1}
    stopped = call(
        command,
        "import os, signal, keras, trainer\n"
        "class Stop(keras.callbacks.Callback):\n"
        "    def on_train_batch_end(self, batch, logs=None):\n"
        "        if batch == 2: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"trainer.train(trainer.TrainConfig(**{settings}), callbacks=[Stop()])\n",
    )
    assert "StoppedError: stopped by SIGTERM at epoch 1, step 3" in stopped.stderr
    assert not (tmp_path / "out" / "mnist.h5").exists()
    called = call(command, FIT, json.dumps({**settings, "resume": "must"}))
    assert called.returncode == 0, called.stderr
    assert "at epoch 1, step 3" in called.stdout
    assert outcome(tmp_path / "out") == outcome(by_command())


TWO = json.dumps(
    {
        "cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]},
        "task": {"type": "worker", "index": 0},
    }
)


# In one process: each is refused before anything of TensorFlow is set.
REFUSED = [
    ({"strategy": "multiworker"}, "Received: none described"),
    ({"step_timeout": 5}, "step_timeout=5 and one process"),
    ({"collectives": "ring"}, "Received: one process"),
    ({"gpus": 64}, "gpus=64"),
    ({"threads": 1}, "Expected to set threads=1"),
    ({"train_limit": 60_001}, "train_limit=60001"),
    ({"batch_size": 257}, "batch_size=257"),
]
REFUSE = """
import json, sys
import trainer
from trainer.runtime import set_threads, tf
set_threads(2)
tf.constant(0) + 0  # TensorFlow runs, with two threads.
for settings in json.loads(sys.argv[1]):
    try:
        trainer.train(trainer.TrainConfig(**{"threads": 2, **settings}))
    except trainer.errors.TrainerError as error:
        print(error)
"""


def test_what_fit_cannot_honour_it_refuses(command, tmp_path):
    asked = [{**SMALL, "output_dir": "out", **settings} for settings, _ in REFUSED]
    called = call(command, REFUSE, json.dumps(asked))
    assert called.returncode == 0, called.stderr
    lines = called.stdout.splitlines()
    for (settings, part), line in zip(REFUSED, lines, strict=True):
        assert part in line, settings
    assert not (tmp_path / "out").exists()


def test_fit_is_no_worker_of_several(command, tmp_path):
    command.env["TF_CONFIG"] = TWO
    called = call(command, FIT, json.dumps({**SMALL, "output_dir": "out"}))
    assert "ConfigurationError: Expected one process" in called.stderr
    assert "with 2 workers" in called.stderr
    assert not (tmp_path / "out").exists()


def test_one_process_of_a_described_cluster_can_be_asked_to_train_alone(command):
    command.env["TF_CONFIG"] = TWO
    called = call(command, FIT, json.dumps({**SMALL, "strategy": "one", "epochs": 1}))
    assert called.returncode == 0, called.stderr


def test_every_setting_of_tensorflow_is_set(command):
    called = call(
        command,
        "import trainer\n"
        f"settings = {SMALL}\n"
        "trainer.train(trainer.TrainConfig(**settings, threads=1, precision='float32',"
        " deterministic=True))\n"
        "from trainer.runtime import tf\n"
        "from tensorflow.python.framework import config\n"
        "assert tf.config.threading.get_intra_op_parallelism_threads() == 1\n"
        "assert not tf.config.experimental.tensor_float_32_execution_enabled()\n"
        "assert config.is_op_determinism_enabled()\n",
    )
    assert called.returncode == 0, called.stderr


# What a program may rely on staying as it was, but for what TensorFlow's own import changes.
UNCHANGED = """
import json, os, signal, sys
before = dict(os.environ), signal.getsignal(signal.SIGINT), os.fstat(2)
if sys.argv[1] == "trainer":
    import trainer
    assert not {"tensorflow", "keras", "numpy"} & set(sys.modules)
    trainer.load_data("bundled")
    assert "tensorflow" not in sys.modules
    import trainer.runtime
else:
    import tensorflow, keras
    keras.Sequential
print(sorted(name for name, value in os.environ.items() if before[0].get(name) != value))
assert signal.getsignal(signal.SIGINT) is before[1]
assert os.fstat(2) == before[2]
"""


def test_importing_the_library_changes_one_variable(command):
    ours, tensorflows = (call(command, UNCHANGED, name) for name in ("trainer", "tensorflow"))
    assert ours.returncode == 0, ours.stderr
    changed, expected = (set(ast.literal_eval(run.stdout)) for run in (ours, tensorflows))
    assert changed - expected == {"TF_ENABLE_ONEDNN_OPTS"}


def test_evaluate_and_load_model_say_what_the_commands_say(command, weak_model_file):
    called = call(
        command,
        "import sys, trainer\n"
        "data = trainer.load_data('bundled').first(10, 500)\n"
        "scores = trainer.evaluate(trainer.load_model(sys.argv[1]), data)\n"
        "print(scores.accuracy)\n",
        weak_model_file,
    )
    assert called.returncode == 0, called.stderr
    command.program = ["-m", "trainer.evaluate"]
    done = command.run(weak_model_file, "--test-limit", 500, "--json")
    assert json.loads(done.stdout)["accuracy"] == float(called.stdout)


def test_arrays_of_the_callers_are_trained_on(command, by_command, tmp_path):
    called = call(
        command,
        "import trainer\n"
        "data = trainer.load_data('bundled').first(256, 100)\n"
        f"settings = {SMALL}\n"
        "trainer.train(trainer.TrainConfig(**settings, output_dir='arrays'), data)\n",
    )
    assert called.returncode == 0, called.stderr
    assert outcome(tmp_path / "arrays") == outcome(by_command())


def test_keras_json_and_a_global_dtype_policy_decide_nothing(command, by_command, tmp_path):
    (command.home / "keras.json").write_text(json.dumps({"floatx": "float16", "epsilon": 0.1}))
    called = call(
        command,
        "import keras, trainer\n"
        "keras.config.set_dtype_policy('mixed_float16')\n"
        f"settings = {SMALL}\n"
        "model, _ = trainer.train(trainer.TrainConfig(**settings))\n"
        "assert {layer.compute_dtype for layer in model.layers} == {'float32'}\n"
        "assert keras.config.floatx() == 'float16' and keras.config.epsilon() == 0.1\n"
        "assert keras.config.dtype_policy().name == 'mixed_float16'\n",
    )
    assert called.returncode == 0, called.stderr
    assert outcome(tmp_path) == outcome(by_command())


def test_the_package_says_what_is_public():
    done = subprocess.run(
        [sys.executable, "-c", "import trainer; print(*trainer.__all__)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [
        "TrainConfig",
        "evaluate",
        "fit",
        "is_chief",
        "load_data",
        "load_model",
        "train",
    ]


def test_the_command_sums_by_the_ring_where_it_is_asked_to(command, tmp_path):
    command.program = ["-m", "trainer.launch"]
    done = command.run("--workers", 2, "--", *flags(SMALL), "--collectives", "ring")
    assert done.returncode == 0, done.stderr
    assert "by the ring" in done.stdout
    assert "not summed by the ring" not in done.stdout
    manifest = json.loads((tmp_path / "mnist.json").read_text())
    assert manifest["environment"]["collectives"] == "ring"
    assert manifest["environment"]["workers"] == 2


@pytest.mark.parametrize(("summed", "notices"), [(9, 1), (10, 0)])
def test_gradients_that_bypass_the_ring_are_noticed_once(summed, notices):
    said = []
    session = object.__new__(Session)
    session.ring, session.first_sums = SimpleNamespace(summed=summed), 10
    session.watcher = SimpleNamespace(say=lambda text, event: said.append(event))
    for _ in range(2):
        session._check_ring()
    assert said == ["notice"] * notices


def test_errors_of_several_workers_are_json_lines_that_name_the_worker(command):
    command.program = ["-m", "trainer.launch"]
    done = command.run("--workers", 2, "--", "--data", "nowhere.npz", "--log-format", "json")
    assert done.returncode == 66
    entries = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert {entry["worker"] for entry in entries if entry["event"] == "error"} == {0, 1}
    assert all(entry["exit_code"] == 66 for entry in entries)


def test_importing_a_command_hides_no_function_of_that_name():
    program = "import trainer, trainer.evaluate, trainer.task; print(trainer.evaluate.__doc__[:18])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "Measures a model: \n"
