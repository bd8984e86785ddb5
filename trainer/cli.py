"""What the package's commands share: flags from a dataclass, errors in one line, exit codes.

    def main(argv=None) -> int:
        return cli.run("python -m trainer.task", TrainConfig, train, argv)

The other modules raise ``TrainerError`` and name fields of the dataclass; the flags are added here.
"""

import contextlib
import dataclasses
import errno
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from trainer import machine
from trainer.errors import (
    ConfigurationError,
    InputError,
    OutputError,
    StoppedError,
    TrainerError,
    UsageError,
)
from trainer.log_lines import DroppingStream, Severity, json_line
from trainer.signals import TERMINATING

Config = TypeVar("Config")

TASK = "python -m trainer.task"  # The training command, which other commands run or name.
SCRIPT = "python -m trainer.script"
DOCTOR = "python -m trainer.doctor"
ADVICE = f"{DOCTOR}, with the same flags, shows what stands in the way of a run."
JOB = "TRAINER_JOB_UID"  # In a pod: the UID of its Job.

INTERRUPTED = 130  # 128 + SIGINT, as shells report it.
CLOSED = 141  # 128 + SIGPIPE
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def run(
    prog: str,
    kind: type[Config],
    command: Callable[[Config], None],
    argv: Sequence[str] | None = None,
    *,
    worker: Callable[[], int] = lambda: 0,
    resumable: bool = False,
    advice: str = "",
) -> int:
    """Parses flags into a configuration, runs the command on it, and returns the exit code.

    Args:
        prog: The command as a user types it; every error begins with it.
        kind: The dataclass whose fields are the flags.
        command: Called with the configuration. A ``TrainerError`` it raises ends in one line
            on stderr and its exit code; any other exception is a bug and keeps its traceback. With
            ``--log-format json`` the line is a JSON object.
        argv: The arguments; None: those of the process.
        worker: Returns the worker's index, for an error as a JSON line.
        resumable: Whether the same command resumes what SIGTERM or SIGHUP has ended: 75.
        advice: A sentence for the end of an error that this machine or its environment can cause:
            one with exit code 78 or 1, or a traceback.

    Returns:
        0, or the exit code of the error; 130 after Ctrl-C, or another signal that the command
        handles; 141 if the reader of stdout is gone.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):  # A file name may be valid in no encoding.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            config = parse(prog, kind, arguments)
            _prepare_process(config)
            command(config)
            if sys.stdout:
                sys.stdout.flush()
        except TrainerError as error:
            label = "" if isinstance(error, StoppedError) else "error: "
            text = label + " ".join(str(error).split()) + _flags(kind, str(error))
            if advice and error.exit_code in (ConfigurationError.exit_code, 1):
                text += f" {advice}"
            return _report(prog, text, error.exit_code, arguments, worker)
        except BrokenPipeError:  # The reader has closed the pipe: | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return CLOSED
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            DroppingStream(sys.stdout).flush()  # Python would fail with it again when it exits.
            text = (
                f"error: Expected room for what is written, to stdout too. Received: "
                f"{error.strerror}. Make room, or write to another place."
            )
            return _report(prog, text, OutputError.exit_code, arguments, worker)
    except Exception as error:
        if advice:
            error.add_note(advice)
        raise
    except KeyboardInterrupt as interrupt:  # While it reports an error, too.
        reason = str(interrupt)
        if resumable and reason in TERMINATING:
            return _report(prog, f"stopped by {reason}.", StoppedError.exit_code, arguments, worker)
        text = f"interrupted. {reason}" if reason not in ("", "SIGINT") else "interrupted."
        return _report(prog, text, INTERRUPTED, arguments, worker)
    return 0


def _report(
    prog: str, text: str, code: int, arguments: Sequence[str], worker: Callable[[], int]
) -> int:
    """Writes how a command ended, in one line; returns its exit code."""
    line = f"{prog}: {text}"
    write_termination_message(line)
    if _logs_json(arguments):
        severity: Severity = "WARNING" if code in (StoppedError.exit_code, INTERRUPTED) else "ERROR"
        line = json_line("error", line, severity=severity, worker=worker(), exit_code=code)
    print(line, file=DroppingStream(sys.stderr), flush=True)
    return code


def split(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Splits the arguments of a command that starts another into its own and the other's.

    >>> split(["--workers", "2", "--", "--epochs", "3"])
    (['--workers', '2'], ['--epochs', '3'])
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--" not in arguments:
        return arguments, []
    return arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]


def split_script(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the arguments of a command that runs a script into its own, and the script with those
    of the script's.

    >>> split_script(["train.py", "--lr", "1"])
    ([], ['train.py', '--lr', '1'])
    >>> split_script(["--threads", "2", "--", "train.py"])
    (['--threads', '2'], ['train.py'])
    """
    if arguments and not arguments[0].startswith("-"):
        return [], list(arguments)
    return split(arguments)


