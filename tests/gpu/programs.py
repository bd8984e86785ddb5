"""What a test does on a device, in a process of its own: python programs.py NAME DEVICE ARGUMENTS

DEVICE is ``cpu``; ``gpu``; ``gpus``, two logical GPUs of one card, as two cards would be; or
``small gpu``, one with 100 MB. It prints one JSON value.
"""

import json
import sys

import numpy as np

from trainer.config import TrainConfig
from trainer.data import pipeline, sources
from trainer.distributed import strategy
from trainer.models import cnn
from trainer.runtime import keras, set_deterministic, set_precision, tf
from trainer.training import artifacts, digits_workload, loop, model_workload
from trainer.training.position import Position


class Record(keras.optimizers.SGD):
    """Keeps the gradients that it applies."""

    def build(self, variables):
        super().build(variables)
        self.kept = [keras.Variable(tf.zeros_like(v), trainable=False) for v in variables]

    def update_step(self, gradient, variable, learning_rate):
        self.kept[self._get_variable_index(variable)].assign(gradient)
        super().update_step(gradient, variable, learning_rate)


def train(chosen, *, optimizer, precision="float32", jit_compile=False, examples=256, epochs=1):
    """Trains the CNN without dropout; returns it, and the loss of each step."""
    digits = sources.load("bundled").first(examples, 100)
    set_precision(precision)
    with chosen.scope():
        model = cnn.build(optimizer="sgd", learning_rate=0.1, seed=0)
        model.optimizer = optimizer
        model.optimizer.build(model.trainable_variables)
        for layer in model.layers:
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0
    data = pipeline.put_on_devices(
        digits,
        strategy=chosen if strategy.has_accelerator() else None,
        preprocess=cnn.preprocess,
        augment=None,
    )
    losses, done = [], [0.0, 0.0]

    def after_call(position):
        if position.totals and position.step:
            weight, loss = np.subtract(position.totals[:2], done).tolist()
            if weight:
                losses.append(loss / weight)
            done[:] = position.totals[:2]

    loop.fit(
        model,
        lambda epoch: pipeline.train_batches(*data.train, batch_size=64, seed=0, epoch=epoch),
        pipeline.test_batches(*data.test, batch_size=64),
        strategy=chosen,
        loss=cnn.LOSS,
        metrics=cnn.METRICS,
        epochs=epochs,
        preprocess=data.preprocess,
        jit_compile=jit_compile,
        steps_per_execution=1,
        after_call=after_call,
    )
    return model, losses


def gradients(chosen, **options):
    """In float32, from the same state: the gradients of one step."""
    with chosen.scope():
        optimizer = Record(0.1)
    model, _ = train(chosen, optimizer=optimizer, examples=64, **options)
    return [kept.numpy().tolist() for kept in model.optimizer.kept]


def losses(chosen, **options):
    """In float64: the loss of every step of an epoch."""
    for setting in (keras.config.set_floatx, keras.config.set_dtype_policy):
        setting("float64")
    with chosen.scope():
        optimizer = keras.optimizers.Adadelta(1.0)
    return train(chosen, optimizer=optimizer, **options)[1]


def fitted(chosen, **settings):
    """What a configuration makes of the digits: accuracy, digest, devices of the weights."""
    config = TrainConfig(**settings)
    set_precision(config.precision)
    if config.deterministic:
        set_deterministic()
    digits = sources.load("bundled").first(config.train_limit, config.test_limit)
    model, history = digits_workload.fit(config, digits, strategy=chosen)
    return {
        "accuracy": history["val_accuracy"][-1],
        "sha256": artifacts.weights_sha256(model),
        "growth": [
            tf.config.experimental.get_memory_growth(gpu)
            for gpu in tf.config.list_physical_devices("GPU")
        ],
    }


def another_network(chosen):
    """What the built-in resnet makes of the digits: the accuracy, and whether the device holds
    them.
    """
    config = TrainConfig(model="resnet", optimizer="adam", augment="affine elastic", epochs=4)
    workload = model_workload.ModelWorkload(config, sources.load("bundled").first(12_800, 1000))
    workload.prepare(chosen)
    notices = []
    _, history = workload.fit(
        strategy=chosen,
        step=None,
        callbacks=[],
        begin=lambda model: Position(),
        after_call=lambda position: None,
        notify=notices.append,
    )
    return {"accuracy": history["val_accuracy"][-1], "notices": notices}


def main(name, device, arguments):
    """Runs a program on a device."""
    physical = tf.config.list_physical_devices("GPU")
    if device == "gpus":
        half = tf.config.LogicalDeviceConfiguration(memory_limit=8192)
        tf.config.set_logical_device_configuration(physical[0], [half, half])
    elif device == "small gpu":
        small = tf.config.LogicalDeviceConfiguration(memory_limit=100)
        tf.config.set_logical_device_configuration(physical[0], [small])
    chosen = strategy.create(
        "mirrored" if device == "gpus" else "one",
        cluster=None,
        gpus=0 if device == "cpu" else 1,
        collectives="tensorflow",
        startup_timeout=60,
    )
    if device != "cpu":
        assert strategy.has_accelerator(), chosen.reason
    print(json.dumps(globals()[name](chosen.strategy, **json.loads(arguments))))


if __name__ == "__main__":
    main(*sys.argv[1:])
