"""python -m trainer.script, and python -m trainer.launch with a script, as a user runs them."""

import json
import os
import signal
import textwrap

import pytest
from keras_models import FEW, MODELS, assert_alike
from support import ROOT, TIMEOUT, Constant, Pause, children

FIT_MODELS = ROOT / "tests" / "fit_models.py"
# A signal must reach the workers, and be obeyed, on a machine that is busy otherwise, too.
PATIENT = Constant("trainer.distributed.parent:STOP_TIMEOUT", 300)

# A model whose layers have no seed, dropout, a metric with a state, and callbacks that remember.
TRAIN = """
import hashlib, json, os, sys
import keras, numpy as np
import trainer

layers, callbacks = keras.layers, keras.callbacks
noise = np.random.default_rng(0)
x = noise.normal(size=(96, 4)).astype("float32")
y = (x.sum(1) > 0).astype("float32")
if "unseeded" not in sys.argv:
    keras.utils.set_random_seed(1)
model = keras.Sequential([
    keras.Input((4,)),
    layers.Dense(8, activation="tanh"),
    layers.BatchNormalization(),
    layers.Dropout(0.2),
    layers.Dense(1, activation="sigmoid"),
])
model.compile(keras.optimizers.Adam(0.02), loss="binary_crossentropy", metrics=["auc"])
history = trainer.fit(
    model,
    (x, y),
    validation_split=0.25,
    epochs=6,
    batch_size=16,
    callbacks=[
        callbacks.EarlyStopping(patience=4, restore_best_weights=True),
        callbacks.ReduceLROnPlateau(patience=1),
        callbacks.ModelCheckpoint("best.keras", save_best_only=True),
        callbacks.CSVLogger("log.csv"),
    ],
    output_dir="out",
    config=trainer.TrainConfig(steps_per_execution=1, checkpoint_every="1"),
)
digest = hashlib.sha256(b"".join(weight.tobytes() for weight in model.get_weights())).hexdigest()
print("weights", digest, flush=True)
if trainer.is_chief():
    with open("history.json", "w") as file:
        json.dump(history.history, file)
"""


@pytest.fixture
def script(command):
    """Writes a script, and returns how to run it."""

    def write(text, *own, launch=True):
        (command.folder / "train.py").write_text(textwrap.dedent(text))
        command.program = ["-m", "trainer.launch" if launch else "trainer.script", *own]
        if launch:
            command.program.append("--")
        return command

    return write


def weights(stdout):
    """Returns the digest of each worker's weights."""
    lines = [line.split() for line in stdout.splitlines() if " weights " in f" {line}"]
    return {worker: digest for worker, _, digest in lines}


def results(folder):
    history = json.loads((folder / "history.json").read_text())
    return history, (folder / "log.csv").read_text()


def fitted(command, name, names, *, batch_size=16, collectives="tensorflow"):
    """Returns what fit_models.py writes, alone or with two workers."""
    flags = ("--collectives", collectives, "--")
    command.program = ["-m", "trainer.script"]
    if name == "two":
        command.program = ["-m", "trainer.launch", "--"]
    done = command.run(
        *(flags if name == "two" else ()), FIT_MODELS, f"{name}.json", batch_size, *names
    )
    assert done.returncode == 0, done.stderr
    return json.loads((command.folder / f"{name}.json").read_text())


def test_two_workers_train_as_one(command):
    assert_alike(fitted(command, "two", FEW), fitted(command, "one", FEW))


@pytest.mark.full
def test_two_workers_train_models_of_any_kind_as_one(command):
    one = fitted(command, "one", MODELS)
    assert_alike(fitted(command, "two", MODELS), one)
    few = {name: one[name] for name in FEW}
    assert_alike(fitted(command, "two", FEW, collectives="ring"), few)


@pytest.fixture(scope="module")
def undisturbed(shared_command):
    (shared_command.folder / "train.py").write_text(TRAIN)
    shared_command.program = ["-m", "trainer.launch", "--"]
    done = shared_command.run("train.py")
    assert done.returncode == 0, done.stderr
    return weights(done.stdout), results(shared_command.folder)


def test_workers_end_with_the_same_weights_and_one_writes(undisturbed):
    digests, (history, log) = undisturbed
    assert digests.keys() == {"[0]", "[1]"}
    assert len(set(digests.values())) == 1
    assert len(log.splitlines()) == 1 + len(history["loss"])


def test_weights_without_a_seed_are_those_of_worker_0(script):
    done = script(TRAIN).run("train.py", "unseeded")
    assert done.returncode == 0, done.stderr
    digests = weights(done.stdout)
    assert len(digests) == 2
    assert len(set(digests.values())) == 1


@pytest.mark.parametrize(
    ("killed", "at"), [(0, (2, 3)), pytest.param(1, (4, 0), marks=pytest.mark.full)]
)
def test_a_run_whose_worker_is_killed_goes_on_to_the_same_bits(
    script, tmp_path, undisturbed, killed, at
):
    command = script(TRAIN)
    pauses = [
        Pause(folder=tmp_path / f"pause-{worker}", worker=worker, after_step=at)
        for worker in (0, 1)
    ]
    launch = command.start("train.py", hooks=pauses)
    for pause in pauses:
        pause.wait(launch)
    worker = children(launch.pid)[killed]
    for pid in (*children(worker), worker):
        os.kill(pid, signal.SIGKILL)
    for pause in pauses:
        pause.go()
    _, stderr = launch.communicate(timeout=TIMEOUT)
    assert launch.returncode == 128 + signal.SIGKILL, stderr
    assert "was lost" in stderr
    done = command.run("train.py")
    assert done.returncode == 0, done.stderr
    assert "Resuming the unfinished run" in done.stdout
    assert (weights(done.stdout), results(command.folder)) == undisturbed