def find_script(script: Sequence[str]) -> Path:
    """Returns the path of a script from what ``split_script`` has returned.

    Raises:
        UsageError: There is none.
        InputError: There is no such file.
    """
    if not script:
        raise UsageError(f"Expected a script: {SCRIPT} train.py. Received: none.")
    path = Path(script[0])
    if not path.is_file():
        raise InputError(f"Expected a Python script at {path}. Received: no such file.")
    return path


def module_command(name: str) -> list[str]:
    """Returns the command that runs a module of this package in a Python of its own. That imports
    nothing from the current folder (``-P``), unless this package is there.
    """
    safe = [] if Path(__file__).parents[1] == Path.cwd() else ["-P"]
    return [sys.executable, *safe, "-m", name]


def write_termination_message(text: str) -> None:
    """Writes how a command ended to the file that TRAINER_TERMINATION_LOG names, if it is set. In a
    pod that is /dev/termination-log, whose content ``kubectl describe pod`` shows.
    """
    if path := os.environ.get("TRAINER_TERMINATION_LOG"):
        with contextlib.suppress(OSError):
            Path(path).write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")


def _joined(kind: type, argv: Sequence[str]) -> list[str]:
    """Returns arguments with the words of a flag that has parameters as one: ``--optimizer``,
    ``adamw weight_decay=0.05``.
    """
    flags = {
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(kind)
        if field.metadata.get("parameters")
    }
    joined: list[str] = []
    taking, values = False, 0
    for argument in argv:
        if argument.startswith("-"):
            flag, equals, _ = argument.partition("=")
            taking, values = flag.replace("_", "-") in flags, int(bool(equals))
        elif taking and values:
            joined[-1] += f" {argument}"
            continue
        else:
            values += 1
        joined.append(argument)
    return joined


def _gathered(kind: type, argv: Sequence[str]) -> list[str]:
    """Returns arguments with all values of a repeated flag after one: ``--env A=1 --env B=2`` as
    ``--env A=1 B=2``.
    """
    gathered: dict[str, list[str]] = {
        f"--{field.name.replace('_', '-')}": []
        for field in dataclasses.fields(kind)
        if field.metadata.get("repeatable")
    }
    rest: list[str] = []
    values = rest
    for argument in argv:
        if argument.startswith("-"):
            flag, equals, value = argument.partition("=")
            values = gathered.get(flag.replace("_", "-"), rest)
            if values is not rest:
                values += [value] if equals else []
                continue
        values.append(argument)
    return rest + [word for flag, words in gathered.items() if words for word in (flag, *words)]


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
                kind,
                prog=prog,
                args=_gathered(kind, _joined(kind, argv)),
                config=(tyro.conf.FlagCreatePairsOff,),
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
    # tyro's text for an optional flag, {None}|INT, reduced to the type.
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
    """Sorts the choices, which tyro 1.0 lists in the order of a set, and leaves out None."""
    return ", ".join(sorted(set(listed[0].split(", ")) - {"'None'"}))


def _open_closed_streams() -> None:
    """Opens each standard stream that is closed (``>&-``) on the null device. The next file to be
    opened, such as a checkpoint, would get its number otherwise, and what TensorFlow logs.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        number = ("stdin", "stdout", "stderr").index(name)
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # The lowest number that is free: this one.
            os.set_inheritable(null, True)
            if getattr(sys, name) is None:
                stream = open(null, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
                setattr(sys, name, stream)


def _prepare_process(config: object) -> None:
    """Configures this process before TensorFlow is imported: Keras' TensorFlow backend, whatever
    ~/.keras/keras.json sets; no logs of TensorFlow's, unless asked for; one malloc arena.
    """
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    level = "0" if getattr(config, "tensorflow_logs", False) else "3"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", level)
    machine.use_one_heap()


def _flags(kind: type, message: str) -> str:
    """Returns the flags of the fields that an error message names, to be appended to it.

    >>> from trainer.config import TrainConfig
    >>> _flags(TrainConfig, "Received: batch_size=100."), _flags(TrainConfig, "in /a/output_dir/b")
    (' (--batch-size)', '')
    """
    flags = []
    for name in (field.name for field in dataclasses.fields(kind)):
        # A name of one word may be a word of the sentence; any may be a part of a path.
        end = r"(?![\w/-])" if "_" in name else "="
        flag = f"--{name.replace('_', '-')}"
        if re.search(rf"(?<![\w/.-]){name}{end}", message) and flag not in message:
            flags.append(flag)
    return f" ({', '.join(flags)})" if flags else ""


def _logs_json(arguments: Sequence[str]) -> bool:
    """Tells whether arguments ask for JSON logs, even if they cannot be parsed.

    >>> _logs_json(["--epochs", "x", "--log-format", "json"]), _logs_json(["--log-format=plain"])
    (True, False)
    """
    return "--log-format json" in " ".join(arguments).replace("_", "-").replace("=", " ")
