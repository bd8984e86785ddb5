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

import numpy as np
from sessions import Session

from trainer import config, runtime
from trainer.data import pipeline, sources
from trainer.distributed import cluster, ring, strategy
from trainer.distributed.collectives import Workers
from trainer.distributed.replica_seeds import separate_seeds
from trainer.errors import StoppedError
from trainer.models import cnn, fast_step
from trainer.runtime import keras, tf
from trainer.training import artifacts, loop, run
from trainer.training.checkpoint import Position


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
    step = fast_step.choose(
        kind,
        accelerator=False,
        optimizer="adadelta",
        threads=2,
        replicas=Workers(chosen).local_replicas,
    )
    assert (step.name == "keras") == (kind == "off")
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
    model, history = run.fit(
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


def exchanged(chosen):
    """What ``Workers`` passes on, and what replicas reduce: dense, sparse, of several types."""
    workers = Workers(chosen)
    sums_of, calls = ring.Ring.sum, []
    ring.Ring.sum = lambda self, arrays: calls.append(1) or sums_of(self, arrays)

    @tf.function
    def reduced():
        def of_replica():
            number = float(workers.index)
            replica = tf.distribute.get_replica_context()
            kinds = tf.distribute.ReduceOp
            rows = tf.IndexedSlices(
                tf.fill((1, 2), number), tf.constant([workers.index]), tf.constant([2, 2])
            )
            some = [tf.fill((2,), number), tf.constant(1), tf.constant(number)]
            return (
                replica.all_reduce(kinds.SUM, some),
                replica.all_reduce(kinds.MEAN, number),
                tf.convert_to_tensor(replica.all_reduce(kinds.SUM, rows)),
            )

        return chosen.run(of_replica)

    sums, mean, sparse = reduced()
    own = np.arange(7, dtype=np.uint8) + workers.index
    return {
        "count": workers.count,
        "gathered": workers.gather(10 + workers.index),
        "first": workers.first(10 + workers.index),
        "shared": list(workers.broadcast(own.tobytes())),
        "equal": [workers.all_equal(b"same"), workers.all_equal(own[:4].tobytes())],
        "summed": [total.numpy().tolist() for total in sums],
        "mean": float(mean),
        "sparse": sparse.numpy().tolist(),
        "eager": float(chosen.reduce("sum", tf.constant(1.0 + workers.index), axis=None)),
        "by_ring": len(calls) > 0,
    }


def main(name, devices, arguments, path):
    members = cluster.resolve(os.environ)
    runtime.set_threads(1)
    cpu = tf.config.list_physical_devices("CPU")[0]
    logical = [tf.config.LogicalDeviceConfiguration() for _ in range(int(devices))]
    tf.config.set_logical_device_configuration(cpu, logical)
    kind = "mirrored" if len(logical) > 1 else "auto"
    chosen = strategy.create(kind, cluster=members, gpus=None, startup_timeout=60).strategy
    result = globals()[name](chosen, **json.loads(arguments))
    Path(f"{path}.part").write_text(json.dumps(result))
    Path(f"{path}.part").rename(path)
    sys.stdin.read()  # The others fetch from this process what all have reduced together.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
