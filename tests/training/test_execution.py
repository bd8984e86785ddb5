"""Many steps in one program of XLA, on the CPU's compiler, with a network that it compiles fast."""

import numpy as np
import pytest

from trainer.data import pipeline
from trainer.errors import StoppedError
from trainer.models import cnn
from trainer.runtime import keras, tf
from trainer.training import execution, loop
from trainer.training.execution import Execution
from trainer.training.position import Position

STRATEGY = tf.distribute.get_strategy()
EXAMPLES, BATCH_SIZE = 100, 16  # seven steps, the last one not full


def network(dropout=0.25):
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input(cnn.INPUT_SHAPE),
            layers.AveragePooling2D(4),
            layers.Flatten(),
            layers.Dropout(dropout, seed=1),
            layers.Dense(10, activation="softmax", kernel_initializer=_glorot()),
        ]
    )
    model.compile(optimizer=keras.optimizers.Adadelta(1.0), loss="categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    return model


def _glorot():
    return keras.initializers.GlorotUniform(seed=2)


@pytest.fixture
def few(mnist):
    return mnist.first(EXAMPLES, 40)


def train(digits, model=None, **options):
    """Returns the model, its history, and the positions after each call."""
    model = model or network()
    positions = []

    def after_call(position):
        positions.append((position.epoch, position.step, *position.totals))

    options = {"epochs": 2, "jit_compile": True, "after_call": after_call, **options}
    history = loop.fit(
        model,
        lambda epoch: pipeline.train_batches(
            digits.x_train, digits.y_train, batch_size=BATCH_SIZE, seed=0, epoch=epoch
        ),
        pipeline.test_batches(digits.x_test, digits.y_test, batch_size=BATCH_SIZE),
        strategy=STRATEGY,
        loss=cnn.LOSS,
        metrics=cnn.METRICS,
        preprocess=cnn.preprocess,
        **options,
    )
    history.pop("seconds")
    return model, history, positions


def assert_same_bits(model, other):
    for a, b in zip(model.variables, other.variables, strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()


def test_a_program_trains_as_the_steps_one_by_one(few, float64):
    # Without dropout: XLA's random numbers are not those of TensorFlow's own kernels.
    plain, history, _ = train(few, network(dropout=0), jit_compile=False)
    program, compiled, _ = train(few, network(dropout=0))
    for name, values in history.items():
        assert compiled[name] == pytest.approx(values, rel=1e-12), name
    for a, b in zip(program.variables, plain.variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-9, atol=1e-12)
    for a, b in zip(program.optimizer.variables, plain.optimizer.variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.full
@pytest.mark.parametrize(("steps", "ends"), [(2, [2, 3, 5, 6, 7]), (100, [3, 6, 7])])
def test_neither_calls_nor_chunks_change_a_bit(few, monkeypatch, steps, ends):
    whole, history, _ = train(few)
    # Three batches of images, so that the seven steps of an epoch are in three chunks.
    monkeypatch.setattr(execution, "CHUNK_BYTES", 3 * BATCH_SIZE * (28 * 28 + 1 + 4))
    other, same, positions = train(few, steps_per_execution=steps)
    assert same == history
    assert_same_bits(other, whole)
    assert sorted({step for epoch, step, *_ in positions if epoch == 0}) == ends


@pytest.mark.full
def test_a_run_that_resumes_in_the_middle_ends_with_the_same_bits(few):
    whole, history, _ = train(few)
    model, position = network(), Position()

    def stop(now):
        nonlocal position
        position = now
        if (now.epoch, now.step) == (1, 4):
            raise StoppedError("here")

    with pytest.raises(StoppedError):
        train(few, model, steps_per_execution=2, after_call=stop)
    _, resumed, _ = train(few, model, position=position)
    assert resumed == history
    assert_same_bits(model, whole)


def test_a_program_is_compiled_once_whatever_is_left_of_an_epoch():
    traced = 0

    def step(x, y, sample_weight, examples):
        nonlocal traced
        traced += 1
        return tf.stack([tf.reduce_sum(x), examples])

    kinds = {"values": 2, "dtype": "float32", "examples": lambda x, y, sample_weight: 16.0}
    run = Execution(step, **kinds, strategy=STRATEGY, jit_compile=True)
    x = np.arange(7 * 16, dtype=np.float32).reshape(7, 16)
    batches = tf.data.Dataset.from_tensor_slices((x, x, np.ones_like(x)))
    for first in (0, 5):
        for steps in (1, 4, 100):
            calls = list(run.calls(batches.skip(first), steps_per_execution=steps, first=first))
            expected = np.stack([x.sum(axis=1), np.full(7, 16)], axis=1)[first:]
            np.testing.assert_array_equal(np.concatenate(calls), expected)
    assert traced == 1


@pytest.mark.full
def test_images_on_the_device_are_gathered_in_the_program(few):
    plain, history, _ = train(few)
    data = pipeline.put_on_devices(few, strategy=STRATEGY, preprocess=cnn.preprocess, augment=None)
    model = network()
    same = loop.fit(
        model,
        lambda epoch: pipeline.train_batches(
            *data.train, batch_size=BATCH_SIZE, seed=0, epoch=epoch
        ),
        pipeline.test_batches(*data.test, batch_size=BATCH_SIZE),
        strategy=STRATEGY,
        loss=cnn.LOSS,
        metrics=cnn.METRICS,
        preprocess=data.preprocess,
        epochs=2,
        jit_compile=True,
    )
    same.pop("seconds")
    assert same == history
    assert_same_bits(model, plain)


def test_other_strategies_have_no_program_of_several_steps():
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with pytest.raises(ValueError, match=r"Received: OneDeviceStrategy\. Use jit_compile=False"):
        Execution(
            lambda *_: None,
            values=1,
            dtype="float32",
            examples=lambda *_: None,
            strategy=strategy,
            jit_compile=True,
        )
