"""TensorFlow and Keras; every module imports them from here.

    from trainer.runtime import keras, tf

What affects the bits of a result is set here, for a command, a notebook and a library call alike:
importing this module sets TF_ENABLE_ONEDNN_OPTS to 1 before TensorFlow is imported, unless it is
set. Where TensorFlow was imported before, it stays as it was, and a run's manifest says so. Nothing
else of the process is changed by the import. The functions below change TensorFlow's settings for
the whole process.
"""

import contextlib
import gc
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping

from trainer import keras_json, machine
from trainer.config import Precision
from trainer.errors import ConfigurationError
from trainer.log_lines import DroppingStream

_ONEDNN = "TF_ENABLE_ONEDNN_OPTS"

# Environment variables that choose other kernels, instructions or roundings: of XLA, TensorFlow
# 2.21, oneDNN (each also under its old name, DNNL_) and CUDA. Not those of threads, which
# ``set_threads`` overrides.
_DECIDE_BITS = (
    "XLA_FLAGS",
    "TF_XLA_FLAGS",
    "TF_DETERMINISTIC_OPS",
    "TF_CUDNN_DETERMINISTIC",
    "TF_CUDNN_USE_AUTOTUNE",
    "TF_CUDNN_DISABLE_CONV_1X1_OPTIMIZATION",
    "TF_CONV2D_USE_FP16_ACCUMULATE",
    "TF_FP16_MATMUL_USE_FP32_COMPUTE",
    "TF_MATMUL_AUTOTUNE_ENABLE",
    "TF_USE_CUBLASLT",
    "TF_USE_DEEP_CONV2D",
    "TF_ENABLE_MAXPOOL_NANPROP",
    "TF_ENABLE_ZENDNN_OPTS",
    "TF_SET_ONEDNN_FPMATH_MODE",
    *(
        f"{prefix}_{name}"
        for prefix in ("ONEDNN", "DNNL")
        for name in ("MAX_CPU_ISA", "CPU_ISA_HINTS", "DEFAULT_FPMATH_MODE")
    ),
    "NVIDIA_TF32_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
)


@contextlib.contextmanager
def _silent_import() -> Iterator[None]:
    """If TF_CPP_MIN_LOG_LEVEL is 3, captures what is written to stderr, by C++ too, and shows it
    only if an error follows: TensorFlow 2.21 logs about the processor before it reads the variable.
    """
    quiet = os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "3" and "tensorflow" not in sys.modules
    kept = None
    if quiet and sys.stderr is not None:
        with contextlib.suppress(OSError):  # No room for it, or no folder: it is shown.
            kept = tempfile.TemporaryFile()  # noqa: SIM115
    if kept is None:
        yield
        return
    DroppingStream(sys.stderr).flush()
    stderr = os.dup(2)
    with kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except Exception:
            kept.seek(0)
            with contextlib.suppress(OSError):
                os.write(stderr, kept.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _set_onednn() -> str:
    """Switches oneDNN's operations on, which TensorFlow 2.21 itself does on processors with AVX-512
    only: with AVX2 alone they take two thirds of the time (docs/performance.md).

    Returns:
        What TensorFlow runs with, for a run's manifest.
    """
    default = "the processor's"
    if platform.machine() not in ("x86_64", "AMD64") or "tensorflow" in sys.modules:
        return os.environ.get(_ONEDNN, default)
    return os.environ.setdefault(_ONEDNN, "1")


def _wrong_backend(received: object) -> ConfigurationError:
    return ConfigurationError(
        f"Expected Keras on TensorFlow. Received: {received}. Set KERAS_BACKEND=tensorflow before "
        "Keras is imported."
    )


def _check_keras_json() -> None:
    path, _, fault = keras_json.read(os.environ)
    if fault:
        raise ConfigurationError(
            "Expected a keras.json with which Keras and TensorFlow can be imported. Received: "
            f"{path} {fault}. Correct or remove it."
        )


ONEDNN = _set_onednn()

# Checked before Keras is imported, which fails where the packages of that backend are missing.
if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
    raise _wrong_backend(f"KERAS_BACKEND={os.environ['KERAS_BACKEND']}")
if "keras" not in sys.modules:
    _check_keras_json()
try:
    with _silent_import():
        import tensorflow as tf

    import keras
except ModuleNotFoundError as error:
    if error.name == "tensorflow":
        raise ConfigurationError(
            "Expected TensorFlow. Received: a Python without it. Install one of: "
            "pip install 'digits-trainer[cpu]', 'digits-trainer[gpu]' or 'digits-trainer[tpu]'"
        ) from error
    if error.name in ("jax", "torch", "openvino"):
        raise _wrong_backend(f"a backend that needs {error.name}") from error
    raise
if keras.backend.backend() != "tensorflow":
    raise _wrong_backend(f"Keras on {keras.backend.backend()}")

__all__ = [
    "ONEDNN",
    "deciding_variables",
    "keras",
    "keras_defaults",
    "release_memory",
    "set_deterministic",
    "set_precision",
    "set_threads",
    "tf",
    "threads",
]


def deciding_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns those variables of an environment that affect the bits of a result, beside
    TF_ENABLE_ONEDNN_OPTS.

    >>> deciding_variables({"XLA_FLAGS": "--xla_cpu_enable_fast_math", "HOME": "/home/a"})
    {'XLA_FLAGS': '--xla_cpu_enable_fast_math'}
    """
    return {name: environ[name] for name in _DECIDE_BITS if name in environ}


def set_threads(threads: int) -> None:
    """Sets the threads inside one operation, for the whole process; only before the first one.

    Raises:
        ConfigurationError: TensorFlow is running already, with another number.
    """
    running = tf.config.threading.get_intra_op_parallelism_threads()
    if running == threads:
        return
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
    except RuntimeError as error:
        running = running or machine.affinity_cpus()  # 0: TensorFlow's choice
        if running == threads:
            return
        raise ConfigurationError(
            f"Expected to set threads={threads} before TensorFlow's first operation. Received: "
            f"a TensorFlow that is running with threads={running}. Start a new Python (in a "
            f"notebook: restart the kernel), or use threads={running}."
        ) from error


def threads() -> int:
    """Returns the number of threads inside one operation."""
    return tf.config.threading.get_intra_op_parallelism_threads() or machine.affinity_cpus()


def release_memory() -> None:
    """Returns unused memory to the system: ``tf.function`` objects are cycles, and glibc keeps
    what was freed.
    """
    gc.collect()
    machine.trim_heap()


def set_deterministic() -> None:
    """Makes every operation deterministic, on a GPU too, for the whole process."""
    tf.config.experimental.enable_op_determinism()


def set_precision(precision: Precision) -> None:
    """Allows TensorFloat-32 in matrix products on GPUs, or not, for the whole process. A mixed
    precision is set in the model: ``models.cnn.build``.
    """
    tf.config.experimental.enable_tensor_float_32_execution(precision != "float32")


@contextlib.contextmanager
def keras_defaults() -> Iterator[None]:
    """Keras as it is without ~/.keras/keras.json and a global dtype policy: in float32, which a
    run's precision starts from, and with its own epsilon. Afterwards both are as before.
    """
    config = keras.config
    before = config.floatx(), config.epsilon(), config.dtype_policy()
    _configure_keras("float32", 1e-7, "float32")
    try:
        yield
    finally:
        _configure_keras(*before)


def _configure_keras(floatx: str, epsilon: float, policy: str | keras.DTypePolicy) -> None:
    keras.config.set_floatx(floatx)
    keras.config.set_epsilon(epsilon)
    keras.config.set_dtype_policy(policy)
