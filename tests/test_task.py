"""The command as a user runs it: each exit code by running it, and what it leaves behind."""

import hashlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import HAS_FAST_STEP, TIMEOUT, Pause, events, save_npz

from trainer.files import FILES, REPORT_FILES, lock_output_dir, write_files

# As small as a run can be: a few seconds, most of them TensorFlow's start.
DRAWN = ("--epochs", 1, "--train-limit", 256, "--test-limit", 100)
SMALL = (*DRAWN, "--no-report")

FILES = set(FILES)


def assert_one_line(done, code, *parts):
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("python -m trainer.task: error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def manifest(folder):
    return json.loads((folder / "mnist.json").read_text())


def test_a_run_ends_with_the_files_and_says_so(command, tmp_path, tmp_path_factory):
    word = tmp_path_factory.mktemp("dev") / "termination-log"
    command.env["TRAINER_TERMINATION_LOG"] = str(word)
    done = command.run(*DRAWN)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(word.read_text())
    assert "test accuracy" in word.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, *REPORT_FILES}
    made = manifest(tmp_path)
    assert f"SHA-256 {made['model']['sha256']}" in done.stdout
    assert f"test accuracy {made['metrics']['val_accuracy']:.2%}" in done.stdout
    assert made["config"]["train_limit"] == 256
    assert made["data"]["train_examples"] == 256
    assert set(made["versions"]) == {"digits-trainer", "python", "tensorflow", "keras", "numpy"}


@pytest.mark.full
def test_the_seed_alone_decides_the_weights(command, tmp_path):
    runs = [
        command.start(*SMALL, "--seed", seed, "--threads", 1, "--output-dir", name)
        for name, seed in (("a", 7), ("b", 7), ("c", 8))
    ]
    for run in runs:
        assert run.wait(TIMEOUT) == 0, run.stderr.read()
        run.stdout.close()
        run.stderr.close()
    a, b, c = (manifest(tmp_path / name)["model"]["weights_sha256"] for name in "abc")
    assert a == b
    assert a != c


def test_json_lines_tell_the_whole_run(command, tmp_path):
    done = command.run(*SMALL, "--log-format", "json", "--output-dir", "out")
    assert (done.returncode, done.stderr) == (0, "")
    start, strategy, *steps, epoch, end = map(json.loads, done.stdout.splitlines())
    if not HAS_FAST_STEP:
        notice = steps.pop(0)
        assert notice["event"] == "notice"
        assert "gcc or clang" in notice["message"]
    assert start["event"] == "start"
    assert (strategy["event"], strategy["replicas"]) == ("strategy", 1)
    assert strategy["message"].startswith("one device")
    assert start["config"]["train_limit"] == 256
    assert all(step["event"] == "step" for step in steps)
    assert (epoch["event"], epoch["epoch"], epoch["epochs"]) == ("epoch", 1, 1)
    assert end["event"] == "done"
    assert end["model"] == manifest(tmp_path / "out")["model"]
    assert end["metrics"]["val_loss"] == epoch["val_loss"]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--epoch", "1"], "Perhaps you meant --epochs"),
        (["--optimizer", "adadelt"], "optimizer must be one of adadelta, "),
        (["--batch-size", "0"], "Received: batch_size=0. Use 128"),
        (["--batch-size", "many"], "many"),
        (["--epochs", "-1"], "Received: epochs=-1"),
        (["--learning-rate", "nan"], "Received: learning_rate=nan"),
        (["--train-limit", "60001"], "at most the 60000 examples"),
        (
            ["--train-limit", "100", "--batch-size", "101"],
            "Use batch_size=100 or less. (--batch-size)",
        ),
    ],
)
def test_usage_is_2(command, flags, part):
    assert_one_line(command.run(*flags), 2, part)


def test_damaged_data_is_65(command, tmp_path):
    command.env["TRAINER_TERMINATION_LOG"] = str(tmp_path / "termination-log")
    path = save_npz(tmp_path / "digits.npz")
    path.write_bytes(path.read_bytes()[:-1])
    done = command.run("--data", path)
    assert_one_line(done, 65, str(path), "Fetch or make it again")
    assert (tmp_path / "termination-log").read_text() == done.stderr
    save_npz(path, y_test=np.full(20, 10))
    assert_one_line(command.run("--data", path), 65, "Received: none of class 10")


