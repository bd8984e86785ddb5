"""What a stop may change of the outcome: nothing."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sessions import Session, Stopper, manifest
from support import ROOT

from trainer.data import pipeline
from trainer.errors import ConfigurationError, DataError, InputError, OutputError, StoppedError
from trainer.runtime import keras, tf
from trainer.training import checkpoint, loop
from trainer.training.checkpoint import FOLDER
from trainer.training.position import Position

EPOCHS, STEPS = 2, 4  # and three steps in each evaluation; a call has one step


def build():
    """Builds a small model with all that the CNN has to keep: dropout's state, accumulators."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, kernel_initializer=keras.initializers.GlorotUniform(seed=1)),
            keras.layers.Dropout(0.5, seed=2),
            keras.layers.Dense(3, kernel_initializer=keras.initializers.GlorotUniform(seed=3)),
            keras.layers.Dropout(0.25, seed=4),
        ]
    )
    model.compile(optimizer=keras.optimizers.Adam(0.1), loss="mse")
    model.optimizer.build(model.trainable_variables)
    return model


def train(session, *, epochs=EPOCHS, steps_per_execution=1):
    """Trains until the end or the stop; returns all that a run can end with."""
    noise = np.random.default_rng(0)
    x = noise.normal(size=(15, 6)).astype(np.float32)
    y = noise.normal(size=(15, 3)).astype(np.float32)
    model = build()
    history = loop.fit(
        model,
        lambda epoch: pipeline.train_batches(x, y, batch_size=4, seed=0, epoch=epoch),
        pipeline.test_batches(x[:9], y[:9], batch_size=4),
        strategy=tf.distribute.get_strategy(),
        loss=keras.losses.mean_squared_error,
        metrics={"mae": keras.losses.mean_absolute_error},
        epochs=epochs,
        steps_per_execution=steps_per_execution,
        position=session.begin(model),
        after_call=session.after_call,
    )
    assert len(history.pop("seconds")) == epochs
    variables = [*model.variables, *model.optimizer.variables]
    return history, [variable.numpy().tobytes() for variable in variables]


def train_until_stopped(folder, at, **options):
    with pytest.raises(StoppedError, match="stopped by SIGTERM at epoch"):
        train(Session(folder, stop=Stopper(at), **options))


