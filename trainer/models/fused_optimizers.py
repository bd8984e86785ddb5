"""Optimizer updates in one pass over the weights, by TensorFlow's fused kernels.

    with fused_update(model.optimizer):
        ...                                     # trace and run the training step

Keras updates Adadelta and Adam with about a dozen operations a variable, each a pass over memory.
The fused kernels read Keras' own slot variables, which are private attributes of its optimizers,
and stand in for its ``update_step``; so ``find_problem`` compares the two before the first use.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import numpy as np

from trainer.runtime import keras, tf

UpdateStep = Callable[[tf.Tensor, tf.Variable, tf.Tensor], None]

_KINDS = {"adadelta": keras.optimizers.Adadelta, "adam": keras.optimizers.Adam}
_CHECKED_STEPS = 4
# Relative difference that rounding to float32 may cause: most of it is in Adam's 1 - beta_2, 0.001,
# which is one operation on float32 in the fused kernel.
TOLERANCE = 1e-4


@contextlib.contextmanager
def fused_update(optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Replaces the ``update_step`` of an Adadelta or Adam optimizer; others keep their own.

    Args:
        optimizer: Built.
    """
    update_step = _fused_update_step(optimizer)
    if update_step is None:
        yield
        return
    optimizer.update_step = update_step
    try:
        yield
    finally:
        del optimizer.update_step


@functools.cache
def find_problem(name: str) -> str:
    """Returns why the fused update of an optimizer cannot be used; empty where it can.

    A few steps on a small variable are made both ways, and the variable and all of the optimizer's
    own variables compared: they may differ by the rounding of float32 only.

    Args:
        name: Keras' name of the optimizer.
    """
    kind = _KINDS.get(name)
    if kind is None:
        return ""
    try:
        expected, received = (_update(kind, fused=fused) for fused in (False, True))
    except Exception as error:  # Whatever follows from an attribute that Keras renamed or removed.
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    for a, b in zip(received, expected, strict=True):
        if not np.allclose(a, b, rtol=TOLERANCE, atol=0):
            return "its result differs from that of Keras' update"
    return ""


def _update(kind: type[keras.optimizers.Optimizer], *, fused: bool) -> list[np.ndarray]:
    """Returns the values of a variable and of its optimizer's variables after a few steps."""
    # From zero, by gradients of constant signs: the sum of the updates then has the relative
    # precision of each of them, however small they are.
    noise = np.random.default_rng(0)
    gradients = np.abs(noise.normal(0, 1, (_CHECKED_STEPS, 8))) * ([1, -1] * 4)
    variable = keras.Variable(np.zeros(8), dtype="float32", name="checked")
    # Named, because Keras numbers those without a name, and saves that name with a model.
    optimizer = kind(learning_rate=0.5, name="checked")
    optimizer.build([variable])
    update_step = _fused_update_step(optimizer) if fused else None
    calls = 0
    if update_step:

        def counted(*values: tf.Tensor) -> None:
            nonlocal calls
            calls += 1
            update_step(*values)

        optimizer.update_step = counted
    for gradient in gradients:
        optimizer.apply([tf.constant(gradient, tf.float32)], [variable])
    if update_step and calls != _CHECKED_STEPS:
        raise RuntimeError("Keras does not call update_step")
    return [variable.numpy(), *(slot.numpy() for slot in optimizer.variables)]


def _fused_update_step(optimizer: keras.optimizers.Optimizer) -> UpdateStep | None:
    """Returns the replacement of an optimizer's ``update_step``; None where there is none."""
    if type(optimizer) is _KINDS["adadelta"]:
        update = _update_adadelta
    elif type(optimizer) is _KINDS["adam"] and not optimizer.amsgrad:
        update = _update_adam
    else:
        return None

    def update_step(gradient: tf.Tensor, variable: tf.Variable, learning_rate: tf.Tensor) -> None:
        update(
            optimizer,
            optimizer._get_variable_index(variable),
            var=variable.handle,
            lr=tf.cast(learning_rate, variable.dtype),
            grad=tf.cast(gradient, variable.dtype),
        )

    return update_step


def _update_adadelta(optimizer: keras.optimizers.Adadelta, index: int, **common: tf.Tensor) -> None:
    dtype = common["grad"].dtype
    tf.raw_ops.ResourceApplyAdadelta(
        accum=optimizer._accumulated_grads[index].value.handle,
        accum_update=optimizer._accumulated_delta_vars[index].value.handle,
        rho=tf.constant(optimizer.rho, dtype),
        epsilon=tf.constant(optimizer.epsilon, dtype),
        **common,
    )


def _update_adam(optimizer: keras.optimizers.Adam, index: int, **common: tf.Tensor) -> None:
    dtype = common["grad"].dtype
    step = tf.cast(optimizer.iterations + 1, dtype)
    betas = optimizer.beta_1, optimizer.beta_2
    beta_1, beta_2 = (tf.constant(beta, dtype) for beta in betas)
    # As Keras 3.15 computes them, by way of float32.
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