def test_a_launch_restarts_it_though_it_is_to_begin_anew(script, tmp_path, undisturbed):
    anew = TRAIN.replace('checkpoint_every="1"', 'checkpoint_every="1", resume="never"')
    pause = Pause(folder=tmp_path / "pause", worker=1, after_step=(3, 1))
    launch = script(anew, "--max-restarts", 1).start("train.py", hooks=[pause])
    pause.wait(launch)
    os.kill(children(children(launch.pid)[1])[0], signal.SIGKILL)
    pause.go()  # It would pause once more.
    stdout, stderr = launch.communicate(timeout=TIMEOUT)
    assert launch.returncode == 0, stderr
    assert "Resuming the unfinished run" in stdout
    assert (weights(stdout), results(tmp_path)) == undisturbed


def test_sigterm_stops_all_workers_with_a_checkpoint(script, tmp_path, undisturbed):
    command = script(TRAIN)
    pauses = [
        Pause(folder=tmp_path / f"pause-{worker}", worker=worker, after_step=(2, 2))
        for worker in (0, 1)
    ]
    launch = command.start("train.py", hooks=[*pauses, PATIENT])
    for pause in pauses:
        pause.wait(launch)
    launch.send_signal(signal.SIGTERM)
    for pause in pauses:
        pause.wait(launch, seen="SIGTERM")
        pause.go()
    _, stderr = launch.communicate(timeout=TIMEOUT)
    assert launch.returncode == 75, stderr
    assert "The checkpoint is in out/checkpoints" in stderr
    done = command.run("train.py")
    assert (weights(done.stdout), results(command.folder)) == undisturbed


COUNTED = """
import keras, numpy as np, trainer

class Items:
    def __init__(self):
        self.read = []

    def __len__(self):
        return 200

    def __getitem__(self, number):
        self.read.append(number)
        return np.full(4, number, "float32"), float(number)

model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
model.compile(keras.optimizers.SGD(1e-6), loss="mse")
items = Items()
trainer.fit(model, items, epochs=1, batch_size=20, verbose=0)
print("read", *sorted(items.read), flush=True)
"""


def test_each_worker_reads_its_own_half_of_the_examples(script):
    done = script(COUNTED).run("train.py")
    assert done.returncode == 0, done.stderr
    lines = [line.split(" read ")[1] for line in done.stdout.splitlines()]
    read = [list(map(int, line.split())) for line in lines]
    for sample in (0, 0, 100, 199):  # for spec and digest
        for worker in read:
            worker.remove(sample)
    assert [len(worker) for worker in read] == [100, 100]
    assert sorted(read[0] + read[1]) == list(range(200))


DIFFERENT = """
import os, keras, numpy as np, trainer
worker = 0 if trainer.is_chief() else 1
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense({units})])
model.compile("sgd", loss="mse")
x = np.full((8, 4), {value})
trainer.fit(model, (x, x[:, :1]), verbose=0, epochs={epochs}, output_dir="out")
"""


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"value": "worker"}, "data"),
        ({"units": "1 + worker"}, "model"),
        ({"epochs": "1 + worker"}, "arguments"),
    ],
)
def test_workers_that_would_train_something_else_are_refused(script, tmp_path, values, part):
    text = DIFFERENT.format(**{"units": "1", "value": "0", "epochs": "1", **values})
    done = script(text).run("train.py")
    assert done.returncode == 78, done.stderr
    assert f"Expected the same {part} on all workers. Received: another one on worker 1" in (
        done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("launch", [False, True])
@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("import sys; sys.exit(0)", 0, ""),
        ("import sys; sys.exit('no such thing')", 1, "no such thing"),
        ("import sys; sys.exit(66)", 66, ""),
        ("raise ValueError('a fault of the script')", 1, "ValueError: a fault of the script"),
        ("import trainer; trainer.load_data('no.npz')", 66, "no.npz"),
        ("import sys; assert sys.argv == ['train.py', '--lr', '1']; import helper", 0, ""),
    ],
)
def test_a_script_ends_with_its_own_code(script, tmp_path, launch, text, code, message):
    (tmp_path / "helper.py").touch()
    done = script(text, launch=launch).run("train.py", "--lr", 1)
    assert done.returncode == code, done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(
    ("flag", "value", "code"),
    [("--step-timeout", 60, 2), ("--collectives", "ring", 78), ("--gpus", 99, 78)],
)
def test_a_flag_that_one_process_cannot_honour_is_refused(script, tmp_path, flag, value, code):
    done = script("open('ran', 'w')", launch=False).run(flag, value, "--", "train.py")
    assert done.returncode == code, done.stderr
    assert flag in done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_script_that_handles_an_error_of_fit_goes_on(script):
    text = """
    import keras, numpy as np, trainer
    x = np.zeros((8, 4))
    for value in (np.nan, 0.0):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", loss="mse")
        try:
            trainer.fit(model, (x + value, x[:, :1]), verbose=0)
            print("went on", flush=True)
        except trainer.errors.NotFiniteError:
            pass
    """
    done = script(text).run("train.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("went on") == 2


def test_a_script_that_does_not_exist(script):
    for launch in (False, True):
        done = script("", launch=launch).run("other.py")
        assert done.returncode == 66
        assert "error: Expected a Python script at other.py" in done.stderr
        assert done.stderr.count("\n") == 1


def test_fit_refuses_to_train_alone_what_several_were_to(command):
    (command.folder / "train.py").write_text(TRAIN)
    command.program = ["train.py"]
    command.env["TF_CONFIG"] = json.dumps(
        {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}
    )
    done = command.run()
    assert done.returncode == 1
    assert "python -m trainer.script" in done.stderr
