"""The oracle is Keras' own fit: on one worker it works, and must come to the same."""

import numpy as np
import pytest

from trainer.data import pipeline
from trainer.data.order import epoch_order
from trainer.errors import NotFiniteError
from trainer.models import cnn as model
from trainer.runtime import keras, tf
from trainer.training import loop
from trainer.training.artifacts import weights_sha256

STRATEGY = tf.distribute.get_strategy()


def fit(network, x, y, *, batch_size=32, epochs=1, test=None, **options):
    options = {
        "strategy": STRATEGY,
        "loss": model.LOSS,
        "metrics": model.METRICS,
        "preprocess": model.preprocess,
        **options,
    }
    return loop.fit(
        network,
        lambda epoch: pipeline.train_batches(x, y, batch_size=batch_size, seed=0, epoch=epoch),
        pipeline.test_batches(*(test or (x, y)), batch_size=batch_size),
        epochs=epochs,
        **options,
    )


def cnn(seed=0, **options):
    return model.build(**{"optimizer": "adadelta", "learning_rate": 1.0, "seed": seed, **options})


@pytest.fixture
def few(mnist):
    return mnist.first(232, 100)


def inputs(digits):
    """What the model takes, as arrays: the loop is compared without ``preprocess``, in which a
    compiled division by 255 may be off by a last bit.
    """
    pairs = ((digits.x_train, digits.y_train), (digits.x_test, digits.y_test))
    return [[a.numpy() for a in model.preprocess(x, y)] for x, y in pairs]


def without_dropout(network):
    for layer in network.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0
    return network


@pytest.mark.parametrize(
    ("examples", "change"),
    [
        (224, lambda network: network),  # the same seeds draw the same dropout masks
        (232, without_dropout),  # 7.25 batches: Keras' last is short, ours filled up
    ],
)
def test_an_epoch_comes_to_what_keras_fit_comes_to(few, float64, examples, change):
    (x, y), test = inputs(few.first(examples, None))
    ours, theirs = change(cnn()), change(cnn())
    history = fit(ours, x, y, test=test, preprocess=None)
    order = epoch_order(examples, 0, 0)
    expected = theirs.fit(
        x[order], y[order], batch_size=32, shuffle=False, validation_data=test, verbose=0
    ).history
    for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
        assert history[name] == pytest.approx(expected[name], rel=1e-6), name
    for a, b in zip(ours.trainable_weights, theirs.trainable_weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=0, atol=1e-12)


def test_the_number_of_steps_in_a_call_changes_no_bit(few):
    results = set()
    for steps in (1, 3, 8, None):
        network = cnn()
        history = fit(network, few.x_train, few.y_train, steps_per_execution=steps)
        history.pop("seconds")
        results.add((weights_sha256(network), str(history)))
    assert len(results) == 1


def test_evaluate_is_keras_evaluate(few):
    network = cnn()
    network.optimizer.learning_rate = 0.1
    test = pipeline.test_batches(few.x_test, few.y_test, batch_size=32)
    x, y = inputs(few)[1]
    ours = loop.evaluate(
        network,
        test,
        strategy=STRATEGY,
        loss=model.LOSS,
        metrics=model.METRICS,
        preprocess=model.preprocess,
    )
    theirs = network.evaluate(x, y, batch_size=32, verbose=0, return_dict=True)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_another_model_and_other_data_need_no_change():
    # A regression with a regulariser and a normalisation whose moving mean is no trainable weight.
    noise = np.random.default_rng(0)
    x = noise.normal(3, 1, (64, 4)).astype(np.float32)
    y = x.sum(axis=1, keepdims=True)

    def network():
        built = keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.BatchNormalization(momentum=0.5),
                keras.layers.Dense(
                    1,
                    kernel_initializer=keras.initializers.GlorotUniform(seed=1),
                    kernel_regularizer=keras.regularizers.L2(0.1),
                ),
            ]
        )
        built.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
        built.optimizer.build(built.trainable_variables)
        return built

    ours, theirs = network(), network()
    fit(
        ours,
        x,
        y,
        loss=keras.losses.mean_squared_error,
        metrics={},
        preprocess=None,
        batch_size=16,
    )
    order = epoch_order(64, 0, 0)
    theirs.fit(x[order], y[order], batch_size=16, shuffle=False, verbose=0)
    for a, b in zip(ours.weights, theirs.weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-5, atol=1e-6)


# What Keras' fit does with a model, and this loop must do too, or refuse.


