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
    assert record.params["epochs"] == 2
    assert record.params["steps"] == 8
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
