"""What several replicas compute, to be compared with what one does.

    python replicas.py NAME DEVICES ARGUMENTS-AS-JSON OUTPUT

calls one of these functions under the strategy for that many logical CPU devices, or for the
workers of TF_CONFIG. In a process of its own, because TensorFlow numbers the groups that reduce
together by process: a second strategy of another size is refused.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import fit_models
import keras_models
import numpy as np
from sessions import Session
from support import HAS_FAST_STEP

from trainer import config, runtime
from trainer.data import pipeline, sources
from trainer.distributed import cluster, ring, strategy
from trainer.distributed.collectives import Workers
from trainer.distributed.replica_seeds import separate_seeds
from trainer.errors import StoppedError
from trainer.models import cnn, fast_step
from trainer.runtime import keras, tf
from trainer.training import artifacts, digits_workload, loop
from trainer.training.position import Position

CHOICE = None  # strategy.create's, of this process


class Record(keras.optimizers.SGD):
    """An optimizer that keeps each step's gradients and leaves the weights as they are."""

    def build(self, variables):
        super().build(variables)
        self.kept = [self.add_variable_from_reference(v, name="kept") for v in variables]

    def update_step(self, gradient, variable, learning_rate):
        self.assign(self.kept[self._get_variable_index(variable)], gradient)


def train(
    chosen,
    digits,
    *,
    batch_size,
    optimizer=None,
    dropout=False,
    folder=None,
    stop_at=None,
    kind="auto",
    jit_compile=False,
):
    """Trains the CNN for an epoch, by the fast step or (``off``) Keras'; returns it, its history,
    and every step's loss and gradients.

    With a folder it goes on from the checkpoint there, and stops after a number of steps.
    """
    with chosen.scope():
        model = cnn.build(optimizer="adadelta", learning_rate=1.0, seed=0)
        if optimizer:
            model.optimizer = optimizer()
            model.optimizer.build(model.trainable_variables)
        if not dropout:
            for layer in model.layers:
                if isinstance(layer, keras.layers.Dropout):
                    layer.rate = 0
    session = folder and Session(
        Path(folder),
        stop=lambda: "SIGTERM" if done == stop_at else None,
        notify=print,
        strategy=chosen,
    )
    position = session.begin(model) if session else Position()
    done, sums, steps = position.steps, position.totals[:2] or [0.0, 0.0], []

    def after_call(position):
        nonlocal done, sums
        if position.steps > done:  # not in an evaluation
            weight, loss = np.subtract(position.totals[:2], sums).tolist()
            gradients = [v.numpy() for v in model.optimizer.kept] if optimizer else None
            steps.append((loss / weight, gradients))
            done, sums = position.steps, position.totals[:2]
        if session:
            session.after_call(position)

    history = {}
    step = fast_step.find(kind, accelerator=False).verify(
        optimizer="adadelta", threads=2, replicas=Workers(chosen).local_replicas
    )
    assert (step.name == "keras") == (kind == "off" or not HAS_FAST_STEP)
    with contextlib.suppress(StoppedError), step.step(model) as forward:
        history = loop.fit(
            model,
            lambda epoch: pipeline.train_batches(
                digits.x_train, digits.y_train, batch_size=batch_size, seed=0, epoch=epoch
            ),
            pipeline.test_batches(digits.x_test, digits.y_test, batch_size=batch_size),
            strategy=chosen,
            loss=cnn.LOSS,
            metrics=cnn.METRICS,
            epochs=1,
            preprocess=cnn.preprocess,
            forward=forward,
            jit_compile=jit_compile,
            steps_per_execution=1,
            position=position,
            after_call=after_call,
        )
        history.pop("seconds")
    return model, history, steps


def losses(chosen, *, examples, batch_size, **stop):
    """In float64 with dropout off: every step's loss, the history, and the weights' digest."""
    for setting in (keras.config.set_floatx, keras.config.set_dtype_policy):
        setting("float64")
    digits = sources.load("bundled").first(examples, 200)
    model, history, steps = train(chosen, digits, batch_size=batch_size, **stop)
    return {
        "losses": [loss for loss, _ in steps],
        "history": history,
        "weights": artifacts.weights_sha256(model),
    }


def gradients(chosen, *, examples, batch_size, file):
    """In float32 with dropout off, from the same state: the gradients of every step, in a file."""
    digits = sources.load("bundled").first(examples, 20)
    _, _, steps = train(chosen, digits, batch_size=batch_size, optimizer=Record)
    np.savez(file, *[gradient for _, kept in steps for gradient in kept])