def test_a_missing_input_is_66(command):
    done = command.run("--data", "nowhere.npz", "--output-dir", "out")
    assert_one_line(done, 66, "nowhere.npz", "Use data='bundled'")
    assert not (command.folder / "out").exists()


def test_an_unreachable_network_is_66(command):
    command.env |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = command.run("--data", "keras")
    assert done.returncode == 66
    assert "keras.datasets.mnist" in done.stderr.splitlines()[-1]
    assert done.stderr.endswith("Use data='bundled', which needs no network. (--data)\n")


@pytest.mark.full
def test_an_unreachable_tensorflow_dataset_is_66(command, tmp_path):
    command.env |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    command.env["TFDS_DATA_DIR"] = str(tmp_path / "tfds")
    done = command.run("--data", "tfds:mnist", timeout=TIMEOUT)
    assert_one_line(done, 66, "'mnist'", "Use data='bundled', which needs no network.")


def test_a_loss_that_becomes_nan_is_70_and_keeps_the_files(command, tmp_path):
    content = b"of an earlier run"
    model = {"sha256": hashlib.sha256(content).hexdigest()}
    earlier = {
        "mnist.h5": content,
        "mnist.json": json.dumps({"model": model}).encode(),
        "history.json": b'{"seconds": []}',
    }
    write_files(tmp_path, earlier)
    done = command.run(*SMALL, "--optimizer", "sgd", "--learning-rate", 1e30)
    assert done.returncode == 70
    assert done.stderr.count("\n") == 1
    assert "in epoch 1, step" in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == earlier


def test_an_output_that_cannot_be_written_is_73(command, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_line(command.run("--output-dir", "file"), 73, "Received: File exists")
    (tmp_path / "locked").mkdir(mode=0o555)
    if os.geteuid() == 0:  # Root may write anywhere, until that right is taken away.
        command.prefix = ["setpriv", "--bounding-set", "-dac_override"]
    assert_one_line(command.run("--output-dir", "locked"), 73, "Received: Permission denied")
    assert_one_line(command.run("--output-dir", "locked/new"), 73, "Permission denied")


def test_a_folder_in_use_is_73(command, tmp_path):
    with lock_output_dir(tmp_path):
        assert_one_line(command.run(), 73, "no other run is using", "Wait for that run")


def test_a_python_without_tensorflow_is_78(command, tmp_path):
    for name in ("tensorflow", "keras"):  # an import that fails, as where nothing is installed
        (tmp_path / "empty" / name).mkdir(parents=True)
        (tmp_path / "empty" / name / "__init__.py").write_text(
            f"raise ModuleNotFoundError(name={name!r})"
        )
    command.env["PYTHONPATH"] += os.pathsep + str(tmp_path / "empty")
    assert_one_line(command.run(), 78, "pip install 'digits-trainer[cpu]'")


def test_another_backend_of_keras_is_78(command):
    command.env["KERAS_BACKEND"] = "numpy"
    assert_one_line(command.run(), 78, "Received: KERAS_BACKEND=numpy")


def test_a_keras_json_with_which_keras_cannot_be_imported_is_78(command):
    (command.home / "keras.json").write_text('{"floatx": "float8"}')
    assert_one_line(command.run(), 78, "keras.json has floatx='float8'. Correct or remove it.")


@pytest.mark.full
def test_a_keras_json_of_another_project_changes_nothing(command):
    (command.home / "keras.json").write_text(
        json.dumps({"backend": "numpy", "image_data_format": "channels_first"})
    )
    done = command.run(*SMALL, "--output-dir", "out")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("format", ["plain", "json"])
def test_an_error_is_a_line_of_the_log_format(command, tmp_path, format):
    done = command.run("--data", "nowhere.npz", "--log-format", format)
    assert done.returncode == 66
    (line,) = done.stderr.splitlines()
    if format == "json":
        entry = json.loads(line)
        assert (entry["event"], entry["severity"], entry["exit_code"]) == ("error", "ERROR", 66)
        assert entry["worker"] == 0
        assert entry["time"].endswith("Z")
        line = entry["message"]
    assert line.startswith("python -m trainer.task: error: Expected a data source")


def test_a_wrong_flag_is_json_where_json_is_asked_for(command):
    done = command.run("--epochs", "many", "--log-format=json")
    assert done.returncode == 2
    assert "--epochs" in json.loads(done.stderr)["message"]


# Where a run has nothing to lose yet: before TensorFlow starts, and when it has.
BEFORE = [{"importing": "tensorflow"}, {"calling": "trainer.distributed.strategy:create"}]


@pytest.mark.parametrize("point", BEFORE)
@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGINT, 130, "interrupted."),
        pytest.param(signal.SIGTERM, 75, "stopped by SIGTERM.", marks=pytest.mark.full),
    ],
)
def test_a_signal_before_the_first_step_is_one_line(command, tmp_path, point, number, code, says):
    pause = Pause(folder=tmp_path / "pause", **point)
    run = command.start("--log-format", "plain", "--output-dir", "out", hooks=[pause])
    pause.wait(run)
    run.send_signal(number)
    stdout, stderr = run.communicate(timeout=TIMEOUT)
    assert run.returncode == code
    assert stderr == f"python -m trainer.task: {says} The files in out are unchanged.\n"
    assert stdout == ""
    assert not (tmp_path / "out").exists()


