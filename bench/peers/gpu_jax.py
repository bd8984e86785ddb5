"""The same training in JAX on a GPU: the data on the device, and a whole epoch under one jit, its
state donated. JAX alone: what Flax and Optax would add is gone when XLA has compiled it.
"""

import functools

import gpu_work as work
import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

flags = work.arguments()
x_train, y_train, x_test, y_test = (jnp.asarray(array) for array in work.load(flags))
y_train, y_test = y_train.astype(jnp.int32), y_test.astype(jnp.int32)

RHO, EPSILON = 0.95, 1e-7
SHAPES = {
    "conv1": (3, 3, 1, 32),
    "conv2": (3, 3, 32, 64),
    "dense1": (9216, 256),
    "dense2": (256, 10),
}


def initialize():
    """Returns Glorot-uniform kernels, zero biases, and Adadelta's accumulators."""
    xavier = jax.nn.initializers.glorot_uniform()
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    weights = {
        name: (xavier(key, shape), jnp.zeros(shape[-1]))
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }
    zeros = jax.tree.map(jnp.zeros_like, weights)
    return weights, zeros, jax.tree.map(jnp.zeros_like, weights)


def drop(key, x, rate):
    """Sets elements to zero."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def forward(weights, images, dtype, keys=None):
    """Returns logits float32 (n, 10) of uint8 images (n, 28, 28); with keys, with dropout."""
    x = (images[..., None].astype(jnp.float32) / 255).astype(dtype)
    weights = jax.tree.map(lambda weight: weight.astype(dtype), weights)
    for name in ("conv1", "conv2"):
        kernel, bias = weights[name]
        x = lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + bias)
    x = lax.reduce_window(
        x, np.array(-jnp.inf, x.dtype), lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    )
    if keys is not None:
        x = drop(keys[0], x, 0.25)
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ weights["dense1"][0] + weights["dense1"][1])
    if keys is not None:
        x = drop(keys[1], x, 0.5)
    return (x @ weights["dense2"][0] + weights["dense2"][1]).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("batch_size", "dtype"), donate_argnums=(0,))
def train_epoch(state, key, x, y, *, batch_size, dtype):
    """Trains an epoch; returns the state, the mean loss, and how many were right."""
    steps = len(x) // batch_size
    order, dropout = jax.random.split(key)
    rows = jax.random.permutation(order, len(x))[: steps * batch_size].reshape(steps, -1)

    def step(state, batch):
        rows, key = batch
        weights, squares, deltas = state

        def loss_of(weights):
            logits = forward(weights, x[rows], dtype, jax.random.split(key))
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y[rows][:, None], axis=1)
            return -chosen.mean(), (logits.argmax(1) == y[rows]).sum()

        (loss, right), gradients = jax.value_and_grad(loss_of, has_aux=True)(weights)
        squares = jax.tree.map(lambda s, g: RHO * s + (1 - RHO) * g * g, squares, gradients)
        changes = jax.tree.map(
            lambda s, d, g: g * jnp.sqrt((d + EPSILON) / (s + EPSILON)), squares, deltas, gradients
        )
        deltas = jax.tree.map(lambda d, c: RHO * d + (1 - RHO) * c * c, deltas, changes)
        weights = jax.tree.map(jnp.subtract, weights, changes)
        return (weights, squares, deltas), (loss, right)

    state, (losses, right) = lax.scan(step, state, (rows, jax.random.split(dropout, steps)))
    return state, losses.mean(), right.sum()


@functools.partial(jax.jit, static_argnames="dtype")
def count_right(weights, x, y, *, dtype):
    """Returns how many are right."""
    return (forward(weights, x, dtype).argmax(1) == y).sum()


def measure(batch_size: int, precision: str) -> None:
    """Times the epochs of one combination."""
    dtype = jnp.bfloat16 if precision == "mixed_bfloat16" else jnp.float32
    matmul = "float32" if precision == "float32" else "tensorfloat32"
    with jax.default_matmul_precision(matmul):
        state, key = initialize(), jax.random.key(1)

        def epoch():
            nonlocal state, key
            key, used = jax.random.split(key)
            state, loss, _ = train_epoch(
                state, used, x_train, y_train, batch_size=batch_size, dtype=dtype
            )
            loss.block_until_ready()

        name = "JAX, an epoch under one jit"
        steps = len(x_train) // batch_size
        work.time_epochs(name, batch_size, precision, steps, flags.epochs, epoch)
        right = sum(
            int(count_right(state[0], x_test[at : at + 1000], y_test[at : at + 1000], dtype=dtype))
            for at in range(0, len(x_test), 1000)
        )
        work.say("accuracy", name=name, value=right / len(x_test), epochs=flags.epochs)


for precision in flags.precisions:
    for batch_size in flags.batch_sizes:
        measure(batch_size, precision)