def placed(chosen, *, examples, batch_size, on_devices):
    """Two epochs of the command's own training, with the images on the host or on the devices."""
    strategy.has_accelerator = lambda: on_devices
    settings = config.TrainConfig(epochs=2, batch_size=batch_size, threads=2, fast="off")
    model, history = digits_workload.fit(
        settings, sources.load("bundled").first(examples, 100), strategy=chosen
    )
    history.pop("seconds")
    return {"history": history, "weights": artifacts.weights_sha256(model)}


def compiled(chosen, *, examples, batch_size, jit_compile):
    """In float64: every step's loss, and the evaluation's."""
    for setting in (keras.config.set_floatx, keras.config.set_dtype_policy):
        setting("float64")
    digits = sources.load("bundled").first(examples, 16)
    _, history, steps = train(
        chosen, digits, batch_size=batch_size, kind="off", jit_compile=jit_compile
    )
    return {"losses": [loss for loss, _ in steps], "val_loss": history["val_loss"]}


def masks(chosen):
    """What dropout leaves of ones in each replica, twice; and the state of its seed then."""
    with chosen.scope():
        network = keras.Sequential(
            [keras.Input((50,)), keras.Sequential([keras.layers.Dropout(0.5, seed=1)])]
        )
    separate_seeds(network)
    separate_seeds(network)  # which changes nothing
    ones = tf.ones((1, 50))
    draw = tf.function(lambda: chosen.run(lambda: network(ones, training=True)), autograph=False)
    drawn = [chosen.experimental_local_results(draw()) for _ in range(2)]
    return {
        "drawn": [[mask.numpy().tolist() for mask in masks] for masks in drawn],
        "state": [variable.numpy().tolist() for variable in network.variables],
    }


def saved(chosen, *, examples, batch_size, folder):
    """Trains with dropout and saves the model; returns the weights' digest."""
    digits = sources.load("bundled").first(examples, 100)
    model, history, _ = train(chosen, digits, batch_size=batch_size, dropout=True)
    artifacts.save(Path(folder), model, history, {})
    return artifacts.weights_sha256(model)


OPTIMIZERS = {
    "clipnorm": lambda: keras.optimizers.SGD(0.5, clipnorm=0.01),
    "global_clipnorm": lambda: keras.optimizers.SGD(0.5, global_clipnorm=0.01),
    "clipvalue": lambda: keras.optimizers.SGD(0.5, clipvalue=0.001),
    "weight_decay": lambda: keras.optimizers.AdamW(0.1, weight_decay=0.1),
    "accumulation": lambda: keras.optimizers.Adam(0.1, gradient_accumulation_steps=2),
    "average": lambda: keras.optimizers.Adadelta(1.0, use_ema=True, ema_overwrite_frequency=2),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1, momentum=0.9), dynamic_growth_steps=2
    ),
    "scaled, not finite": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
}


def optimized(chosen, *, jit_compile=False):
    """In float64: the variables of a small network and of each optimizer after six steps."""
    keras.config.set_dtype_policy("float64")
    noise = np.random.default_rng(0)
    x = noise.normal(0, 1, (24, 3))
    y = noise.normal(0, 1, (24, 1))
    results = {}
    for name, optimizer in OPTIMIZERS.items():
        layers = keras.layers
        with chosen.scope():
            network = keras.Sequential(
                [
                    keras.Input((3,)),
                    layers.Dense(2, "tanh", kernel_initializer=_normal(1)),
                    layers.Dense(1, kernel_initializer=_normal(2), kernel_constraint="max_norm"),
                ]
            )
            network.compile(optimizer=optimizer(), loss="mean_squared_error")
            network.optimizer.build(network.trainable_variables)
        if name == "scaled, not finite":
            # The square root's derivative, at the last example of the first batch alone: another
            # replica than the first meets it.
            x[3], y[3] = 0, 0
        batches = tf.data.Dataset.from_tensor_slices((x, y, np.ones(24, "float32")))
        batches = batches.batch(4, drop_remainder=True)
        loop.fit(
            network,
            lambda epoch, batches=batches: batches,
            batches,
            strategy=chosen,
            loss=_root_error if name == "scaled, not finite" else _squared_error,
            metrics={},
            epochs=1,
            jit_compile=jit_compile,
        )
        variables = [*network.trainable_variables, *network.optimizer.variables]
        results[name] = [
            [np.ravel(copy).tolist() for copy in chosen.experimental_local_results(variable.value)]
            for variable in variables
        ]
    return results