# Building, tracing, and training; in the middle of tracing an exception would come out as another.
DURING = [
    {"calling": "trainer.models.cnn:from_config"},
    {"calling": "trainer.training.objective:PerExample._sums"},
    {"after_step": (1, 2)},
]


@pytest.mark.parametrize(
    ("number", "point"),
    [
        (signal.SIGINT, DURING[1]),
        (signal.SIGTERM, DURING[2]),
        *(
            pytest.param(number, point, marks=pytest.mark.full)
            for number in (signal.SIGINT, signal.SIGTERM)
            for point in DURING
        ),
    ],
)
def test_a_signal_during_training_is_75_and_leaves_a_checkpoint(command, tmp_path, point, number):
    pause = Pause(folder=tmp_path / "pause", **point)
    run = command.start(*SMALL, "--steps-per-execution", 1, "--output-dir", "out", hooks=[pause])
    pause.wait(run)
    run.send_signal(number)
    pause.wait(run, seen=number.name)
    pause.go()
    _, stderr = run.communicate(timeout=TIMEOUT)
    assert run.returncode == 75
    step = 2 if "after_step" in point else 1
    assert stderr.startswith(
        f"python -m trainer.task: stopped by {number.name} at epoch 1, step {step}. "
    )
    assert stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoints"]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)]
)
def test_a_second_signal_ends_at_once_and_says_what_is_left(command, tmp_path, number):
    pause = Pause(folder=tmp_path / "pause", after_step=(1, 2))
    flags = (*SMALL, "--checkpoint-every", 1, "--steps-per-execution", 1, "--output-dir", "out")
    run = command.start(*flags, hooks=[pause])
    pause.wait(run)
    for name in (number.name, None):
        run.send_signal(number)
        if name:
            pause.wait(run, seen=name)
    _, stderr = run.communicate(timeout=TIMEOUT)
    assert run.returncode == (130 if number == signal.SIGINT else 75)
    assert stderr.endswith(
        " The checkpoint at epoch 1, step 2 is in out: the same command resumes the run.\n"
    )
    assert "at epoch 1, step 2" in command.run(*flags).stdout


def test_a_terminal_sees_a_bar(command):
    main, side = pty.openpty()
    command.env |= {"TERM": "xterm", "COLUMNS": "100"}
    run = command.start(*SMALL, "--steps-per-execution", 1, stdout=side)
    os.close(side)
    seen = b""
    while True:
        try:
            if select.select([main], [], [], TIMEOUT)[0]:
                seen += os.read(main, 65536)
        except OSError:  # The other side is closed: the run is over.
            break
    _, stderr = run.communicate(timeout=TIMEOUT)
    os.close(main)
    assert (run.returncode, stderr) == (0, "")
    text = seen.decode()
    assert "images/s" in text
    assert "2/2" in text
    assert "test accuracy" in text


