"""A training step that takes half the time on CPUs: the same mathematics, another algorithm.

    choice = find("auto", accelerator=False)                    # starts no TensorFlow device
    choice = choice.verify(optimizer="adadelta", threads=2)     # compares it with TensorFlow's own
    with choice.step(model) as forward:
        loop.fit(model, ..., forward=forward)

Both convolutions, the pooling and the dropout after it are one operation written in C
(``winograd.c``), and its gradient another; the optimizer's update is TensorFlow's fused kernel
(``fused_optimizers``). All other layers, and every variable, are those of the stock Keras model,
which is what is saved. Any other model, and any device but a CPU, takes Keras' own step.

Before its first use each part is compared on this machine with what it replaces, which stays in use
where they differ. ``docs/performance.md`` has what it gains, and what else was tried.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from trainer.config import Fast
from trainer.models.fused_optimizers import find_problem, fused_update
from trainer.runtime import keras, tf

Forward = Callable[..., tf.Tensor]  # (x, training=...) -> the model's output

IMAGE_SHAPE = (28, 28, 1)
POOLED_SHAPE = (12, 12, 64)
TOLERANCE = 1e-5  # relative difference in norm that rounding to float32 may cause in a gradient


@dataclasses.dataclass(frozen=True)
class StepChoice:
    """Which training step a run uses.

    Attributes:
        name: For the run manifest, because it determines the last bits of a result: ``keras``, or
            ``winograd`` and the instruction set.
        reason: Why Keras' own operations are used, a sentence for the user; or empty.
        threads: Threads inside one operation.
        fused: Whether the optimizer's update is a fused kernel.
    """

    name: str
    reason: str = ""
    threads: int = 1
    fused: bool = False

    def verify(self, *, optimizer: str, threads: int, replicas: int = 1) -> "StepChoice":
        """Compares the fast step with TensorFlow's and Keras' own operations on this machine; call
        it after the strategy is constructed, since it starts TensorFlow's devices.

        Args:
            optimizer: Keras' name of the optimizer.
            threads: Threads inside one operation of TensorFlow.
            replicas: Number of replicas in this process, which share the threads.

        Returns:
            The step to use: this one, or Keras' in place of the parts that differ.
        """
        if self.name == "keras":
            return self
        if problem := _difference():
            return _keras(problem)
        verified = dataclasses.replace(self, threads=max(1, threads // replicas), fused=True)
        if problem := find_problem(optimizer):
            return dataclasses.replace(
                verified,
                name=f"{self.name}, update by keras",
                reason=f"the optimizer's update is Keras' own: the fused one does not work with "
                f"Keras {keras.__version__} ({problem})",
                fused=False,
            )
        return verified

    @contextlib.contextmanager
    def step(self, model: keras.Model) -> Iterator[Forward]:
        """Yields the function to call in place of ``model`` in the training step. Inside the
        ``with`` block, the update of its optimizer is replaced, too.

        Args:
            model: Built and compiled.
        """
        if self.name == "keras" or not _fits(model):
            yield model
            return
        with fused_update(model.optimizer) if self.fused else contextlib.nullcontext():
            yield functools.partial(_forward, model, self.threads)


def find(kind: Fast, *, accelerator: bool) -> StepChoice:
    """Tells whether the fast step can be used; starts no TensorFlow device.

    Args:
        kind: ``auto``: wherever possible; ``off``: never.
        accelerator: Whether the run computes on GPUs or a TPU.
    """
    if kind == "off" or accelerator:
        return StepChoice("keras")
    library = _library()
    if isinstance(library, str):
        return _keras(library)
    return StepChoice(f"winograd {library.instructions}")


def _keras(problem: str) -> StepChoice:
    return StepChoice("keras", f"the step is Keras' own, which takes twice the time: {problem}")


@functools.cache
def _library() -> Any:
    """Returns the module of the operations, or why they cannot be used: a string."""
    spec = importlib.util.find_spec("trainer.models._winograd")
    if spec is None or spec.origin is None:
        return "the fast one was not compiled: no gcc or clang when the package was installed"
    try:
        library = tf.load_op_library(spec.origin)
        library.instructions = _instructions(spec.origin)
        _register_gradient(library)
    except (tf.errors.OpError, AttributeError) as error:
        return _does_not_work(error)
    return library


def _instructions(path: str) -> str:
    name = ctypes.CDLL(path).winograd_instructions
    name.restype = ctypes.c_char_p
    return name().decode()


def _does_not_work(error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"the fast one does not work with this TensorFlow ({reason})"


def _register_gradient(library: ModuleType) -> None:
    # Looked up here, so that a library without the operation is an error now.
    backward = library.winograd_pool_grad

    def gradient(op: tf.Operation, gradient: tf.Tensor, _: None) -> list[tf.Tensor | None]:
        options = {name: op.get_attr(name) for name in ("drop", "threads")}
        images, *weights, _random = op.inputs
        gradients = backward(images, *weights, op.outputs[1], gradient, **options)
        for value, weight in zip(gradients, weights, strict=True):
            value.set_shape(weight.shape)
        return [None, *gradients, None]

    tf.RegisterGradient("WinogradPool")(gradient)


@functools.cache
def _difference() -> str:
    """Returns why the loaded operations cannot be used; empty where they can."""
    try:
        if _computes_the_same(_library()):
            return ""
    except (tf.errors.OpError, AttributeError) as error:
        return _does_not_work(error)
    return "the fast one gives wrong results on this processor; please report it"


def _computes_the_same(library: ModuleType) -> bool:
    """Compares output and gradients with those of TensorFlow's own operations on a few images."""
    noise = np.random.default_rng(0)
    n = 9  # more than one group of images of winograd.c, the last one incomplete
    shapes = ((n, *IMAGE_SHAPE), (3, 3, 1, 32), (32,), (3, 3, 32, 64), (64,), (n, *POOLED_SHAPE))
    x, *weights, gradient = (
        tf.constant(noise.normal(0, scale, shape), tf.float32)
        for scale, shape in zip((1, 0.3, 0.1, 0.06, 0.1, 1), shapes, strict=True)
    )
    random = tf.constant(noise.integers(0, 256, (n, *POOLED_SHAPE)), tf.uint8)
    options = {"drop": 64, "threads": 2}
    out, code = library.winograd_pool(x, *weights, random, **options)
    received = [out, *library.winograd_pool_grad(x, *weights, code, gradient, **options)]
    with tf.GradientTape() as tape:
        tape.watch(weights)
        y = tf.nn.relu(tf.nn.conv2d(x, weights[0], 1, "VALID") + weights[1])
        y = tf.nn.relu(tf.nn.conv2d(y, weights[2], 1, "VALID") + weights[3])
        y = tf.nn.max_pool2d(y, 2, 2, "VALID") * tf.cast(random >= 64, tf.float32) / 0.75
    expected = [y, *tape.gradient(y, weights, gradient)]
    return all(
        bool(tf.norm(a - b) <= TOLERANCE * tf.norm(b))
        for a, b in zip(received, expected, strict=True)
    )


