"""What a reader finds in the event files of a run, resumed or not."""

import numpy as np
import pytest
from support import events

from trainer.errors import OutputError
from trainer.reporting.tensorboard import EpochEvents

LOGS = {"accuracy": 0.5, "loss": 1.25, "val_accuracy": 0.75, "val_loss": 1.5}


def write_events(folder, before, epochs):
    """Goes through the epochs of a run that had the history ``before``."""
    written = EpochEvents(folder, learning_rate=lambda epoch: 0.25, before=lambda: before)
    written.on_train_begin()
    for epoch in epochs:
        written.on_epoch_end(epoch, LOGS)
    return written


def test_events_of_a_run_that_goes_on_are_there_once(tmp_path):
    write_events(tmp_path, {}, range(3))  # and then it is killed: of epoch 2 no checkpoint is left
    before = {name: [value, value / 2] for name, value in LOGS.items()}
    write_events(tmp_path, {**before, "seconds": [9.0, 8.0]}, range(2, 4)).on_train_end()
    for part, prefix in (("train", ""), ("validation", "val_")):
        seen = events(tmp_path / "tensorboard" / part)
        for name in ("accuracy", "loss"):
            value = np.float32(LOGS[prefix + name])
            values = [value, value / 2, value, value]
            assert seen.pop(f"epoch_{name}") == list(enumerate(values))
        rates = {"epoch_learning_rate": [(epoch, 0.25) for epoch in range(4)]}
        assert seen == (rates if part == "train" else {})


def test_events_can_be_read_while_the_run_goes_on(tmp_path):
    write_events(tmp_path, {}, range(1))
    assert events(tmp_path / "tensorboard" / "train")["epoch_loss"] == [(0, 1.25)]


def test_other_files_beside_the_events_stay(tmp_path):
    (tmp_path / "tensorboard" / "train").mkdir(parents=True)
    others = (
        "train/notes.txt",
        "events.out.tfevents.1",
        "train/events.out.tfevents.1795815460.host.24178.0.v2",  # of keras.callbacks.TensorBoard
    )
    for name in others:
        (tmp_path / "tensorboard" / name).write_text("the user's")
    write_events(tmp_path, {}, range(1)).on_train_end()
    for name in others:
        assert (tmp_path / "tensorboard" / name).read_text() == "the user's"


def test_events_that_cannot_be_written_end_in_one_line(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(OutputError, match="use tensorboard=False"):
        write_events(tmp_path, {}, range(1))