def fitted(chosen, *, names=None, batch_size=16, examples=keras_models.EXAMPLES):
    """In float64: what ``trainer.fit`` makes of models of many kinds, in two epochs."""
    several = chosen.num_replicas_in_sync > 1
    how = config.TrainConfig(strategy="mirrored" if several else "one")
    return fit_models.fit_models(names, batch_size, how, examples)


def _normal(seed):
    return keras.initializers.RandomNormal(seed=seed)


def _squared_error(y, output):
    return tf.reduce_mean((y - output) ** 2, axis=-1)


def _root_error(y, output):
    return tf.reduce_mean(tf.sqrt(tf.abs(y - output)), axis=-1)


def exchanged(chosen):
    """What ``Workers`` passes on, and what replicas reduce: dense, sparse, of several types."""
    workers = Workers(chosen)
    checked = CHOICE.ring.summed if CHOICE.ring else 0  # by ring.install

    @tf.function
    def reduced():
        def of_replica():
            number = float(workers.index)
            replica = tf.distribute.get_replica_context()
            kinds = tf.distribute.ReduceOp
            rows = tf.IndexedSlices(
                tf.fill((1, 2), number), tf.constant([workers.index]), tf.constant([2, 2])
            )
            return (
                replica.all_reduce(kinds.SUM, [tf.fill((2,), number), tf.constant(number)]),
                replica.all_reduce(kinds.SUM, tf.constant(1)),
                replica.all_reduce(kinds.MEAN, number),
                tf.convert_to_tensor(replica.all_reduce(kinds.SUM, rows)),
            )

        return chosen.run(of_replica)

    sums, ones, mean, sparse = reduced()
    own = np.arange(7, dtype=np.uint8) + workers.index
    return {
        "count": workers.count,
        "gathered": workers.gather(10 + workers.index),
        "first": workers.first(10 + workers.index),
        "shared": list(workers.broadcast(own.tobytes())),
        "nothing": list(workers.broadcast(b"" if workers.index == 0 else b"ignored")),
        "differing": [
            workers.differing(b"the same"),
            workers.differing(b"the same" if workers.index else b"the sane"),
            workers.differing(b"the sane" if workers.index == 1 else b"the same"),
        ],
        "summed": [total.numpy().tolist() for total in (*sums, ones)],
        "mean": float(mean),
        "sparse": sparse.numpy().tolist(),
        "eager": float(chosen.reduce("sum", tf.constant(1.0 + workers.index), axis=None)),
        # The ring sums dense values only; 4 + 1 of them are reduced above.
        "by_ring": CHOICE.ring is not None and CHOICE.ring.summed - checked >= 5,
        "notice": CHOICE.notice,
    }


def spoil_ring(way, index):
    """Changes what ``ring.install`` must find."""
    total, hook = ring.Ring.sum, ring._hook

    def renamed(*_):
        raise AttributeError("no attribute '_all_reduce'")

    if way == "sum":
        ring.Ring.sum = lambda self, arrays: [2 * array for array in total(self, arrays)]
    if way == "renamed" or (way == "on one worker" and index == 1):
        ring._hook = renamed
    if way == "not called":
        ring._hook = lambda ring, stock: stock
    if way == "called otherwise":
        ring._hook = lambda *arguments: lambda value: hook(*arguments)("sum", value, 0, None)


def main(name, devices, arguments, path):
    members = cluster.resolve(os.environ)
    runtime.set_threads(1)
    cpu = tf.config.list_physical_devices("CPU")[0]
    logical = [tf.config.LogicalDeviceConfiguration() for _ in range(int(devices))]
    tf.config.set_logical_device_configuration(cpu, logical)
    global CHOICE
    arguments = json.loads(arguments)
    spoil_ring(arguments.pop("spoil_ring", ""), members.index if members else 0)
    CHOICE = strategy.create(
        "mirrored" if len(logical) > 1 else "auto",
        cluster=members,
        gpus=0,
        collectives=arguments.pop("collectives", "tensorflow"),
        startup_timeout=60,
    )
    result = globals()[name](CHOICE.strategy, **arguments)
    Path(f"{path}.part").write_text(json.dumps(result))
    Path(f"{path}.part").rename(path)
    sys.stdin.read()  # The others fetch from this process what all have reduced together.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