def _fits(model: keras.Model) -> bool:
    """Tells whether the model begins with the layers that the operation replaces."""
    if type(model) is not keras.Sequential or model.input_shape[1:] != IMAGE_SHAPE:
        return False
    convolution = {
        "kernel_size": (3, 3),
        "strides": (1, 1),
        "padding": "valid",
        "data_format": "channels_last",
        "dilation_rate": (1, 1),
        "groups": 1,
        "activation": keras.activations.relu,
        "use_bias": True,
        "kernel_regularizer": None,
        "bias_regularizer": None,
        "activity_regularizer": None,
        "lora_rank": None,
        "quantization_mode": None,
    }
    expected = (
        (keras.layers.Conv2D, {**convolution, "filters": 32}),
        (keras.layers.Conv2D, {**convolution, "filters": 64}),
        (
            keras.layers.MaxPooling2D,
            {
                "pool_size": (2, 2),
                "strides": (2, 2),
                "padding": "valid",
                "data_format": "channels_last",
            },
        ),
    )
    if len(model.layers) < len(expected):
        return False
    return all(
        type(layer) is kind
        and layer.dtype_policy.name in ("float32", "float64")
        and all(getattr(layer, name, None) == value for name, value in values.items())
        for layer, (kind, values) in zip(model.layers, expected, strict=False)
    )


def _forward(model: keras.Sequential, threads: int, x: tf.Tensor, *, training: bool) -> tf.Tensor:
    """Computes ``model(x, training=training)``; x has a static shape."""
    first, second, _, *rest = model.layers
    shape = (x.shape[0], *POOLED_SHAPE)
    drop, random = 0, tf.zeros((0, *POOLED_SHAPE), tf.uint8)
    if training and rest and _drops_in_256ths(rest[0]):
        dropout = rest.pop(0)
        drop = round(256 * dropout.rate)
        # One random byte a unit, from the seeds that the layer would draw its masks with.
        seed = tf.cast(dropout.seed_generator.next(), tf.int32)
        words = tf.random.stateless_uniform((*shape[:-1], 16), seed, None, None, tf.uint32)
        random = tf.reshape(tf.bitcast(words, tf.uint8), shape)
    out, _ = _library().winograd_pool(
        tf.cast(x, first.compute_dtype),
        *(tf.convert_to_tensor(layer_weight) for layer_weight in (*first.weights, *second.weights)),
        random,
        drop=drop,
        threads=threads,
    )
    out.set_shape(shape)
    for layer in rest:
        out = layer(out, training=training)
    return out


def _drops_in_256ths(layer: keras.Layer) -> bool:
    """Tells whether a layer is a ``Dropout`` with a rate that is a multiple of 1/256."""
    return (
        type(layer) is keras.layers.Dropout
        and layer.noise_shape is None
        and 0 < layer.rate < 1
        and (256 * layer.rate).is_integer()
    )
