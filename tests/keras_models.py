"""Compiled models of many kinds, each with data, for comparisons with ``model.fit``.

    model, data, options = MODELS["two outputs"]()

Weights, dropout masks and data are the same in every call and process.
"""

import numpy as np

from trainer.runtime import keras

EXAMPLES = 42  # The last batch of 16 has 10, that of 15 has 12: two and three devices divide them.
CLASSES = 3

layers = keras.layers
optimizers = keras.optimizers


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 1, shape)


def labels(seed=1):
    return np.random.default_rng(seed).integers(0, CLASSES, EXAMPLES)


def one_hot():
    return np.eye(CLASSES)[labels()]


def _compiled(model, optimizer=None, loss="sparse_categorical_crossentropy", **options):
    model.compile(optimizer or optimizers.SGD(0.1, momentum=0.9), loss=loss, **options)
    return model


def _dense(*hidden, units=CLASSES, activation="softmax", shape=(4,), dtype=None):
    head = layers.Dense(units, activation=activation, dtype=dtype)
    return keras.Sequential([keras.Input(shape), *hidden, head])


def _classifier(*hidden, optimizer=None, shape=(4,), **options):
    model = _compiled(_dense(*hidden, shape=shape), optimizer, metrics=["accuracy"])
    return model, (noise(EXAMPLES, *shape), labels()), options


def regularized():
    return _classifier(
        layers.Dense(5, activation="tanh", kernel_regularizer="l2", bias_regularizer="l1")
    )


def batch_normalization():
    return _classifier(layers.Dense(5), layers.BatchNormalization(momentum=0.7))


def synchronized_batch_normalization():
    return _classifier(layers.Dense(5), layers.BatchNormalization(momentum=0.7, synchronized=True))


def layer_normalization():
    return _classifier(layers.Dense(5), layers.LayerNormalization(), layers.GroupNormalization(1))


def lstm():
    return _classifier(layers.LSTM(4), shape=(6, 2))


