import dataclasses

import pytest
from support import ROOT

from trainer import cli
from trainer.config import TrainConfig
from trainer.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epoch", "3"], "Unrecognized options: --epoch, 3. Perhaps you meant --epochs."),
        (["surplus"], "Unrecognized options: surplus."),
        (["--recipe", "slow"], "invalid choice 'slow' for argument '--recipe'."),
        (["--optimizer", "adagrat"], "optimizer must be one of adadelta, "),
        (["--optimizer", "adam", "beta_1"], "must be name=value. Received: 'beta_1'."),
        (["--epochs"], "Missing value for argument '--epochs'."),
        (["--epochs", "many"], "Error parsing --epochs: expected INT. Received: many. prog --help"),
        (["--epochs", "0"], "epochs must be a whole number of at least 1."),
        (["--learning-rate", "nan"], "learning_rate must be a finite number above 0."),
        (["--learning-rate", "-inf"], "learning_rate must be a finite number above 0."),
        (["--seed", "-1"], "seed must be a whole number from 0 to 4294967295."),
    ],
)
def test_a_wrong_flag_is_one_line(argv, message):
    with pytest.raises(UsageError) as raised:
        cli.parse("prog", TrainConfig, argv)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not set("╭│─") & set(str(raised.value))


def test_every_field_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as exited:
        cli.parse("prog", TrainConfig, ["--help"])
    assert exited.value.code == 0
    printed = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        no = "no-" if field.default is True else ""
        assert f"--{no}{field.name.replace('_', '-')} " in printed
    assert "bit for bit" in printed  # the fields' docstrings are in it


def test_flags_make_the_configuration():
    config = cli.parse("prog", TrainConfig, ["--epochs", "3", "--tensorflow-logs", "--seed", "7"])
    assert config == TrainConfig(epochs=3, tensorflow_logs=True, seed=7)


@pytest.mark.parametrize(
    "argv",
    [
        ["--optimizer", "sgd", "momentum=0.9", "nesterov=True", "--epochs", "3"],
        ["--epochs", "3", "--optimizer=sgd", "nesterov=True", "momentum=0.9"],
        ["--optimizer", "sgd momentum=0.9 nesterov=True", "--epochs", "3"],
    ],
)
def test_the_parameters_of_a_name_are_words_after_it(argv):
    config = cli.parse("prog", TrainConfig, argv)
    assert config == TrainConfig(optimizer="sgd momentum=0.9 nesterov=True", epochs=3)


def test_a_recipe_and_what_differs_from_it_are_flags():
    argv = ["--recipe", "best", "--augment", "none", "--dense-dropout", "0.4"]
    config = cli.parse("prog", TrainConfig, argv)
    assert config == TrainConfig(recipe="best", augment="none", dense_dropout=0.4)


def test_an_error_ends_in_its_line_and_code(capsys):
    def fail(config):
        raise DataError("Expected this.\nReceived: that.")

    assert cli.run("prog", TrainConfig, fail, []) == 65
    assert capsys.readouterr().err == "prog: error: Expected this. Received: that.\n"


def test_a_name_that_no_encoding_has_is_reported_with_backslashes(tmp_path, monkeypatch, capsys):
    def fail(config):
        raise DataError("Expected a file. Received: out/\udcff.")

    monkeypatch.setenv("TRAINER_TERMINATION_LOG", str(tmp_path / "termination-log"))
    assert cli.run("prog", TrainConfig, fail, []) == 65
    line = "prog: error: Expected a file. Received: out/\\udcff.\n"
    assert (tmp_path / "termination-log").read_text() == capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback():
    def fail(config):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run("prog", TrainConfig, fail, [])


def test_an_interrupt_says_what_it_left(capsys):
    def fail(config):
        raise KeyboardInterrupt("Nothing was written.")

    assert cli.run("prog", TrainConfig, fail, []) == 130
    assert capsys.readouterr().err == "prog: interrupted. Nothing was written.\n"


# What takes a fifth of a second and more to load, of what the commands use.
HEAVY = (
    {"PIL", "gradio", "h5py", "keras", "kubernetes", "matplotlib", "numpy", "onnx", "rich"}
    | {"scipy", "skimage", "tensorflow", "tf2onnx"}
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["doctor", "evaluate", "export", "launch", "predict", "script", "serve", "submit", "task"],
)
def test_help_loads_nothing_that_takes_its_time(command, name):
    command.program = ["-X", "importtime", "-m", f"trainer.{name}"]
    done = command.run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: python -m trainer.{name} ")
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert {"tyro", "trainer.cli"} <= loaded
    assert not loaded & HEAVY


# What Python, NumPy and this package import before the data is read.
SHADOWING = ("dataclasses", "random", "tyro", "numpy", "keras", "tensorflow")


@pytest.mark.parametrize("program", [["-m", "trainer.task"], ["-P", "-m", "trainer.task"]])
def test_modules_of_the_current_folder_are_not_imported(command, tmp_path, program):
    for name in SHADOWING:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the user's own')\n")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text("raise SystemExit('the user's own')\n")
    command.program = program
    done = command.run("--data", "nowhere.npz")
    assert (done.returncode, done.stdout) == (66, "")
    assert done.stderr.startswith("python -m trainer.task: error: Expected a data source")


def test_workers_import_nothing_from_the_current_folder_where_their_launcher_does_not(
    command, tmp_path
):
    # Python itself imports it before any module that is run by -m.
    (tmp_path / "operator.py").write_text("raise SystemExit('the user's own')\n")
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("raise SystemExit('the user's own')\n")
    command.program = ["-P", "-m", "trainer.launch"]  # As digits-launch is.
    done = command.run("--workers", 2, "--", "--data", "nowhere.npz")
    assert done.returncode == 66, done.stderr
    assert "the user's own" not in done.stderr


def test_a_package_in_the_current_folder_is_found_by_its_workers(command):
    command.folder = ROOT
    del command.env["PYTHONPATH"]
    command.program = ["-m", "trainer.launch"]
    done = command.run("--workers", 2, "--", "--data", "nowhere.npz")
    assert done.returncode == 66, done.stderr