def numbers(folder):
    return sorted(int(path.stem.split("-")[1]) for path in (folder / FOLDER).glob("*.index"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    session = Session(tmp_path_factory.mktemp("unbroken"), stop=(stop := Stopper()))
    outcome = train(session)
    assert stop.calls == EPOCHS * (STEPS + 3) + EPOCHS  # each call, and each epoch's end
    return outcome


@pytest.mark.parametrize("at", range(1, EPOCHS * (STEPS + 4) + 1))
def test_a_run_stopped_anywhere_ends_with_the_same_bits(tmp_path, unbroken, at):
    train_until_stopped(tmp_path, at)
    assert train(Session(tmp_path, policy="must")) == unbroken


def test_a_run_stopped_again_and_again_ends_with_the_same_bits(tmp_path, unbroken):
    # Every fourth call: an evaluation has three, and begins anew when it was interrupted.
    for _ in range(EPOCHS * STEPS):
        try:
            outcome = train(Session(tmp_path, stop=Stopper(4)))
            break
        except StoppedError:
            pass
    assert outcome == unbroken


def test_a_run_resumed_with_other_calls_ends_with_the_same_bits(tmp_path, unbroken):
    train_until_stopped(tmp_path, 3)
    assert train(Session(tmp_path), steps_per_execution=3) == unbroken


def test_a_run_can_be_made_longer(tmp_path, tmp_path_factory):
    longer = manifest(config={"epochs": 3})
    expected = train(Session(tmp_path_factory.mktemp("unbroken")), epochs=3)
    train_until_stopped(tmp_path, 10)
    assert train(Session(tmp_path, manifest=longer), epochs=3) == expected


@pytest.mark.parametrize(
    ("every", "saved"),
    [
        ("1h", [4, 8]),  # each epoch's end
        ("3", [3, 4, 7, 8]),  # from the last save
        ("1", [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_checkpoints_come_as_often_as_asked(tmp_path, every, saved):
    train(Session(tmp_path, every=every, keep=100))
    assert numbers(tmp_path) == saved


def test_checkpoints_come_by_the_clock(tmp_path):
    ticks = iter(range(10_000))  # every look at it is a second later: one a call, two a save
    train(Session(tmp_path, every="3s", keep=100, clock=lambda: next(ticks)))
    assert numbers(tmp_path) == [3, 4, 7, 8]


def test_only_the_newest_stay(tmp_path):
    train_until_stopped(tmp_path, 8, every="1", keep=2)
    assert numbers(tmp_path) == [3, 4]


def damage(path, how):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if how == "truncated" else how(content))


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("how", ["truncated", flip, lambda content: b""])
@pytest.mark.parametrize("suffix", [".index", ".data-00000-of-00001"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, unbroken, suffix, how):
    train_until_stopped(tmp_path, 3, every="1")
    damage(tmp_path / FOLDER / f"steps-3{suffix}", how)
    warnings = []
    assert train(Session(tmp_path, notify=warnings.append)) == unbroken
    assert "steps-3 cannot be read" in warnings[0]
    assert "Resuming the unfinished run" in warnings[1]
    assert warnings[1].endswith("at epoch 1, step 2")


def test_a_run_with_none_but_damaged_checkpoints_begins_anew_and_says_so(tmp_path, unbroken):
    train_until_stopped(tmp_path, 3, every="1", keep=2)
    for number in (2, 3):
        damage(tmp_path / FOLDER / f"steps-{number}.index", lambda content: b"")
    with pytest.raises(DataError, match=r"2, all damaged\. Use resume='auto'"):
        train(Session(tmp_path, policy="must"))
    warnings = []
    assert train(Session(tmp_path, notify=warnings.append)) == unbroken
    assert warnings[-1].endswith("can be read: the run starts anew")
    assert numbers(tmp_path) == [4, 8]  # and those that nothing can read are gone


def test_before_a_checkpoint_goes_the_next_one_is_on_disk(tmp_path, monkeypatch):
    train_until_stopped(tmp_path, 1, every="1")
    done = []

    def record(what, function):
        def recorded(path, *arguments):
            done.append((what, path.name))
            return function(path, *arguments)

        return recorded

    monkeypatch.setattr(checkpoint, "flush", record("flush", checkpoint.flush))
    monkeypatch.setattr(Path, "replace", record("rename", Path.replace))
    monkeypatch.setattr(Path, "unlink", record("delete", Path.unlink))
    train_until_stopped(tmp_path, 1, keep=1)
    index, data = "steps-2.index", "steps-2.data-00000-of-00001"
    assert done == [
        *(("flush", name) for name in (data, index)),
        *(("rename", name) for name in (data, index)),
        ("flush", FOLDER),
        *(("delete", name.replace("2", "1", 1)) for name in (index, data)),
    ]


def test_what_a_kill_between_two_renames_left_takes_no_checkpoints_place(tmp_path, unbroken):
    train_until_stopped(tmp_path, 2)
    (tmp_path / FOLDER / "steps-99.data-00000-of-00001").write_bytes(b"the data of a checkpoint")
    train_until_stopped(tmp_path, 1, keep=1)
    assert [path.name for path in sorted((tmp_path / FOLDER).iterdir())] == [
        "steps-3.data-00000-of-00001",
        "steps-3.index",
    ]
    assert train(Session(tmp_path, policy="must")) == unbroken


def test_what_killed_saves_left_is_removed(tmp_path, unbroken):
    train_until_stopped(tmp_path, 3)
    for name in ("steps-4.tmp/steps-4_temp", "steps-7_temp"):
        (tmp_path / FOLDER / name).mkdir(parents=True)
    session = Session(tmp_path)
    assert train(session) == unbroken
    session.checkpoints.delete_all()
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_the_runs_stays(tmp_path, unbroken):
    others = ("resnet50/epoch_90.pt", "steps-final.index", "steps-4.tmp.txt", "checkpoint")
    for name in others:
        path = tmp_path / FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("the user's")
    train_until_stopped(tmp_path, 3)
    session = Session(tmp_path, policy="must", keep=1)
    assert train(session) == unbroken
    session.checkpoints.delete_all()
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {tmp_path / FOLDER / name for name in others}
    assert {path.read_text() for path in files} == {"the user's"}


def test_a_checkpoint_of_another_program_is_not_replaced(tmp_path):
    other = tf.train.Checkpoint(weight=tf.Variable(1.0))
    other.write(str(tmp_path / FOLDER / "steps-4"))
    before = {path: path.read_bytes() for path in (tmp_path / FOLDER).iterdir()}
    for policy in ("auto", "never"):
        with pytest.raises(OutputError, match="steps-4 to be a checkpoint of this program"):
            train(Session(tmp_path, policy=policy))
    assert {path: path.read_bytes() for path in (tmp_path / FOLDER).iterdir()} == before


@pytest.mark.parametrize("name", ["r[1]", "r*", "r?", "r\\1", "r[", "é ü", "r\udcff"])
def test_a_folder_of_any_name_is_the_runs_alone(tmp_path, unbroken, name):
    neighbours = [tmp_path / other for other in ("r1", "rx", "r")]
    for neighbour in neighbours:
        train_until_stopped(neighbour, 2, every="1")
    train_until_stopped(tmp_path / name, 3, every="1", keep=1)
    assert numbers(tmp_path / name) == [3]
    assert train(Session(tmp_path / name, policy="must", keep=1)) == unbroken
    assert numbers(tmp_path / name) == [8]
    for neighbour in neighbours:
        assert numbers(neighbour) == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"seed": 8}}, r"Received: seed=8 where it has seed=0\."),
        ({"config": {"batch_size": 64, "optimizer": "sgd"}}, "batch_size=64 .*optimizer='sgd'"),
        ({"config": {"epochs": 1}}, "epochs=1 where it has epochs=2"),
        ({"data": {"sha256": "of others"}}, "other images or labels"),
    ],
)
def test_an_unfinished_run_of_another_kind_is_refused(tmp_path, unbroken, change, message):
    train_until_stopped(tmp_path, 3)
    with pytest.raises(ConfigurationError, match=message) as refused:
        train(Session(tmp_path, manifest=manifest(**change)))
    assert "resume='never'" in str(refused.value)
    assert train(Session(tmp_path)) == unbroken  # nothing of it was lost


def test_a_run_whose_learning_rate_depends_on_its_length_cannot_be_made_longer(tmp_path):
    def scheduled(epochs):
        return manifest(config={"schedule": "one-cycle", "epochs": epochs})

    train_until_stopped(tmp_path, 3, manifest=scheduled(EPOCHS))
    with pytest.raises(ConfigurationError, match="epochs=3 where it has epochs=2"):
        train(Session(tmp_path, manifest=scheduled(EPOCHS + 1)))


def test_what_decides_nothing_may_change(tmp_path, unbroken):
    train_until_stopped(tmp_path, 3)
    other = {"output_dir": "moved", "log_format": "json", "tensorboard": True, "threads": 9}
    assert train(Session(tmp_path, manifest=manifest(config=other))) == unbroken


def test_another_environment_is_named(tmp_path):
    train_until_stopped(tmp_path, 3)
    warnings = []
    train(
        Session(
            tmp_path,
            manifest=manifest(versions={"tensorflow": "2.20.0"}, environment={"threads": 4}),
            notify=warnings.append,
        )
    )
    assert "tensorflow is 2.20.0 and was 2.21.0, threads is 4 and was 1" in warnings[0]


def test_what_a_finished_run_left_is_not_resumed(tmp_path, unbroken):
    train_until_stopped(tmp_path, 3)
    seen = []
    other = manifest(config={"seed": 8})
    train(Session(tmp_path, manifest=other, finished_run="this run", notify=seen.append))
    assert seen == []


@pytest.mark.parametrize(("job", "resumed"), [("this one", True), ("another", False)])
def test_a_run_begun_anew_goes_on_in_the_place_of_a_pod_of_its_job(
    tmp_path, unbroken, job, resumed
):
    ours = manifest(job="this one")
    with pytest.raises(StoppedError):
        train(Session(tmp_path, manifest=ours, policy="never", stop=Stopper(3)))
    seen = []
    again = {"manifest": manifest(job=job), "policy": "never", "notify": seen.append}
    assert train(Session(tmp_path, **again)) == unbroken
    assert any("Resuming" in text for text in seen) == resumed


def test_resume_must_needs_something_to_resume(tmp_path):
    with pytest.raises(InputError, match=r"unfinished run to resume .* Received: none"):
        train(Session(tmp_path, policy="must"))


def test_a_finished_run_leaves_nothing(tmp_path):
    session = Session(tmp_path)
    train(session)
    session.checkpoints.delete_all()
    assert list(tmp_path.iterdir()) == []


def test_a_position_says_where_it_is():
    assert str(Position(epoch=2, step=7)) == "epoch 3, step 7"


FULL = """
import resource, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from sessions import Session
from test_checkpoint import train
from trainer.errors import OutputError
def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    return None
session = Session(Path(sys.argv[1]), stop=limit)
try:
    train(session)
except OutputError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path, command, unbroken):
    train_until_stopped(tmp_path, 3)
    done = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path, ROOT / "tests", ROOT / "tests" / "training"],
        env=command.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 73, done.stderr
    assert "earlier checkpoints are intact" in done.stdout
    assert train(Session(tmp_path)) == unbroken
