"""TensorFlow and Keras, started as this package needs them; every module imports them from here.

    from trainer.runtime import keras, tf

They start without chatter, unless TF_CPP_MIN_LOG_LEVEL is set, and Keras runs on TensorFlow.
"""

import contextlib
import ctypes
import gc
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator

from trainer.config import Precision
from trainer.errors import ConfigurationError

_M_ARENA_MAX = -8  # of <malloc.h>


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what is written to stderr, by C++ too, and shows it only if an error follows.

    TensorFlow 2.21 logs about the processor before it reads TF_CPP_MIN_LOG_LEVEL, so the variable
    alone does not silence it.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except Exception:
            kept.seek(0)
            os.write(stderr, kept.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _check_backend() -> None:
    # A file ~/.keras/keras.json may name another backend; this variable has precedence over it.
    backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if "keras" in sys.modules:  # Imported before this module, and so for good.
        backend = sys.modules["keras"].backend.backend()
    if backend != "tensorflow":
        raise ConfigurationError(
            f"Expected Keras on TensorFlow. Received: KERAS_BACKEND={backend}. "
            "Unset it, or set it to tensorflow, before Keras is imported."
        )


@contextlib.contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Has modules that are installed be missing for a moment."""
    names = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(names))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def _command() -> str:
    """Returns which of this package's commands this process is (``trainer.task``); or nothing."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec and spec.name.startswith("trainer.") else ""


def _set_onednn() -> None:
    """Switches oneDNN's operations on, which TensorFlow 2.21 itself does on processors with AVX-512
    only: with AVX2 alone they take two thirds of the time (docs/performance.md).
    """
    if platform.machine() in ("x86_64", "AMD64"):
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


def _glibc(name: str) -> Callable[..., int] | None:
    """Returns a function of glibc; None where there is another library (macOS, Windows, musl)."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def _set_allocator() -> None:
    """Keeps one heap for all threads (``man mallopt``), where glibc would make eight for each core
    and keep in each what it once needed. Blocks that are small it gives out without a lock.
    """
    if mallopt := _glibc("mallopt"):
        mallopt(_M_ARENA_MAX, 1)


def _unused() -> tuple[str, ...]:
    """Names what TensorFlow 2.21 and Keras 3.15 import where it is installed, in a second or two,
    and work without, as the commands of this package do. In another program they are left as they
    are.
    """
    if not (command := _command()):
        return ()
    unused = ("IPython", "matplotlib", "pandas", "sklearn")
    # Those that find digits in pictures import SciPy themselves, in another thread.
    return (*unused, "scipy") if command == "trainer.task" else unused


def _start() -> contextlib.AbstractContextManager:
    _check_backend()
    if _command():
        _set_onednn()
        _set_allocator()
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        return contextlib.nullcontext()
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    return _quiet()


try:
    with _start(), _hidden(*_unused()):
        import tensorflow as tf
except ModuleNotFoundError as error:
    if error.name != "tensorflow":
        raise
    raise ConfigurationError(
        "Expected TensorFlow. Received: a Python without it. Install one of: "
        "pip install 'digits-trainer[cpu]', 'digits-trainer[gpu]' or 'digits-trainer[tpu]'"
    ) from error

import keras  # noqa: E402  (TensorFlow loads it)

__all__ = ["keras", "release_memory", "set_deterministic", "set_precision", "set_threads", "tf"]


def set_threads(threads: int) -> None:
    """Sets the threads inside one operation, which only works before the first one.

    Raises:
        ConfigurationError: TensorFlow is running already, with another number.
    """
    if tf.config.threading.get_intra_op_parallelism_threads() == threads:
        return
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
    except RuntimeError as error:
        raise ConfigurationError(
            f"Expected to set threads={threads} before TensorFlow's first operation. Received: "
            "a TensorFlow that is running with another number. Start a new Python (in a notebook: "
            "restart the kernel)."
        ) from error


def release_memory() -> None:
    """Gives back to the system what is not used any more: ``tf.function`` objects are cycles, and
    glibc keeps what was freed.
    """
    gc.collect()
    if malloc_trim := _glibc("malloc_trim"):
        malloc_trim(0)


def set_deterministic() -> None:
    """Has every operation give the same bits each time, on a GPU too; for the whole process."""
    tf.config.experimental.enable_op_determinism()


def set_precision(precision: Precision) -> None:
    """Lets GPUs round the factors of products to TensorFloat-32, or not; for the whole process.
    What is mixed is a matter of the model: ``model.build``.
    """
    tf.config.experimental.enable_tensor_float_32_execution(precision != "float32")
