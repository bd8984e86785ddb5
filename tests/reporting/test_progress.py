"""What each kind of output gets, from a run that takes no time: the clock is the test's."""

import io
import json
import os
import pty
import subprocess
import sys

from trainer.reporting.progress import Quiet, Terminal, progress


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
    with progress(
        log_format, batch_size=128, stream=stream, clock=clock, wall_clock=clock
    ) as watcher:
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
        "time": "1970-01-01T00:00:12.000Z",
        "severity": "INFO",
        "worker": 0,
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


def say_three(log_format, worker):
    """What a worker writes of three events of a run."""
    stream = io.StringIO()
    with progress(
        log_format, batch_size=1, worker=worker, stream=stream, wall_clock=lambda: 0.5
    ) as watcher:
        watcher.say("60,000 images", "start", run="a")
        watcher.say("slow", "notice")
        watcher.say("the same weights", "weights", same=True)
    return stream.getvalue().splitlines()


def test_a_json_line_says_when_how_bad_and_which_worker():
    start, notice, weights = map(json.loads, say_three("json", worker=0))
    assert start == {
        "time": "1970-01-01T00:00:00.500Z",
        "severity": "INFO",
        "worker": 0,
        "event": "start",
        "message": "60,000 images",
        "run": "a",
    }
    assert (notice["severity"], weights["severity"]) == ("WARNING", "INFO")


def test_workers_other_than_the_chief_write_only_how_they_ended():
    assert say_three("plain", worker=2) == ["the same weights"]
    assert say_three("auto", worker=1) == ["the same weights"]
    (line,) = map(json.loads, say_three("json", worker=2))
    assert line == {
        "time": "1970-01-01T00:00:00.500Z",
        "severity": "INFO",
        "worker": 2,
        "event": "weights",
        "message": "the same weights",
        "same": True,
    }


def test_a_worker_on_a_terminal_has_no_bar_unless_it_is_the_chief():
    with progress("auto", batch_size=1, worker=1, stream=TerminalStream()) as watcher:
        assert isinstance(watcher, Quiet)


def test_the_rate_is_counted_without_the_call_that_compiles():
    stream, clock = io.StringIO(), Clock()
    with progress("json", batch_size=10, stream=stream, clock=clock) as watcher:
        watcher.set_params({"epochs": 1, "steps": 100})
        watcher.on_train_begin()
        watcher.on_epoch_begin(0)
        clock.now = 60.0
        watcher.on_train_batch_end(0, {})
        clock.now = 80.0
        watcher.on_train_batch_end(40, {})
    assert json.loads(stream.getvalue().splitlines()[-1])["images_per_second"] == 20.0


class TerminalStream(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_that_leaves_the_epochs_behind(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream, clock = TerminalStream(), Clock()
    with progress("auto", batch_size=128, stream=stream, clock=clock) as watcher:
        assert isinstance(watcher, Terminal)
        train(watcher, clock)
        watcher.on_train_batch_end(39, {"loss": 1.25})
        watcher.bar.refresh()
    written = stream.getvalue()
    assert "40/40" in written
    assert "128 images/s" in written
    assert "epoch 2/2  loss 1.2500  accuracy 0.5000  val_loss 1.0000" in written
    assert written.endswith("\x1b[1A\x1b[2K")  # the bar itself is wiped


def test_a_terminal_that_goes_away_does_not_end_the_run(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    clock = Clock()
    with (
        os.fdopen(slave, "w") as stream,
        progress("auto", batch_size=128, stream=stream, clock=clock) as watcher,
    ):
        assert isinstance(watcher, Terminal)
        os.close(master)
        train(watcher, clock)
        watcher.bar.refresh()
    assert "stdout cannot be written (Input/output error)" in capsys.readouterr().err


def test_a_reader_that_goes_away_does_not_end_the_run(command):
    program = """
import sys
from trainer.reporting.progress import progress
with progress("plain", batch_size=1) as watcher:
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
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == "the end"  # No error follows at the exit.


def test_colours_are_not_written_to_a_file(tmp_path):
    with (tmp_path / "log").open("w") as stream:
        with progress("auto", batch_size=1, stream=stream) as watcher:
            watcher.say("[bold]not markup[/bold] \N{ROCKET}", "start")
        stream.flush()
        os.fsync(stream.fileno())
    assert (tmp_path / "log").read_text() == "[bold]not markup[/bold] \N{ROCKET}\n"
