"""The fast step against the model itself: the same numbers, from the same state and masks."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, needs_fast_step

from trainer.data import pipeline
from trainer.errors import NotFiniteError
from trainer.models import cnn, fast_step
from trainer.runtime import keras, tf
from trainer.training import loop
from trainer.training.artifacts import weights_sha256

pytestmark = needs_fast_step

STRATEGY = tf.distribute.get_strategy()


def choose(kind="auto", optimizer="adadelta"):
    return fast_step.find(kind, accelerator=False).verify(optimizer=optimizer, threads=2)


CHOSEN = choose()


def build(seed=0, **options):
    return cnn.build(**{"optimizer": "adadelta", "learning_rate": 1.0, "seed": seed, **options})


def with_the_fast_masks(network):
    """Has the model's own first Dropout draw the masks that the fast step draws."""
    dropout = network.layers[3]

    def call(inputs, training=False):
        if not training:
            return inputs
        seed = tf.cast(dropout.seed_generator.next(), tf.int32)
        words = tf.random.stateless_uniform((*inputs.shape[:-1], 16), seed, None, None, tf.uint32)
        drawn = tf.reshape(tf.bitcast(words, tf.uint8), inputs.shape)
        return inputs * tf.cast(drawn >= 64, inputs.dtype) / 0.75

    dropout.call = call
    return network


def train(network, digits, *, kind, epochs=1, batch_size=32, **options):
    with choose(kind, type(network.optimizer).__name__.lower()).step(network) as forward:
        return loop.fit(
            network,
            lambda epoch: pipeline.train_batches(
                digits.x_train, digits.y_train, batch_size=batch_size, seed=0, epoch=epoch
            ),
            pipeline.test_batches(digits.x_test, digits.y_test, batch_size=batch_size),
            strategy=STRATEGY,
            loss=cnn.LOSS,
            metrics=cnn.METRICS,
            epochs=epochs,
            preprocess=cnn.preprocess,
            forward=forward,
            **options,
        )


def losses(network, digits, **options):
    """The loss of every step, and of the evaluation."""
    sums = [0.0]

    def after_call(position):
        if position.totals:
            sums.append(position.totals[1])

    history = train(network, digits, steps_per_execution=1, after_call=after_call, **options)
    return np.array([*np.unique(sums), history["val_loss"][-1]])


@pytest.fixture(scope="module")
def digits(mnist):
    return mnist.first(640, 100)


def gradients(network, forward, x, y):
    with tf.GradientTape() as tape:
        output = forward(x, training=True)
        loss = tf.reduce_mean(cnn.LOSS(y, output))
    return output, tape.gradient(loss, network.trainable_variables)


@pytest.mark.parametrize("steps", [0, 20])
@pytest.mark.parametrize("n", [1, 36, 128])
def test_gradients_are_the_models_own(mnist, digits, n, steps):
    network = with_the_fast_masks(build())
    if steps:
        train(network, digits.first(32 * steps, None), kind="off")
    x, y = cnn.preprocess(tf.constant(mnist.x_train[-n:]), tf.constant(mnist.y_train[-n:]))
    states = [(v, v.numpy()) for v in network.non_trainable_variables]
    expected = gradients(network, network, x, y)
    for variable, state in states:  # the same masks once more
        variable.assign(state)
    with CHOSEN.step(network) as forward:
        assert forward is not network
        received = gradients(network, forward, x, y)
    for a, b in zip((received[0], *received[1]), (expected[0], *expected[1]), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        ("adadelta", 1.0),
        pytest.param("adam", 1e-3, marks=pytest.mark.full),
        pytest.param("sgd", 0.1, marks=pytest.mark.full),
        pytest.param(
            "adam weight_decay=0.1 global_clipnorm=0.5 use_ema=True", 1e-3, marks=pytest.mark.full
        ),
    ],
)
def test_in_float64_the_loss_curve_is_the_models_own(digits, float64, optimizer, rate):
    options = {"optimizer": optimizer, "learning_rate": rate}
    with_model, with_fast = with_the_fast_masks(build(**options)), build(**options)
    expected = losses(with_model, digits, kind="off")
    received = losses(with_fast, digits, kind="auto")
    assert len(expected) == 22  # a beginning, 20 steps, an evaluation
    np.testing.assert_allclose(received, expected, rtol=1e-12)
    for a, b in zip(with_model.weights, with_fast.weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=0, atol=1e-12)


def test_evaluation_gives_what_the_model_gives(mnist):
    network = build()
    x, _ = cnn.preprocess(tf.constant(mnist.x_test[:300]), tf.constant(mnist.y_test[:300]))
    with CHOSEN.step(network) as forward:
        np.testing.assert_allclose(forward(x, training=False), network(x), rtol=1e-4, atol=1e-7)


def test_the_same_seed_gives_the_same_bits_in_calls_of_any_length(digits):
    digests = set()
    for steps in (1, 7, 7, None):
        network = build()
        train(network, digits, kind="auto", steps_per_execution=steps)
        digests.add(weights_sha256(network))
    assert len(digests) == 1


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_it_drops_at_the_layers_rate_and_each_time_others(rate):
    front = keras.Sequential([keras.Input(fast_step.IMAGE_SHAPE), *build().layers[:4]])
    front.layers[3].rate = rate
    front.compile()
    x = tf.ones((64, *fast_step.IMAGE_SHAPE))
    with CHOSEN.step(front) as forward:
        kept = forward(x, training=False).numpy()
        first, second = (forward(x, training=True).numpy() for _ in range(2))
    active = kept > 0
    for dropped in (first, second):
        assert not dropped[~active].any()
        left = active & (dropped > 0)
        np.testing.assert_allclose(dropped[left], kept[left] / (1 - rate), 1e-6)
        share = (dropped[active] == 0).mean()
        assert abs(share - rate) < 5 * np.sqrt(rate * (1 - rate) / active.sum())  # 5 deviations
    assert ((first > 0) != (second > 0)).any()
    assert ((first[0] > 0) != (first[1] > 0)).any()


