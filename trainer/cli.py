"""What every command of the package shares: flags from a dataclass, errors in one line.

def main(argv=None) -> int:
    return cli.run("python -m trainer.task", TrainConfig, train, argv)
"""

import contextlib
import io
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TypeVar

from trainer.errors import TrainerError, UsageError

Config = TypeVar("Config")

INTERRUPTED = 130  # 128 + SIGINT, as shells report it.


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
        0, or the exit code of the error; 130 after Ctrl-C.
    """
    try:
        command(parse(prog, kind, sys.argv[1:] if argv is None else argv))
    except TrainerError as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        reason = f" {interrupt}" if str(interrupt) else ""
        print(f"{prog}: interrupted.{reason}", file=sys.stderr, flush=True)
        return INTERRUPTED
    return 0


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], None]]:
    """Makes Ctrl-C wait until the function that it gives is called, which raises it.

    Raised anywhere else, it may come out of TensorFlow's tracing as another error. The second
    Ctrl-C is raised at once. Outside the main thread, where signals do not come, it does nothing.
    """
    pending = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal pending
        if pending:
            raise KeyboardInterrupt
        pending = True

    def check() -> None:
        if pending:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)


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
    flags = [row.split()[0].rstrip(",") for row in rows[rule:] if re.match(r"--\w", row)]
    meant = f" Perhaps you meant {' or '.join(dict.fromkeys(flags))}." if flags else ""
    return f"{statement}.{meant} {prog} --help lists the flags."
