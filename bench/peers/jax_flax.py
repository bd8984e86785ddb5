"""The same training in JAX with Flax and Optax: one compiled step, its state donated."""

import pickle
from pathlib import Path

import jax
import numpy as np
import optax
import work
from flax import nnx
from jax import numpy as jnp

flags = work.arguments()
x_train, y_train, x_test, y_test = work.load(flags)


class CNN(nnx.Module):
    """The notebook's network."""

    def __init__(self, rngs: nnx.Rngs):
        xavier = nnx.initializers.xavier_uniform()
        self.conv1 = nnx.Conv(1, 32, (3, 3), padding="VALID", kernel_init=xavier, rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, (3, 3), padding="VALID", kernel_init=xavier, rngs=rngs)
        self.dropout1 = nnx.Dropout(0.25, rngs=rngs)
        self.dense1 = nnx.Linear(9216, 256, kernel_init=xavier, rngs=rngs)
        self.dropout2 = nnx.Dropout(0.5, rngs=rngs)
        self.dense2 = nnx.Linear(256, 10, kernel_init=xavier, rngs=rngs)

    def __call__(self, x):
        """Returns logits (n, 10) of uint8 images (n, 28, 28)."""
        x = x[..., None].astype(jnp.float32) / 255
        x = nnx.relu(self.conv1(x))
        x = nnx.relu(nnx.max_pool(self.conv2(x), (2, 2), (2, 2)))
        x = self.dropout1(x).reshape(len(x), -1)
        x = self.dropout2(nnx.relu(self.dense1(x)))
        return self.dense2(x)


model = CNN(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adadelta(1.0, rho=0.95, eps=1e-7), wrt=nnx.Param)


@nnx.jit(donate_argnums=(0, 1))
def train_step(model, optimizer, x, y):
    """Makes a step; returns the loss and how many were right."""

    def loss_of(model):
        logits = model(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), logits

    (loss, logits), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model)
    optimizer.update(model, gradients)
    return loss, (logits.argmax(1) == y).sum()


@nnx.jit
def count_right(model, x, y):
    """Returns how many of a batch are right."""
    return (model(x).argmax(1) == y).sum()


random = np.random.default_rng(0)
for epoch in range(flags.epochs):
    model.train()
    order = random.permutation(len(x_train))
    loss_sum = correct = 0
    for step, start in enumerate(range(0, len(order), flags.batch_size), start=1):
        rows = order[start : start + flags.batch_size]
        loss, right = train_step(model, optimizer, x_train[rows], y_train[rows].astype(np.int32))
        loss_sum, correct = loss_sum + loss * len(rows), correct + right
        if step == 1 or step % 10 == 0:
            jax.block_until_ready(loss)
            work.say("step", step=step)
    model.eval()
    right = sum(
        int(
            count_right(
                model, x_test[at : at + flags.batch_size], y_test[at : at + flags.batch_size]
            )
        )
        for at in range(0, len(x_test), flags.batch_size)
    )
    work.say("epoch", epoch=epoch + 1, accuracy=right / len(x_test))
if flags.output:
    Path(flags.output).write_bytes(pickle.dumps(nnx.state(model)))
