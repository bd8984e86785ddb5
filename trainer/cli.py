"""What every command of the package shares: flags from a dataclass, errors in one line.

def main(argv=None) -> int:
    return cli.run("python -m trainer.task", TrainConfig, train, argv)
"""

import contextlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TypeVar

from trainer.errors import StoppedError, TrainerError, UsageError

Config = TypeVar("Config")

INTERRUPTED = 130  # 128 + SIGINT, as shells report it.
CLOSED = 141  # 128 + SIGPIPE


def run(
    prog: str,
    kind: type[Config],
    command: Callable[[Config], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Parses flags into a configuration, runs the command on it, and returns the exit code.

    Args:
        prog: The command as a user types it; it opens every error.
        kind: The dataclass whose fields are the flags.
        command: What to do with the configuration. A ``TrainerError`` it raises ends in one line
            on stderr and its exit code; any other exception is a bug and keeps its traceback.
        argv: The arguments; None: those of the process.

    Returns:
        0, or the exit code of the error; 130 after Ctrl-C; 141 where nobody reads the output.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # A name of a file may be in no encoding.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command(parse(prog, kind, sys.argv[1:] if argv is None else argv))
        if sys.stdout:
            sys.stdout.flush()
    except TrainerError as error:
        label = "" if isinstance(error, StoppedError) else "error: "
        line, code = f"{prog}: {label}{' '.join(str(error).split())}", error.exit_code
    except KeyboardInterrupt as interrupt:
        reason = f" {interrupt}" if str(interrupt) else ""
        line, code = f"{prog}: interrupted.{reason}", INTERRUPTED
    except BrokenPipeError:  # Whoever read the output has enough: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    else:
        return 0
    print(line, file=sys.stderr, flush=True)
    leave_word(line)
    return code


def split(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Splits the arguments of a command that starts another into its own and the other's.

    >>> split(["--workers", "2", "--", "--epochs", "3"])
    (['--workers', '2'], ['--epochs', '3'])
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if "--" not in words:
        return words, []
    return words[: words.index("--")], words[words.index("--") + 1 :]


def leave_word(text: str) -> None:
    """Writes how a command ended to the file that TRAINER_TERMINATION_LOG names, if it does: in a
    pod /dev/termination-log, from which ``kubectl describe`` shows it.
    """
    if path := os.environ.get("TRAINER_TERMINATION_LOG"):
        with contextlib.suppress(OSError):
            Path(path).write_text(f"{text}\n", encoding="utf-8")


class Signals:
    """Turns SIGINT (Ctrl-C) and SIGTERM into a question that can be asked between two steps.

    Before ``defer()`` each ends the program at once, as a ``KeyboardInterrupt``: then there is
    nothing to lose. Afterwards the first is only remembered, because an exception in the middle
    of TensorFlow's tracing comes out as another one; a second one ends the program at once.
    Outside the main thread, which signals do not reach, it does nothing.

        with Signals() as signals:
            signals.defer()
            while not signals.received: ...
    """

    received: str | None = None

    def __enter__(self) -> "Signals":
        self.deferred = False
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on the first signal is only remembered, in ``received``."""
        self.deferred = True
        for number in self.before:
            # Once more, because TensorFlow's cluster of several workers has put a handler of its
            # own in place of SIGTERM's (SigtermNotifier in TensorFlow 2.21).
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.deferred or self.received:
            raise KeyboardInterrupt(signal.Signals(number).name)
        self.received = signal.Signals(number).name


def parse(prog: str, kind: type[Config], argv: Sequence[str]) -> Config:
    """Makes a configuration from flags.

    Raises:
        UsageError: A flag is unknown, or its value is not of its type or range.
        SystemExit: Code 0, after ``--help``.
    """
    import tyro  # Here, so that importing this module costs nothing.

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                kind, prog=prog, args=list(argv), config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit as exit:
        if not exit.code:
            raise
        raise UsageError(_one_line(printed.getvalue(), prog)) from None


def _one_line(box: str, prog: str) -> str:
    """Reduces tyro's framed error to its statement and the flags that it suggests.

    >>> _one_line('''
    ... ╭─ Unrecognized options ────────────╮
    ... │ Unrecognized options: --epoch, 3  │
    ... │ ───────────────────────────────── │
    ... │ Perhaps you meant:                │
    ... │     --epochs INT                  │
    ... │         Passes over the images.   │
    ... │ ───────────────────────────────── │
    ... │ For full helptext, run x --help   │
    ... ╰───────────────────────────────────╯''', "x")
    'Unrecognized options: --epoch, 3. Perhaps you meant --epochs. x --help lists the flags.'
    """
    rows = [row.strip("│ ") for row in box.splitlines() if row.startswith("│")]
    rule = next((number for number, row in enumerate(rows) if set(row) == {"─"}), len(rows))
    statement = " ".join(rows[:rule] or box.split()).rstrip(".")
    statement = re.sub(r"(?<=Expected one of \()[^)]*", _choices, statement)
    # Of a flag that may be left to the recipe: what it takes beside nothing.
    statement = re.sub(
        r"no type matching {None}\|(.+?) could be instantiated from \['(.*?)'\].*",
        r"expected \1. Received: \2",
        statement,
    )
    flags = []
    if statement.startswith("Unrecognized"):
        flags = [row.split()[0].rstrip(",") for row in rows[rule:] if re.match(r"--\w", row)]
    meant = f" Perhaps you meant {' or '.join(dict.fromkeys(flags))}." if flags else ""
    return f"{statement}.{meant} {prog} --help lists the flags."


def _choices(listed: re.Match) -> str:
    """Puts choices in order, where tyro 1.0 has them in a set's, and leaves out its None."""
    return ", ".join(sorted(set(listed[0].split(", ")) - {"'None'"}))
