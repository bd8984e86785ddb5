import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support import events

from trainer.errors import OutputError
from trainer.reporting import progress as report


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def train(watcher, clock, *, epochs=2, steps=40, seconds=1.0, per_call=4):
    """Goes through a run whose every step takes ``seconds``."""
    watcher.set_params({"epochs": epochs, "steps": steps})
    watcher.on_train_begin()
    for epoch in range(epochs):
        watcher.on_epoch_begin(epoch)
        for step in range(per_call, steps + 1, per_call):
            clock.now += per_call * seconds
            watcher.on_train_batch_end(step - 1, {"accuracy": 0.5, "loss": 1.25})
        watcher.on_test_begin()
        watcher.on_epoch_end(
            epoch, {"accuracy": 0.5, "loss": 1.25, "val_accuracy": 0.75, "val_loss": 1.0}
        )


def lines(log_format, **run):
    stream, clock = io.StringIO(), Clock()
    with report.progress(log_format, batch_size=128, stream=stream, clock=clock) as watcher:
        train(watcher, clock, **run)
    return stream.getvalue().splitlines()


def test_a_pipe_gets_a_line_every_ten_seconds_and_one_an_epoch():
    written = lines("auto")
    # 80 steps of a second, looked at every four: lines at 12, 24 and 36 s, the epoch, 48, ...
    assert [line.split("  ")[1] for line in written] == [
        "step 12/40",
        "step 24/40",
        "step 36/40",
        "loss 1.2500",
        "step 8/40",
        "step 20/40",
        "step 32/40",
        "loss 1.2500",
    ]
    assert written[0] == (
        "epoch 1/2  step 12/40  loss 1.2500  accuracy 0.5000  128 images/s  1m 08s left"
    )
    assert written[3] == (
        "epoch 1/2  loss 1.2500  accuracy 0.5000  val_loss 1.0000  val_accuracy 0.7500  40s"
    )


def test_json_lines_hold_the_same_as_numbers():
    written = [json.loads(line) for line in lines("json")]
    assert [line["event"] for line in written] == [*["step"] * 3, "epoch"] * 2
    assert written[0] == {
        "event": "step",
        "message": "epoch 1/2  step 12/40  loss 1.2500  accuracy 0.5000  128 images/s  1m 08s left",
        "epoch": 1,
        "epochs": 2,
        "step": 12,
        "steps": 40,
        "images_per_second": 128.0,
        "seconds_left": 68.0,
        "accuracy": 0.5,
        "loss": 1.25,
    }
    assert written[3]["val_accuracy"] == 0.75
    assert written[3]["seconds"] == 40.0


def test_the_rate_is_counted_without_the_call_that_compiles():
    stream, clock = io.StringIO(), Clock()
    with report.progress("json", batch_size=10, stream=stream, clock=clock) as watcher:
        watcher.set_params({"epochs": 1, "steps": 100})
        watcher.on_train_begin()
        watcher.on_epoch_begin(0)
        clock.now = 60.0
        watcher.on_train_batch_end(0, {})
        clock.now = 80.0
        watcher.on_train_batch_end(40, {})
    assert json.loads(stream.getvalue().splitlines()[-1])["images_per_second"] == 20.0


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_that_leaves_the_epochs_behind(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream, clock = Terminal(), Clock()
    with report.progress("auto", batch_size=128, stream=stream, clock=clock) as watcher:
        assert isinstance(watcher, report.Terminal)
        train(watcher, clock)
        watcher.on_train_batch_end(39, {"loss": 1.25})
        watcher.bar.refresh()
    written = stream.getvalue()
    assert "40/40" in written
    assert "128 images/s" in written
    assert "epoch 2/2  loss 1.2500  accuracy 0.5000  val_loss 1.0000" in written
    assert written.endswith("\x1b[1A\x1b[2K")  # the bar itself is wiped


def test_a_reader_that_goes_away_does_not_end_the_run(command):
    program = """
import sys
from trainer.reporting import progress as report
with report.progress("plain", batch_size=1) as watcher:
    for number in range(100_000):
        watcher.say(f"line {number}", "line")
print("the end", file=sys.stderr)
"""
    reader = subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=reader.stdin,
        stderr=subprocess.PIPE,
        env=command.env,
        text=True,
        check=False,
    )
    reader.stdin.close()
    reader.wait()
    assert (done.returncode, done.stderr) == (0, "the end\n")


def test_colours_are_not_written_to_a_file(tmp_path):
    with (tmp_path / "log").open("w") as stream:
        with report.progress("auto", batch_size=1, stream=stream) as watcher:
            watcher.say("[bold]not markup[/bold] \N{ROCKET}", "start")
        stream.flush()
        os.fsync(stream.fileno())
    assert (tmp_path / "log").read_text() == "[bold]not markup[/bold] \N{ROCKET}\n"


LOGS = {"accuracy": 0.5, "loss": 1.25, "val_accuracy": 0.75, "val_loss": 1.5}


def write_events(folder, before, epochs):
    """Goes through the epochs of a run that had the history ``before``."""
    written = report.Events(folder, learning_rate=lambda epoch: 0.25, before=lambda: before)
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
    for name in ("train/notes.txt", "events.out.tfevents.1"):
        (tmp_path / "tensorboard" / name).write_text("the user's")
    write_events(tmp_path, {}, range(1)).on_train_end()
    for name in ("train/notes.txt", "events.out.tfevents.1"):
        assert (tmp_path / "tensorboard" / name).read_text() == "the user's"


def test_events_that_cannot_be_written_end_in_one_line(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(OutputError, match="leave out --tensorboard"):
        write_events(tmp_path, {}, range(1))
