"""The errors a user can cause or meet, each with the exit code of its command.

The codes are those of BSD's ``sysexits.h``, so that a scheduler can tell a wrong command (never
retry) from a lost machine (retry). A message states what was expected, what was received and what
to do about it, in one line.
"""


class TrainerError(Exception):
    """Base of every error that ends a command in one line instead of a traceback.

    Attributes:
        exit_code: The exit status of a command that ends with this error.
    """

    exit_code = 1


class UsageError(TrainerError):
    """A flag that does not exist, or a value outside its range."""

    exit_code = 2


class DataError(TrainerError):
    """A data set, model, checkpoint or picture that can be read, but is damaged or invalid."""

    exit_code = 65


class InputError(TrainerError):
    """An input that is missing, cannot be read, or cannot be reached over the network."""

    exit_code = 66


class NotFiniteError(TrainerError):
    """The loss or the weights became NaN or infinite."""

    exit_code = 70


class OutputError(TrainerError):
    """The output cannot be written: no permission, not a folder, no space left."""

    exit_code = 73


class StoppedError(TrainerError):
    """The run stopped before it was complete; the same command resumes it."""

    exit_code = 75


class ConfigurationError(TrainerError, ImportError):
    """What was asked for cannot run on this machine or in this environment.

    Or the unfinished run in the output folder has another configuration. It is an ``ImportError``,
    too, because the most common case is a Python without TensorFlow.
    """

    exit_code = 78


def from_exit_code(exit_code: int, text: str) -> TrainerError:
    """Returns the error that another process has ended with, from its exit code."""
    kinds = {kind.exit_code: kind for kind in TrainerError.__subclasses__()}
    error = kinds.get(exit_code, TrainerError)(text)
    error.exit_code = exit_code
    return error