def regression(optimizer, **options):
    """A small model whose gradients are below 6e-8, the least number of float16."""
    built = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, kernel_initializer=keras.initializers.GlorotUniform(seed=1)),
            keras.layers.Dense(1, kernel_initializer=keras.initializers.GlorotUniform(seed=2)),
        ]
    )
    built.compile(optimizer=optimizer, loss="mse", **options)
    built.optimizer.build(built.trainable_variables)
    return built


def regression_data(size=1.0):
    x = np.random.default_rng(0).normal(0, size, (64, 4)).astype(np.float32)
    return x, np.zeros((64, 1), np.float32)


def assert_fits_as_keras(optimizer, x, y, *, rtol=1e-5):
    """Both train an epoch; returns how far the weights have moved."""
    ours, theirs = regression(optimizer()), regression(optimizer())
    first = ours.get_weights()
    fit(ours, x, y, loss=keras.losses.mean_squared_error, metrics={}, preprocess=None)
    order = epoch_order(len(x), 0, 0)
    theirs.fit(x[order], y[order], batch_size=32, shuffle=False, verbose=0)
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol)
    return max(np.abs(a - b).max() for a, b in zip(ours.get_weights(), first, strict=True))


@pytest.fixture
def mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


def test_float16_is_trained_with_the_loss_scaled_as_keras_scales_it(mixed_float16):
    # Without it the gradients, of 1e-8, are 0 in float16, and the weights stay as they are.
    x, y = regression_data(1e-4)
    moved = assert_fits_as_keras(lambda: keras.optimizers.SGD(1e6), x, y, rtol=1e-2)
    assert moved > 1e-3


def test_a_constant_loss_scale_is_honoured():
    def optimizer():
        return keras.optimizers.SGD(0.1, loss_scale_factor=1024.0)

    assert assert_fits_as_keras(optimizer, *regression_data()) > 1e-3


def test_float16_without_loss_scaling_is_refused(mixed_float16):
    network = regression(keras.optimizers.SGD(0.1), auto_scale_loss=False)
    with pytest.raises(ValueError, match=r"Received: SGD and dense\w* in float16\. Use keras"):
        fit(network, *regression_data(), preprocess=None)


def test_a_model_that_is_not_compiled_is_refused():
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="Received: one without an optimizer"):
        fit(network, *regression_data(), preprocess=None)


def test_an_average_of_the_weights_that_the_optimizer_keeps_replaces_them_at_the_end():
    def optimizer():
        return keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)

    assert_fits_as_keras(optimizer, *regression_data())


def test_a_training_step_of_the_models_own_is_refused():
    class Own(keras.Sequential):
        def train_step(self, data):
            return {}

    with pytest.raises(ValueError, match=r"Keras' own train_step\. Received: Own with"):
        fit(Own(), *regression_data(), preprocess=None)


@pytest.mark.parametrize(
    "reduction",
    [
        "sum_over_batch_size",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in ("mean", "mean_with_sample_weight")
        ),
    ],
)
def test_a_loss_object_is_the_function_that_it_stands_for(few, reduction):
    histories = []
    for loss in (
        keras.losses.CategoricalCrossentropy(label_smoothing=0.1, reduction=reduction),
        model.loss(0.1),
    ):
        network = cnn()
        # The last batch is filled up: a mean over it would count what has weight 0.
        test = (few.x_test, few.y_test)
        histories.append(
            fit(network, few.x_train, few.y_train, test=test, loss=loss, metrics={"same": loss})
        )
        histories[-1].pop("seconds")
    assert histories[0] == histories[1]
    assert histories[0]["same"] == histories[0]["loss"]


@pytest.mark.parametrize(
    ("functions", "received"),
    [
        (
            {"metrics": {"auc": keras.metrics.AUC()}},
            "for auc. Received: AUC, a metric with a state",
        ),
        ({"loss": keras.losses.Huber(reduction="sum")}, "for loss. Received: Huber with the reduc"),
        ({"loss": "mse"}, "for loss. Received: 'mse'. Use the function"),
        ({"metrics": {"loss": model.LOSS}}, "Expected metrics of other names"),
    ],
)
def test_what_is_no_mean_over_examples_is_refused(few, functions, received):
    with pytest.raises(TypeError, match=received):
        fit(cnn(), few.x_train, few.y_train, **functions)


@pytest.mark.parametrize(
    "shaped",
    [
        tf.reduce_mean,
        lambda values: values[:, None],  # times the weights it would be of shape (32, 32)
    ],
)
def test_a_function_of_another_shape_is_refused(few, shaped):
    with pytest.raises(ValueError, match=r"one value per example for loss, of shape \(32,\)"):
        fit(cnn(), few.x_train, few.y_train, loss=lambda y, output: shaped(model.LOSS(y, output)))