def convolution_and_dropout():
    return _classifier(
        layers.Conv2D(3, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Dropout(0.3, seed=1),
        layers.Flatten(),
        optimizer=optimizers.Adadelta(1.0),
        shape=(8, 8, 1),
    )


def embedding():
    model = _compiled(
        keras.Sequential(
            [keras.Input((5,)), layers.Embedding(9, 4), layers.GRU(3), layers.Dense(1)]
        ),
        optimizers.SGD(0.1),  # Others update only rows of the batch, on one device.
        "mse",
    )
    x = np.random.default_rng(0).integers(0, 9, (EXAMPLES, 5))
    return model, (x, noise(EXAMPLES, 1)), {}


def two_inputs():
    a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
    joined = layers.Concatenate()([layers.Dense(3, activation="relu")(a), b])
    model = _compiled(keras.Model([a, b], layers.Dense(1)(joined)), loss="huber")
    return model, ([noise(EXAMPLES, 4), noise(EXAMPLES, 2, seed=2)], noise(EXAMPLES, 1)), {}


def two_outputs():
    x = keras.Input((4,), name="x")
    hidden = layers.Dense(5, activation="relu")(x)
    outputs = {
        "kind": layers.Dense(CLASSES, activation="softmax", name="kind")(hidden),
        "size": layers.Dense(1, name="size")(hidden),
    }
    model = _compiled(
        keras.Model(x, outputs),
        loss={"kind": "sparse_categorical_crossentropy", "size": "mae"},
        loss_weights={"kind": 1.0, "size": 0.3},
        metrics={"kind": ["accuracy"], "size": ["mse"]},
    )
    return model, (noise(EXAMPLES, 4), {"kind": labels(), "size": noise(EXAMPLES, 1)}), {}


def stateful_metrics():
    model = _compiled(
        _dense(layers.Dense(5), units=1, activation="sigmoid"),
        loss="binary_crossentropy",
        metrics=[
            keras.metrics.AUC(name="auc"),
            keras.metrics.Precision(name="precision"),
            keras.metrics.Recall(name="recall"),
        ],
    )
    return model, (noise(EXAMPLES, 4), (labels() > 0).astype("float64")), {}


def top_k():
    model = _compiled(
        _dense(layers.Dense(5), dtype="float32"),  # TensorFlow's InTopK takes nothing else.
        loss="categorical_crossentropy",
        metrics=[
            keras.metrics.TopKCategoricalAccuracy(2, name="top"),
            keras.metrics.F1Score(average=None, name="f1"),
            keras.metrics.OneHotMeanIoU(CLASSES, name="iou"),
        ],
    )
    return model, (noise(EXAMPLES, 4), one_hot()), {}


def class_weights():
    return _classifier(class_weight={0: 3.0, 2: 0.25})


def sample_weights():
    model = _compiled(_dense(), weighted_metrics=["accuracy"], metrics=["accuracy"])
    weight = np.random.default_rng(3).uniform(0, 2, EXAMPLES)
    return model, (noise(EXAMPLES, 4), labels(), weight), {}


def clipping():
    return _classifier(layers.Dense(5), optimizer=optimizers.SGD(0.5, global_clipnorm=0.05))


def moving_average():
    return _classifier(optimizer=optimizers.Adam(0.05, use_ema=True, ema_momentum=0.6))


def accumulation():
    return _classifier(optimizer=optimizers.AdamW(0.05, gradient_accumulation_steps=2))


def loss_scaling():
    scaled = optimizers.LossScaleOptimizer(optimizers.RMSprop(0.01), dynamic_growth_steps=2)
    return _classifier(layers.Dense(5), optimizer=scaled)


def schedule():
    rate = optimizers.schedules.CosineDecay(0.5, 6)
    return _classifier(optimizer=optimizers.SGD(rate))


def frozen_layer():
    frozen = layers.Dense(5, activation="relu", trainable=False)
    return _classifier(frozen, layers.Dense(4))


@keras.saving.register_keras_serializable("tests")
class Penalized(keras.Model):
    """Subclassed: two branches, a loss of its own, and a metric of its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.wide = layers.Dense(5, activation="tanh")
        self.deep = [layers.Dense(4, activation="relu"), layers.Dense(5)]
        self.head = layers.Dense(CLASSES, activation="softmax")
        self.norm = keras.metrics.Mean(name="norm")

    def call(self, x, training=False):
        deep = x
        for layer in self.deep:
            deep = layer(deep)
        hidden = self.wide(x) + deep
        self.add_loss(0.01 * keras.ops.mean(keras.ops.square(hidden)))
        return self.head(hidden)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        self.norm.update_state(keras.ops.norm(y_pred, axis=-1))
        return super().compute_metrics(x, y, y_pred, sample_weight)


def subclassed():
    return _compiled(Penalized(), metrics=["accuracy"]), (noise(EXAMPLES, 4), labels()), {}


KINDS = (
    regularized, batch_normalization, synchronized_batch_normalization, layer_normalization, lstm,
    convolution_and_dropout, embedding, two_inputs, two_outputs, stateful_metrics, top_k,
    class_weights, sample_weights, clipping, moving_average, accumulation, loss_scaling, schedule,
    frozen_layer, subclassed,
)  # fmt: skip


def make(kind):
    """Returns a model with the weights of every call, its data, and options of ``fit``."""
    keras.utils.set_random_seed(7)
    return kind()


MODELS = {kind.__name__.replace("_", " "): kind for kind in KINDS}

# Whose replicas draw dropout masks of their own, and normalize by the statistics of their slice, as
# Keras' do under a strategy.
DIFFERENT = ("convolution and dropout", "batch normalization")
FEW = ("regularized", "synchronized batch normalization", "two outputs", "accumulation")


def assert_alike(several, one):
    """Compares what ``fit_models`` returns."""
    assert several.keys() == one.keys()
    for name, expected in one.items():
        if name in DIFFERENT:
            continue
        for part, values in expected.items():
            assert several[name][part].keys() == values.keys()
            for key, value in values.items():
                np.testing.assert_allclose(
                    several[name][part][key], value, rtol=1e-6, atol=1e-9, err_msg=f"{name} {key}"
                )