@pytest.mark.full
def test_event_files_are_written_without_the_package_tensorboard(command, tmp_path):
    (tmp_path / "empty" / "tensorboard").mkdir(parents=True)
    (tmp_path / "empty" / "tensorboard" / "__init__.py").write_text("raise ModuleNotFoundError")
    command.env["PYTHONPATH"] += os.pathsep + str(tmp_path / "empty")
    out = tmp_path / "out"
    done = command.run(*SMALL, "--tensorboard", "--output-dir", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in out.iterdir()} == {*FILES, "tensorboard"}
    assert_events_are_the_history(out)


def assert_events_are_the_history(folder):
    history = json.loads((folder / "history.json").read_text())
    epochs = range(len(history["loss"]))
    for part, prefix in (("train", ""), ("validation", "val_")):
        seen = events(folder / "tensorboard" / part)
        rates = seen.pop("epoch_learning_rate", None)
        assert (rates == [(epoch, 1.0) for epoch in epochs]) == (part == "train")
        assert seen == {
            f"epoch_{name}": [
                (epoch, np.float32(history[prefix + name][epoch])) for epoch in epochs
            ]
            for name in ("loss", "accuracy")
        }


@pytest.mark.full
def test_a_stopped_runs_event_files_go_on_where_it_does(command, tmp_path):
    flags = ("--epochs", 4, *SMALL[2:], "--tensorboard", "--steps-per-execution", 1)
    for epoch in (1, 2):
        pause = Pause(folder=tmp_path / f"pause-{epoch}", after_step=(epoch + 1, 0))
        run = command.start(*flags, hooks=[pause])
        pause.wait(run)
        run.send_signal(signal.SIGTERM)
        pause.wait(run, seen="SIGTERM")
        pause.go()
        _, stderr = run.communicate(timeout=TIMEOUT)
        assert run.returncode == 75, stderr
    assert command.run(*flags).returncode == 0
    assert_events_are_the_history(tmp_path)
    # A new run does not go on with them, nor with what does not belong to it.
    assert command.run("--epochs", 1, *flags[2:]).returncode == 0
    assert_events_are_the_history(tmp_path)


