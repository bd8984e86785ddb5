"""The trainer itself on a GPU: one part of it a call.

gpu_trainer.py DATA limits | steps | program | recipes | run
"""

import contextlib
import io
import re
import statistics
import tempfile
import time
from pathlib import Path

import gpu_work as work
import numpy as np

from trainer.config import TrainConfig
from trainer.data.digits import Digits

flags = work.arguments()


def limits() -> None:
    """What the device can do at most: products of large matrices, and copies in its memory."""
    from trainer.runtime import set_precision, tf

    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    size, repeats = (8192, 20) if on_gpu else (512, 2)

    def rate(call, work_done: float) -> float:
        call()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return work_done * repeats / statistics.median(seconds)

    for precision in flags.precisions:
        set_precision(precision)
        dtype = tf.bfloat16 if precision == "mixed_bfloat16" else tf.float32
        matrix = tf.cast(tf.random.normal((size, size)), dtype)

        @tf.function(autograph=False)
        def products(matrix=matrix):
            result = matrix
            for _ in range(repeats):
                result = matrix @ result / size
            return tf.reduce_sum(tf.cast(result, tf.float32))

        work.say("limit", name=precision, tflops=rate(lambda: products().numpy(), 2e-12 * size**3))
    large = tf.zeros((size * size,), tf.float32)

    @tf.function(autograph=False)
    def passes():
        result = large
        for _ in range(repeats):
            result = tf.math.negative(result)  # Reads and writes all of it.
        return result[0]

    work.say("limit", name="memory", gbps=rate(lambda: passes().numpy(), 8e-9 * size**2))


def steps() -> None:
    """The time of a step, by batch size, precision, and with XLA or without; device memory."""
    from trainer.runtime import tf

    digits = Digits(*work.load(flags))
    for precision in flags.precisions:
        for batch_size in flags.batch_sizes:
            for jit_compile in (False, True):
                _measure(tf, digits, precision, batch_size, jit_compile)


def _measure(tf, digits, precision, batch_size, jit_compile) -> None:
    from trainer.training import digits_workload, run

    config = TrainConfig(
        epochs=flags.epochs,
        batch_size=batch_size,
        precision=precision,
        jit_compile=jit_compile,
        fast="off",
    )
    run.configure_tensorflow(config)
    gpus = tf.config.list_logical_devices("GPU")
    if gpus:
        tf.config.experimental.reset_memory_stats(gpus[0].name)
    calls = Calls()
    start = time.perf_counter()
    _, history = digits_workload.fit(config, digits, callbacks=[calls.callback()])
    seconds = time.perf_counter() - start
    work.say(
        "step",
        name=f"this trainer{', --jit-compile' if jit_compile else ''}",
        batch_size=batch_size,
        precision=precision,
        us=calls.step_seconds() * 1e6,
        first_epoch_s=history["seconds"][0],
        fit_s=seconds,
        peak_mb=tf.config.experimental.get_memory_info(gpus[0].name)["peak"] / 1e6
        if gpus
        else None,
    )
    work.say(
        "accuracy", name="this trainer", value=history["val_accuracy"][-1], epochs=flags.epochs
    )