@pytest.mark.parametrize("rate", [0, 0.3])
def test_a_rate_that_a_byte_cannot_draw_is_the_layers_own(digits, float64, rate):
    networks = build(), build()
    for network in networks:
        network.layers[3].rate = rate
    received, expected = (
        losses(network, digits.first(96, 10), kind=kind)
        for network, kind in zip(networks, ("auto", "off"), strict=True)
    )
    np.testing.assert_allclose(received, expected, rtol=1e-12)


def changed(index, fields):
    """The model's front with one layer's configuration changed."""
    layers = [
        type(layer).from_config({**layer.get_config(), **(fields if number == index else {})})
        for number, layer in enumerate(build().layers[:4])
    ]
    return keras.Sequential([keras.Input(fast_step.IMAGE_SHAPE), *layers])


@pytest.mark.parametrize(
    "layer",
    [
        (0, {"filters": 16}),
        (0, {"activation": "elu"}),
        (1, {"padding": "same"}),
        (1, {"kernel_regularizer": "l2"}),
        (1, {"use_bias": False}),
        (1, {"strides": 2}),
        (0, {"dtype": "mixed_bfloat16"}),
        (2, {"pool_size": 3}),
        (2, {"strides": 1}),
    ],
)
def test_another_model_takes_the_plain_path(layer):
    network = changed(*layer)
    with CHOSEN.step(network) as forward:
        assert forward is network


def test_a_functional_model_and_another_kind_of_layer_take_the_plain_path():
    stock = build()
    functional = keras.Model(stock.inputs, stock.outputs)
    other = keras.Sequential([keras.Input(fast_step.IMAGE_SHAPE), keras.layers.Flatten()])
    for network in (functional, other):
        with CHOSEN.step(network) as forward:
            assert forward is network


def test_what_is_not_finite_in_front_of_the_pooling_is_found(digits):
    network = build(optimizer="sgd", learning_rate=1e30)
    with pytest.raises(NotFiniteError, match="Expected a finite"):
        train(network, digits, kind="auto")


def arguments(n, dtype=np.float32):
    noise = np.random.default_rng(1)
    shapes = ((n, 28, 28, 1), (3, 3, 1, 32), (32,), (3, 3, 32, 64), (64,))
    values = [noise.normal(0, 0.1, shape).astype(dtype) for shape in shapes]
    return [*values, noise.integers(0, 256, (n, 12, 12, 64), np.uint8)]


def test_the_operation_gives_the_same_bits_on_any_number_of_threads():
    library = fast_step._library()
    *inputs, random = arguments(100)
    outcomes = set()
    for threads in (1, 2, 3, 300):
        out, code = library.winograd_pool(*inputs, random, drop=64, threads=threads)
        gradients = library.winograd_pool_grad(*inputs, code, out, drop=64, threads=threads)
        outcomes.add(b"".join(value.numpy().tobytes() for value in (out, code, *gradients)))
    assert len(outcomes) == 1


@pytest.mark.parametrize("number", range(6))
def test_the_operation_refuses_other_shapes(number):
    inputs = arguments(3)
    inputs[number] = inputs[number][..., :-1]
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"input {number} has another shape"):
        fast_step._library().winograd_pool(*inputs, drop=64, threads=1)


def test_the_gradient_refuses_other_numbers_of_images():
    *inputs, random = arguments(3)
    out, code = fast_step._library().winograd_pool(*inputs, random, drop=64, threads=1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="input 6 has another shape"):
        fast_step._library().winograd_pool_grad(*inputs, code, out[:2], drop=64, threads=1)


def test_no_images_are_none():
    *inputs, random = arguments(0)
    out, code = fast_step._library().winograd_pool(*inputs, random, drop=64, threads=2)
    assert out.shape == (0, 12, 12, 64)
    gradients = fast_step._library().winograd_pool_grad(*inputs, code, out, drop=64, threads=2)
    assert not any(np.any(gradient) for gradient in gradients)


PROGRAM = """
import sys
from trainer.models import fast_step
from trainer.runtime import tf
library = tf.load_op_library(sys.argv[1])
print(fast_step._instructions(sys.argv[1]), fast_step._computes_the_same(library))
"""


@pytest.mark.parametrize(("level", "name"), [(0, "baseline"), (1, "avx2")])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_lesser_processors_compute_the_same(tmp_path, level, name, compiler):
    flags = ("-O3", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-DLEVEL={level}")
    library = tmp_path / "library.so"
    try:
        subprocess.run(
            [compiler, *flags, ROOT / "trainer" / "models" / "winograd.c", "-o", library],
            check=True,
        )
    except FileNotFoundError:
        pytest.skip(f"{compiler} is not here")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, library],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    if name == "avx2" and "avx2" not in _flags():
        name = "baseline"
    assert ran.stdout.split() == [name, "True"]


def _flags():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line for line in lines if line.startswith("flags")).split()
