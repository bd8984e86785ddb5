"""What every command of the package shares: flags from a dataclass, errors in one line.

def main(argv=None) -> int:
    return cli.run("python -m trainer.task", TrainConfig, train, argv)
"""

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from trainer import machine
from trainer.errors import StoppedError, TrainerError, UsageError

Config = TypeVar("Config")

TASK = "python -m trainer.task"  # The command that trains, which the others speak of.

INTERRUPTED = 130  # 128 + SIGINT, as shells report it.
CLOSED = 141  # 128 + SIGPIPE


def run(
    prog: str,
    kind: type[Config],
    command: Callable[[Config], None],
    argv: Sequence[str] | None = None,
    *,
    worker: Callable[[], int] = lambda: 0,
) -> int:
    """Parses flags into a configuration, runs the command on it, and returns the exit code.

    Args:
        prog: The command as a user types it; it opens every error.
        kind: The dataclass whose fields are the flags.
        command: What to do with the configuration. A ``TrainerError`` it raises ends in one line
            on stderr and its exit code; any other exception is a bug and keeps its traceback. With
            ``--log-format json`` the line is a JSON object.
        argv: The arguments; None: those of the process.
        worker: Gives the worker's index, for a JSON line.

    Returns:
        0, or the exit code of the error; 130 after Ctrl-C; 141 where nobody reads the output.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # A file name may be valid in no encoding.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        config = parse(prog, kind, words)
        _prepare_process(config)
        command(config)
        if sys.stdout:
            sys.stdout.flush()
    except TrainerError as error:
        label = "" if isinstance(error, StoppedError) else "error: "
        text = label + " ".join(str(error).split()) + _flags(kind, str(error))
        code = error.exit_code
    except KeyboardInterrupt as interrupt:
        reason = f" {interrupt}" if str(interrupt) else ""
        text, code = f"interrupted.{reason}", INTERRUPTED
    except BrokenPipeError:  # Whoever read the output has enough: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    else:
        return 0
    line = f"{prog}: {text}"
    write_termination_message(line)
    if _logs_json(words):
        from trainer.log_lines import Severity, json_line

        severity: Severity = "WARNING" if code in (StoppedError.exit_code, INTERRUPTED) else "ERROR"
        line = json_line("error", line, severity=severity, worker=worker(), exit_code=code)
    print(line, file=sys.stderr, flush=True)
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


def write_termination_message(text: str) -> None:
    """Writes how a command ended to the file that TRAINER_TERMINATION_LOG names, if it does: in a
    pod /dev/termination-log, from which ``kubectl describe`` shows it.
    """
    if path := os.environ.get("TRAINER_TERMINATION_LOG"):
        with contextlib.suppress(OSError):
            Path(path).write_text(f"{text}\n", encoding="utf-8")


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


def _prepare_process(config: object) -> None:
    """Sets what a command wants of its own process, before TensorFlow starts in it: Keras on
    TensorFlow, whatever ~/.keras/keras.json says; no chatter, unless it is asked for; one heap.
    """
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    level = "0" if getattr(config, "tensorflow_logs", False) else "3"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", level)
    machine.use_one_heap()


def _flags(kind: type, message: str) -> str:
    """Names the flags of the settings that a message of the library is about.

    >>> from trainer.config import TrainConfig
    >>> _flags(TrainConfig, "Received: batch_size=100. Use 96."), _flags(TrainConfig, "No data.")
    (' (--batch-size)', '')
    """
    names = [field.name for field in dataclasses.fields(kind)]
    about = [
        name
        for name in names
        if re.search(rf"\b{name}=" if "_" not in name else rf"\b{name}\b", message)
    ]
    flags = [f"--{name.replace('_', '-')}" for name in about]
    flags = [flag for flag in flags if flag not in message]
    return f" ({', '.join(flags)})" if flags else ""


def _logs_json(words: Sequence[str]) -> bool:
    """Tells whether arguments ask for JSON, also those that cannot be parsed.

    >>> _logs_json(["--epochs", "x", "--log-format", "json"]), _logs_json(["--log-format=plain"])
    (True, False)
    """
    return "--log-format json" in " ".join(words).replace("_", "-").replace("=", " ")