@pytest.mark.parametrize("dtype", ["float16", pytest.param("float64", marks=pytest.mark.full)])
def test_keras_global_dtype_decides_nothing_about_a_model_that_is_built(few, dtype):
    histories = []
    for floatx in ("float32", dtype):
        network = cnn()
        keras.config.set_floatx(floatx)
        try:
            histories.append(fit(network, few.x_train, few.y_train))
        finally:
            keras.config.set_floatx("float32")
        histories[-1].pop("seconds")
    assert histories[0] == histories[1]


def test_a_loss_that_is_not_finite_names_epoch_and_step(few):
    network = cnn()
    network.weights[-1].assign(np.full(10, np.nan, np.float32))
    with pytest.raises(NotFiniteError, match=r"Received: nan in epoch 1, step 1\."):
        fit(network, few.x_train, few.y_train)


def test_weights_that_are_not_finite_are_named_and_kept_from_whoever_saves_them(few):
    def loss(y, output):  # Finite, and its gradient is 0/0.
        return model.LOSS(y, output) + tf.sqrt(0.0 * output[:, 0])

    seen = []
    with pytest.raises(NotFiniteError, match=r"kernel with NaN or infinity in epoch 1, step 1\."):
        fit(cnn(), few.x_train, few.y_train, loss=loss, after_call=seen.append)
    assert not seen


def test_a_loss_that_becomes_infinite_is_found_in_its_step(few):
    with pytest.raises(NotFiniteError, match=r"in epoch 1, step [2-8]\. Use a smaller"):
        fit(cnn(optimizer="sgd", learning_rate=1e30), few.x_train, few.y_train)


class Record(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []
        self.began = []

    def on_train_begin(self, logs=None):
        self.first_params = dict(self.params)  # As ProgbarLogger reads them.

    def on_train_batch_begin(self, batch, logs=None):
        self.began.append(("train", batch))

    def on_test_batch_begin(self, batch, logs=None):
        self.began.append(("test", batch))

    def on_train_end(self, logs=None):
        assert set(logs) == {"loss", "accuracy", "val_loss", "val_accuracy"}

    def on_epoch_begin(self, epoch, logs=None):
        self.seen.append(("epoch", epoch))

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(("train", batch))
        assert set(logs) == {"loss", "accuracy"}

    def on_test_batch_end(self, batch, logs=None):
        self.seen.append(("test", batch))

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(("end", epoch))
        assert set(logs) == {"loss", "accuracy", "val_loss", "val_accuracy"}


def test_callbacks_are_called_as_keras_calls_them(few):
    record = Record()
    fit(
        cnn(),
        few.x_train,
        few.y_train,
        test=(few.x_test, few.y_test),
        epochs=2,
        steps_per_execution=3,
        callbacks=[record],
    )
    assert record.params == record.first_params == {"verbose": 0, "epochs": 2, "steps": 8}
    assert record.began == 2 * [("train", 0), ("train", 3), ("train", 6), ("test", 0), ("test", 3)]
    epoch = [("train", 2), ("train", 5), ("train", 7), ("test", 2), ("test", 3)]
    assert record.seen == [
        ("epoch", 0),
        *epoch,
        ("end", 0),
        ("epoch", 1),
        *epoch,
        ("end", 1),
    ]


def test_a_keras_callback_can_stop_the_run(few):
    # It wants the loss to rise: after the second epoch it has seen enough.
    stop = keras.callbacks.EarlyStopping(monitor="loss", mode="max", patience=0)
    history = fit(cnn(), few.x_train, few.y_train, epochs=3, callbacks=[stop])
    assert len(history["loss"]) == 2


@pytest.mark.parametrize(
    ("seconds", "calls"),
    [
        (0.001, [1, 2, 4, 8, 16, 27]),  # however fast, twice as many at most
        (2, [1] * 58),
    ],
)
def test_a_call_takes_about_a_second(few, seconds, calls):
    # Each look at the clock is later than the last by as much as a call is to take.
    ticks = iter(np.arange(1000) * seconds)
    record = Record()
    fit(
        cnn(),
        few.x_train,
        few.y_train,
        batch_size=4,
        callbacks=[record],
        clock=lambda: next(ticks),
    )
    last = [step for kind, step in record.seen if kind == "train"]
    assert np.diff([-1, *last]).tolist() == calls


def test_a_data_set_of_unknown_length_is_refused(few):
    with pytest.raises(ValueError, match="known cardinality"):
        loop.evaluate(
            cnn(),
            pipeline.test_batches(few.x_test, few.y_test, batch_size=32).filter(lambda *_: True),
            strategy=STRATEGY,
            loss=model.LOSS,
            metrics={},
        )