class Calls:
    """Times the calls of the training step."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float]] = []  # steps, seconds
        self.evaluation = 0.0

    def callback(self):
        """Returns the Keras callback that does it."""
        from trainer.runtime import keras

        outer = self

        class Timer(keras.callbacks.Callback):
            def on_train_batch_begin(self, batch, logs=None):
                self.batch, self.start = batch, time.perf_counter()

            def on_train_batch_end(self, batch, logs=None):
                outer.calls.append((batch - self.batch + 1, time.perf_counter() - self.start))

            def on_test_begin(self, logs=None):
                self.test_start = time.perf_counter()

            def on_test_end(self, logs=None):
                outer.evaluation = time.perf_counter() - self.test_start

        return Timer()

    def step_seconds(self) -> float:
        """Returns the median time of a step in the longest calls."""
        most = max(steps for steps, _ in self.calls[1:] or self.calls)
        return statistics.median(
            seconds / steps for steps, seconds in self.calls[1:] or self.calls if steps == most
        )


def program() -> None:
    """What XLA makes of a step: how many kernels it launches, and the bytes that they read and
    write, by the compiled program itself.
    """
    from trainer.data import pipeline
    from trainer.distributed import replica_updates
    from trainer.models import cnn
    from trainer.runtime import tf
    from trainer.training import execution
    from trainer.training.objective import PerExample

    digits = Digits(*work.load(flags))
    for precision in flags.precisions:
        for batch_size in flags.batch_sizes:
            config = TrainConfig(batch_size=batch_size, precision=precision)
            model = cnn.from_config(config, len(digits.x_train))
            strategy = tf.distribute.get_strategy()
            data = pipeline.put_on_devices(
                digits, strategy=strategy, preprocess=cnn.preprocess, augment=None
            )
            objective = PerExample(
                model, loss=cnn.LOSS, metrics=cnn.METRICS, preprocess=data.preprocess
            )
            update = replica_updates.create(model.optimizer, model.trainable_variables, strategy)
            step = objective.train_step(update, jit_compile=False)
            call = execution._compile_program(
                step, 1 + len(objective.names), objective.dtype, objective.examples
            )
            batches = pipeline.train_batches(*data.train, batch_size=batch_size, seed=0, epoch=0)
            chunk = next(iter(batches.batch(len(batches))))
            text = call.experimental_get_compiler_ir(chunk, tf.constant(0), tf.constant(1))(
                stage="optimized_hlo"
            )
            launches, accessed = count(text)
            work.say(
                "program",
                batch_size=batch_size,
                precision=precision,
                launches=launches,
                megabytes=accessed / 1e6,
            )


_FREE = {"parameter", "get-tuple-element", "tuple", "constant", "bitcast", "after-all"}
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f64": 8, "s64": 8, "u64": 8}
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?(%?[\w.-]+) = (.+?) ([a-z][\w-]*)\((.*)$")


def count(text: str) -> tuple[int, float]:
    """Counts in the body of the program's loop over the steps.

    Args:
        text: A compiled program, as XLA prints it.

    Returns:
        Its instructions that do something, which a GPU launches one by one; the bytes of their
        operands and results, each counted whenever it is read or written.
    """
    bodies = re.findall(r"\bwhile\(.*?body=(%?[\w.-]+)", text)
    computations = _computations(text)
    # The loop over the steps is the one with the most in it; others are in it.
    body = max((computations.get(name.lstrip("%"), []) for name in bodies), key=len, default=[])
    sizes, launches, accessed = {}, 0, 0.0
    for name, shape, opcode, operands in body:
        sizes[name] = _size(shape)
        if opcode in _FREE:
            continue
        launches += 1
        accessed += sizes[name]
        accessed += sum(sizes.get(operand, 0) for operand in re.findall(r"%[\w.-]+", operands))
    return launches, accessed


def _computations(text: str) -> dict[str, list[tuple[str, str, str, str]]]:
    found: dict[str, list[tuple[str, str, str, str]]] = {}
    current: list[tuple[str, str, str, str]] = []
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            current = found.setdefault(header[1], [])
        elif match := _INSTRUCTION.match(line):
            name, shape, opcode, rest = match.groups()
            current.append((f"%{name.lstrip('%')}", shape, opcode, rest.split("), ")[0]))
    return found


def _size(shape: str) -> float:
    if shape.startswith("("):  # Of a tuple, such as the loop's state: its parts are read.
        return 0.0
    total = 0.0
    for dtype, dimensions in _SHAPE.findall(shape):
        elements = np.prod([int(n) for n in dimensions.split(",") if n], dtype=float)
        total += elements * _BYTES.get(dtype, 4)
    return total


def smaller() -> dict[str, int]:
    """Returns the settings of a smoke test; empty without one."""
    if flags.train_limit is None:
        return {}
    n = flags.train_limit
    return {"epochs": 2, "train_limit": n, "test_limit": n // 2, "batch_size": n // 2}


def recipes() -> None:
    """The recipes to their accuracy: seconds of training, with XLA and without, by seed."""
    from trainer.training import digits_workload, run

    digits = Digits(*work.load(flags))
    for recipe in ("fast", "best"):
        for seed in range(flags.seeds):
            config = TrainConfig(recipe=recipe, seed=seed, jit_compile=True, **smaller())
            run.configure_tensorflow(config)
            start = time.perf_counter()
            _, history = digits_workload.fit(config, digits)
            work.say(
                "recipe",
                name=recipe,
                seed=seed,
                fit_s=time.perf_counter() - start,
                epochs_s=sum(history["seconds"]),
                accuracy=history["val_accuracy"][-1],
            )


def run() -> None:
    """The default run, from the command to ``mnist.h5``, and what its parts take."""
    from trainer.training import artifacts, report
    from trainer.training import run as runs

    for jit_compile in (False, True):
        parts: dict[str, float] = {}

        def timed(name, function, parts=parts):
            def call(*positional, **named):
                start = time.perf_counter()
                try:
                    return function(*positional, **named)
                finally:
                    parts[name] = parts.get(name, 0.0) + time.perf_counter() - start

            return call

        calls = Calls()
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                output_dir=Path(folder),
                jit_compile=jit_compile,
                **smaller(),
            )
            save, draw = artifacts.save, report.Report.draw
            artifacts.save, report.Report.draw = timed("save", save), timed("report", draw)
            begun = time.perf_counter()
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    done = runs.train(config, callbacks=[calls.callback()])
            finally:
                artifacts.save, report.Report.draw = save, draw
            total = time.perf_counter() - begun
        work.say(
            "run",
            name=f"default run{', --jit-compile' if jit_compile else ''}",
            total_s=total,
            training_s=sum(done.history["seconds"]),
            epochs_after_the_first_s=sum(done.history["seconds"][1:]),
            first_call_s=calls.calls[0][1],
            step_us=calls.step_seconds() * 1e6,
            evaluation_s=calls.evaluation,
            save_s=parts.get("save", 0.0),
            report_s=parts.get("report", 0.0),
            accuracy=done.history["val_accuracy"][-1],
        )


{"limits": limits, "steps": steps, "program": program, "recipes": recipes, "run": run}[flags.part]()