@pytest.mark.full
def test_a_folder_of_events_that_cannot_be_written_is_73(command, tmp_path):
    (tmp_path / "tensorboard").write_text("")
    done = command.run(*SMALL, "--tensorboard")
    assert done.returncode == 73
    assert "Expected to write event files in tensorboard. Received: " in done.stderr
    assert done.stderr.endswith("or use tensorboard=False. (--tensorboard)\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_while_the_report_is_drawn_costs_the_report_alone(
    command, tmp_path, number, times
):
    pause = Pause(folder=tmp_path / "pause", calling="trainer.reporting.charts:png")
    run = command.start(*DRAWN, "--output-dir", "out", hooks=[pause])
    pause.wait(run)
    run.send_signal(number)
    pause.wait(run, seen=number.name)
    if times == 2:
        run.send_signal(number)
    else:
        pause.go()
    stdout, stderr = run.communicate(timeout=TIMEOUT)
    assert (run.returncode, stderr) == (0, "")
    notice = f"No report.html: stopped by {number.name}. mnist.h5 is complete."
    assert notice in stdout.splitlines()
    assert stdout.splitlines()[-2].startswith("test accuracy ")
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)
    assert_loads(tmp_path / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux' /dev/full")
@pytest.mark.parametrize("log_format", ["json", pytest.param("plain", marks=pytest.mark.full)])
def test_a_full_disk_under_stdout_costs_the_log_alone(command, tmp_path, log_format):
    with Path("/dev/full").open("w") as full:
        done = command.run(
            *SMALL,
            *("--log-format", log_format, "--output-dir", "out"),
            capture_output=False,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert done.returncode == 0
    assert done.stderr == (
        "stdout cannot be written (No space left on device): what it cannot take is dropped\n"
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


@pytest.mark.full
def test_closed_streams_end_no_run(command, tmp_path):
    program = ["sh", "-c", 'exec "$0" "$@" >&- 2>&-', *command.argv(*SMALL)]
    done = subprocess.run(program, cwd=tmp_path, env=command.env, check=False, timeout=TIMEOUT)
    assert done.returncode == 0
    assert_loads(tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(("number", "times"), [(signal.SIGHUP, 1), (signal.SIGTERM, 30)])
def test_a_hangup_and_a_storm_of_signals_end_with_75_and_resume(command, tmp_path, number, times):
    flags = (*SMALL, "--steps-per-execution", 1)
    pause = Pause(folder=tmp_path / "pause", after_step=(1, 1))

    def not_ignored():  # As nohup leaves it, under which the tests may run.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    run = command.start(*flags, hooks=[pause], preexec_fn=not_ignored)
    pause.wait(run)
    for _ in range(times):
        run.send_signal(number)
    pause.wait(run, seen=number.name)
    pause.go()
    _, stderr = run.communicate(timeout=TIMEOUT)
    assert run.returncode == 75, stderr
    assert f"stopped by {number.name}" in stderr
    assert stderr.count("\n") == 1
    if times == 1:  # Of several, a second may end the run before it saves.
        assert "Resuming the unfinished run" in command.run(*flags, "--resume", "must").stdout


@pytest.mark.full
def test_images_that_look_unusual_are_trained_on_with_a_notice(command, tmp_path, mnist):
    first = mnist.first(256, 100)
    inverted = {name: 255 - getattr(first, name) for name in ("x_train", "x_test")}
    data = save_npz(tmp_path / "a.npz", **inverted, y_train=first.y_train, y_test=first.y_test)
    done = command.run(*SMALL, "--data", data, "--log-format", "json", "--output-dir", "out")
    assert (done.returncode, done.stderr) == (0, "")
    notices = [
        line for line in map(json.loads, done.stdout.splitlines()) if "notice" in line.values()
    ]
    assert "The training images look inverted" in notices[-1]["message"]


@pytest.mark.full
def test_names_that_are_not_utf8_are_as_good_as_others(command, tmp_path):
    command.env["LC_ALL"] = "C"
    command.env["TRAINER_TERMINATION_LOG"] = str(tmp_path / "log-\udcff")
    data = save_npz(tmp_path / "digits-\udcff.npz", train=256, test=100)
    out = tmp_path / "out-\udcff"
    done = command.run(*DRAWN, "--data", data, "--output-dir", out, "--tensorboard")
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in out.iterdir()} >= {*FILES, *REPORT_FILES, "tensorboard"}
    assert "digits-\\udcff.npz" in done.stdout
    assert done.stdout.endswith((tmp_path / "log-\udcff").read_text())
    assert manifest(out)["config"]["data"] == str(data)


@pytest.mark.full
def test_tensorflow_speaks_when_it_is_asked_to(command):
    done = command.run(*SMALL, "--tensorflow-logs", "--output-dir", "out")
    assert done.returncode == 0
    assert "TensorFlow binary is optimized" in done.stderr


# The steps of a save: files are written and flushed, then renamed; then the folder is flushed.
IN_THE_SAVE = [
    *({"calling": "os:fsync", "call": call} for call in (1, 2, 3, 4)),
    *({"calling": "os:replace", "call": call} for call in (1, 2, 3)),
]
ANYWHERE = [
    {"importing": "tensorflow"},
    {"calling": "trainer.distributed.strategy:create"},
    {"calling": "trainer.training.objective:PerExample._sums"},
    {"after_step": (1, 1)},
    {"after_step": (1, 4)},
    {"after_step": (2, 0)},
]


def kill(command, folder, point):
    """Kills a run of another seed with -9 at a point, in a folder that has a run's files."""
    pause = Pause(folder=folder.parent / "pause", **point)
    run = command.start(*SMALL, "--seed", 1, "--output-dir", folder, hooks=[pause])
    pause.wait(run)
    run.kill()
    run.communicate(timeout=TIMEOUT)
    assert run.returncode == -signal.SIGKILL


def assert_loads(folder):
    from trainer.runtime import keras

    loaded = keras.models.load_model(folder / "mnist.h5")
    assert loaded.count_params() == 2_380_938
    json.loads((folder / "history.json").read_text())
    json.loads((folder / "mnist.json").read_text())


def assert_old_or_new_model_loads(command, tmp_path, trained, point):
    out = tmp_path / "out"
    shutil.copytree(trained, out, ignore=lambda folder, names: set(names) - FILES)
    old = manifest(out)
    kill(command, out, point)
    assert_loads(out)
    content = (out / "mnist.h5").read_bytes()
    seed = manifest(out)["config"]["seed"]
    # Of a new manifest the new model is there.
    assert seed == old["config"]["seed"] or (
        hashlib.sha256(content).hexdigest() == manifest(out)["model"]["sha256"]
    )
    # What is left is in nobody's way.
    assert command.run(*SMALL, "--seed", 1, "--output-dir", out).returncode == 0
    assert {path.name for path in out.iterdir()} == FILES
    assert manifest(out)["config"]["seed"] == 1
    assert_loads(out)


@pytest.mark.full
@pytest.mark.parametrize("point", [*IN_THE_SAVE, *ANYWHERE])
def test_killed_anywhere_the_old_model_or_the_new_one_loads(command, tmp_path, trained, point):
    assert_old_or_new_model_loads(command, tmp_path, trained, point)


@pytest.mark.full
def test_mixed_precision_trains_and_ends_with_a_plain_model(command, tmp_path):
    flags = ("--epochs", 2, "--train-limit", 3000, "--test-limit", 500, "--no-report")
    done = command.run(*flags, "--precision", "mixed_bfloat16")
    assert (done.returncode, done.stderr) == (0, "")
    from trainer.runtime import keras

    loaded = keras.models.load_model(tmp_path / "mnist.h5")
    assert {layer.compute_dtype for layer in loaded.layers} == {"float32"}
    assert manifest(tmp_path)["metrics"]["val_accuracy"] > 0.8


@pytest.mark.full
@pytest.mark.parametrize("recipe", ["fast", "best"])
def test_a_recipe_goes_on_after_a_stop_and_ends_with_the_same_bits(command, tmp_path, recipe):
    flags = ("--recipe", recipe, "--epochs", 2, "--train-limit", 1000, "--test-limit", 100)
    flags = (*flags, "--no-report", "--steps-per-execution", 1)
    assert command.run(*flags, "--output-dir", "unbroken").returncode == 0
    pause = Pause(folder=tmp_path / "pause", after_step=(2, 0))
    run = command.start(*flags, hooks=[pause])
    pause.wait(run)
    run.send_signal(signal.SIGTERM)
    pause.wait(run, seen="SIGTERM")
    pause.go()
    _, stderr = run.communicate(timeout=TIMEOUT)
    assert run.returncode == 75, stderr
    resumed = command.run(*flags)
    assert "Resuming the unfinished run" in resumed.stdout
    unbroken, again = (manifest(folder) for folder in (tmp_path / "unbroken", tmp_path))
    assert again["model"] == unbroken["model"]


@pytest.mark.full
def test_deterministic_operations_repeat_the_same_bits(command, tmp_path):
    for name, flags in (("a", ["--deterministic"]), ("b", ["--deterministic"]), ("without", [])):
        done = command.run(*SMALL, *flags, "--output-dir", name)
        assert (done.returncode, done.stderr) == (0, "")
    a, b, without = (
        manifest(tmp_path / name)["model"]["weights_sha256"] for name in ("a", "b", "without")
    )
    # Other operations than without the flag, on a CPU too, where it would not be needed.
    assert a == b != without


@pytest.mark.full
def test_the_notebook_as_published_reaches_58_percent(command, tmp_path):
    # Adadelta(learning_rate=0.001), Keras 3's default: 58.6% after two epochs with Keras' fit.
    done = command.run("--epochs", 2, "--learning-rate", 0.001, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert manifest(tmp_path)["metrics"]["val_accuracy"] == pytest.approx(0.586, abs=0.03)


@pytest.mark.full
def test_an_epoch_at_full_size_is_repeated_bit_for_bit(command, tmp_path):
    weights = set()
    for name in ("a", "b"):
        done = command.run("--epochs", 1, "--seed", 7, "--output-dir", name, timeout=TIMEOUT)
        assert done.returncode == 0, done.stderr
        weights.add(manifest(tmp_path / name)["model"]["weights_sha256"])
        assert manifest(tmp_path / name)["metrics"]["val_accuracy"] > 0.97
    assert len(weights) == 1
