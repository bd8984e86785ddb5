"""What a log does where it cannot be written."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from trainer.log_lines import DroppingStream

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs Linux' /dev/full")


def python(program, redirect="", **options):
    """Runs a program whose streams the shell has redirected."""
    return subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


@needs_full
def test_what_a_full_disk_cannot_take_is_dropped_and_told_once(capsys):
    with FULL.open("w") as full:
        stream = DroppingStream(full, "stdout")
        for number in range(3):
            print(f"line {number}", file=stream, flush=True)
        full.flush()  # Nothing is left that would fail when Python exits.
    assert capsys.readouterr().err == (
        "stdout cannot be written (No space left on device): what it cannot take is dropped\n"
    )


@needs_full
def test_lines_are_written_again_when_there_is_room(tmp_path, capsys):
    with (tmp_path / "log").open("w") as log:
        room = os.dup(log.fileno())
        stream = DroppingStream(log, "stdout")
        with FULL.open("w") as full:
            os.dup2(full.fileno(), log.fileno())
        print("dropped", file=stream, flush=True)
        os.dup2(room, log.fileno())
        os.close(room)
        print("written", file=stream, flush=True)
    assert (tmp_path / "log").read_text() == "written\n"
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_stream_that_is_closed_drops_everything(capsys):
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        print("line", file=DroppingStream(stream, "stdout"), flush=True)
    assert "stdout cannot be written (I/O operation on closed file)" in capsys.readouterr().err


def test_a_name_that_no_encoding_has_is_written_with_backslashes(tmp_path):
    for encoding in ("ascii", "utf-8"):
        with (tmp_path / encoding).open("w", encoding=encoding) as log:
            print("out/\udcff", file=DroppingStream(log), flush=True)
        assert (tmp_path / encoding).read_bytes() == b"out/\\udcff\n"


WRITE = """
import os, sys
from trainer import cli
from trainer.errors import DataError
from trainer.evaluate import EvaluateConfig
def command(config):
    with open(os.environ["FILE"], "wb") as file:
        assert file.fileno() > 2
        os.write(1, b"stdout")
        os.write(2, b"stderr")  # As TensorFlow logs.
        file.write(b"content")
    raise DataError("It is damaged.")
sys.exit(cli.run("prog", EvaluateConfig, command, ["mnist.h5"]))
"""


@pytest.mark.parametrize("redirect", [">&- 2>&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_file_of_the_runs(tmp_path, monkeypatch, redirect):
    monkeypatch.setenv("FILE", str(tmp_path / "checkpoint"))
    done = python(WRITE, redirect)
    assert (tmp_path / "checkpoint").read_bytes() == b"content"
    assert done.returncode == 65
    assert "damaged" not in done.stdout  # The error is not printed on stdout in place of stderr.


@needs_full
def test_an_error_that_cannot_be_printed_keeps_its_exit_code(tmp_path, monkeypatch):
    monkeypatch.setenv("FILE", str(tmp_path / "checkpoint"))
    program = WRITE.replace('os.write(2, b"stderr")', "")
    assert python(program, "2>/dev/full").returncode == 65


PRINT = """
import sys
from trainer import cli
from trainer.evaluate import EvaluateConfig
sys.exit(cli.run("prog", EvaluateConfig, lambda config: print("99%"), ["mnist.h5"]))
"""


@needs_full
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_result_that_cannot_be_printed_is_73(monkeypatch, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    done = python(PRINT, ">/dev/full")
    assert done.returncode == 73
    assert done.stderr == (
        "prog: error: Expected room for what is written, to stdout too. Received: No space left on "
        "device. Make room, or write to another place.\n"
    )
