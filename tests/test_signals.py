"""What the signals do that ask a run to stop, one and thirty of them."""

import signal
import subprocess
import sys

import pytest
from support import ROOT, TIMEOUT, Pause

from trainer.signals import Signals, stop_signals

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers():
    """SIGHUP as it is without ``nohup``, under which the tests may run; the others unchanged."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_is_remembered_and_the_second_ends_the_program_at_once(number):
    before = signal.getsignal(number)
    with Signals() as signals:
        signals.defer()
        signal.raise_signal(number)
        assert signals.received == number.name
        with pytest.raises(KeyboardInterrupt, match=number.name):
            signal.raise_signal(number)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", NUMBERS)
def test_before_there_is_something_to_lose_the_first_ends_the_program(number):
    with Signals() as signals:
        with pytest.raises(KeyboardInterrupt, match=number.name):
            signal.raise_signal(number)
        # Whoever swallows the exception is stopped at the next step.
        assert signals.received == number.name


def test_thirty_signals_raise_one_exception():
    with Signals() as signals:
        signals.defer()
        raised = []
        for _ in range(30):
            try:
                signal.raise_signal(signal.SIGTERM)
            except KeyboardInterrupt as interrupt:
                raised.append(str(interrupt))
    assert raised == ["SIGTERM"]


def test_nothing_is_raised_when_the_end_is_decided():
    with Signals() as signals:
        signals.ignore()
        for number in NUMBERS:
            signal.raise_signal(number)
    assert signals.received is None


def test_a_hangup_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # As nohup leaves it.
    assert stop_signals() == [signal.SIGINT, signal.SIGTERM]
    with Signals() as signals:
        signals.defer()
        signal.raise_signal(signal.SIGHUP)
        assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# A command that saves at the first signal, as the training command does, without TensorFlow.
COMMAND = """
import sys, time
from trainer import cli
from trainer.errors import StoppedError
from trainer.evaluate import EvaluateConfig
from trainer.signals import Signals
with Signals(until_exit=True) as signals:
    def command(config):
        signals.defer()
        print("ready", flush=True)
        while not signals.received:
            time.sleep(0.001)
        raise StoppedError("stopped by a signal. The checkpoint is here.")
    code = cli.run("prog", EvaluateConfig, command, ["mnist.h5"], resumable=True)
sys.exit(code)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_without_end_change_no_exit_code(number):
    for _ in range(5):
        run = subprocess.Popen(
            [sys.executable, "-c", COMMAND],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert run.stdout.readline() == "ready\n"
        while run.poll() is None:  # Until it is gone: while it reports, and while Python exits.
            run.send_signal(number)
        _, stderr = run.communicate()
        assert run.returncode == 75, stderr
        assert "Traceback" not in stderr


@pytest.mark.parametrize(("number", "code"), [*zip(NUMBERS, [130, 75, 75], strict=True)])
def test_a_signal_while_the_command_reads_its_flags_has_a_code_of_its_own(
    command, tmp_path, number, code
):
    pause = Pause(folder=tmp_path / "pause", importing="tyro")
    run = command.start("--epochs", 1, hooks=[pause])
    pause.wait(run)
    run.send_signal(number)
    _, stderr = run.communicate(timeout=TIMEOUT)
    assert run.returncode == code
    assert stderr.startswith("python -m trainer.task: ")
    assert stderr.count("\n") == 1
