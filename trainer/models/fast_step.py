"""The training step on CPUs by other arithmetic: the same mathematics, in half the time.

    chosen = choose("auto", strategy, threads=2)
    with chosen.step(model) as forward:
        loop.fit(model, ..., forward=forward)

The convolutions, what is between them and the dropout behind them are one operation, written in C
(``winograd.c``), and its gradient another; Adadelta's update is TensorFlow's fused one. The layers
behind them, and every variable, are the model's own, which stays the stock Keras model that is
saved. Another model, and another device than CPUs, take the plain path: ``model`` itself.

Before it is first used the operation is compared with TensorFlow's own on this machine.
``docs/performance.md`` has what it brings, and what was tried beside it.
"""

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np

from trainer.config import Fast
from trainer.distributed.strategy import Workers, has_memory_of_its_own
from trainer.runtime import keras, tf

Forward = Callable[..., tf.Tensor]  # (x, training=...) -> the model's output

IMAGE_SHAPE = (28, 28, 1)
POOLED_SHAPE = (12, 12, 64)
TOLERANCE = 1e-5  # of the norm: what the float32 gradients of two right computations may differ by


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Whether the fast step is used.

    Attributes:
        name: For a run's record, because it decides last bits: ``keras``, or ``winograd`` and the
            instruction set.
        reason: A sentence for the user; empty where nothing needs saying.
        threads: Of an operation.
    """

    name: str
    reason: str
    threads: int

    @contextlib.contextmanager
    def step(self, model: keras.Model) -> Iterator[Forward]:
        """Gives what stands for ``model`` in the training step, and prepares its optimizer.

        Args:
            model: Built and compiled.
        """
        if self.name == "keras" or not _fits(model):
            yield model
            return
        with _fused(model.optimizer):
            yield functools.partial(_forward, model, self.threads)


def choose(kind: Fast, strategy: tf.distribute.Strategy, *, threads: int) -> Chosen:
    """Tells whether the fast step can be used. Starts TensorFlow's devices.

    Args:
        kind: ``auto``: where it can; ``off``: never.
        strategy: Its replicas share the threads of a process.
        threads: Those inside one operation of TensorFlow.
    """
    replicas = strategy.num_replicas_in_sync // Workers(strategy).count
    plain = functools.partial(Chosen, "keras", threads=threads)
    if kind == "off" or has_memory_of_its_own():
        return plain("")
    library = _library()
    if isinstance(library, str):
        return plain(f"the step is Keras' own, which takes twice the time: {library}")
    return Chosen(f"winograd {library.instructions}", "", max(1, threads // replicas))


@functools.cache
def _library() -> ModuleType | str:
    """Returns the operations; or why there are none."""
    spec = importlib.util.find_spec("trainer.models._winograd")
    if spec is None:
        return (
            "the fast one was not compiled when the package was installed, for want of gcc or clang"
        )
    try:
        library = tf.load_op_library(spec.origin)
        library.instructions = _instructions(spec.origin)
        right = _is_right(library)
    except (tf.errors.OpError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        return f"the fast one does not work with this TensorFlow ({reason})"
    if not right:
        return "the fast one computes something else on this processor; please report it"
    _register_gradient(library)
    return library


def _instructions(path: str) -> str:
    name = ctypes.CDLL(path).winograd_instructions
    name.restype = ctypes.c_char_p
    return name().decode()


def _is_right(library: ModuleType) -> bool:
    """Compares output and gradients with those of TensorFlow's own operations, on a few images."""
    noise = np.random.default_rng(0)
    n = 9  # more than one group of winograd.c, and no whole number of them
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


def _register_gradient(library: ModuleType) -> None:
    def gradient(op: tf.Operation, gradient: tf.Tensor, _: None) -> list[tf.Tensor | None]:
        options = {name: op.get_attr(name) for name in ("drop", "threads")}
        images, *weights, _random = op.inputs
        gradients = library.winograd_pool_grad(images, *weights, op.outputs[1], gradient, **options)
        for value, weight in zip(gradients, weights, strict=True):
            value.set_shape(weight.shape)
        return [None, *gradients, None]

    tf.RegisterGradient("WinogradPool")(gradient)


def _fits(model: keras.Model) -> bool:
    """Tells whether the model begins with what the operation computes."""
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
    """Stands for ``model(x, training=training)``; x has a static shape."""
    first, second, _, *rest = model.layers
    shape = (x.shape[0], *POOLED_SHAPE)
    drop, random = 0, tf.zeros((0, *POOLED_SHAPE), tf.uint8)
    if training and rest and _drops_in_256ths(rest[0]):
        dropout = rest.pop(0)
        drop = round(256 * dropout.rate)
        # A byte a unit, of the same stream of seeds that the layer draws its own masks by.
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
    """Tells whether a layer is a ``Dropout`` whose rate a byte can draw exactly."""
    return (
        type(layer) is keras.layers.Dropout
        and layer.noise_shape is None
        and 0 < layer.rate < 1
        and (256 * layer.rate).is_integer()
    )


@contextlib.contextmanager
def _fused(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Has Adadelta and Adam make their updates in one pass over the weights, where Keras makes a
    dozen; others are as they are.
    """
    if type(optimizer) is keras.optimizers.Adadelta:
        update = _update_adadelta
    elif type(optimizer) is keras.optimizers.Adam and not optimizer.amsgrad:
        update = _update_adam
    else:
        yield
        return

    def update_step(gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor) -> None:
        update(
            optimizer,
            optimizer._get_variable_index(variable),
            var=variable.handle,
            lr=tf.cast(learning_rate, variable.dtype),
            grad=tf.cast(gradient, variable.dtype),
        )

    optimizer.update_step = update_step
    try:
        yield
    finally:
        del optimizer.update_step


def _update_adadelta(optimizer: keras.optimizers.Adadelta, index: int, **common) -> None:
    dtype = common["grad"].dtype
    tf.raw_ops.ResourceApplyAdadelta(
        accum=optimizer._accumulated_grads[index].value.handle,
        accum_update=optimizer._accumulated_delta_vars[index].value.handle,
        rho=tf.constant(optimizer.rho, dtype),
        epsilon=tf.constant(optimizer.epsilon, dtype),
        **common,
    )


def _update_adam(optimizer: keras.optimizers.Adam, index: int, **common) -> None:
    dtype = common["grad"].dtype
    step = tf.cast(optimizer.iterations + 1, dtype)
    betas = optimizer.beta_1, optimizer.beta_2
    beta_1, beta_2 = (tf.constant(beta, dtype) for beta in betas)
    # As Keras 3.15 has them, where they come by way of float32.
    power_1, power_2 = (keras.ops.power(keras.ops.cast(beta, dtype.name), step) for beta in betas)
    tf.raw_ops.ResourceApplyAdam(
        m=optimizer._momentums[index].value.handle,
        v=optimizer._velocities[index].value.handle,
        beta1_power=power_1,
        beta2_power=power_2,
        beta1=beta_1,
        beta2=beta_2,
        epsilon=tf.constant(optimizer.epsilon, dtype),
        **common,
    )
