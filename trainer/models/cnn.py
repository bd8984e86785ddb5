"""The CNN: two convolutions, two dense layers, 2,380,938 parameters.

    model = build(optimizer="adadelta", learning_rate=1.0, seed=0)

It is stock Keras throughout, so that the file it is saved in loads anywhere.
"""

import functools
from collections.abc import Callable

import numpy as np

from trainer.config import Precision, Schedule, TrainConfig
from trainer.errors import NotFiniteError
from trainer.runtime import keras, tf

INPUT_SHAPE = (28, 28, 1)
NUM_CLASSES = 10

WARM_UP = 0.3  # share of the steps in which the learning rate of one cycle rises
START = 0.1  # where it begins, of the highest

# What ``loop.fit`` sums over a batch: one value an example, from one-hot labels (n, 10) and
# probabilities (n, 10).
LOSS = keras.losses.categorical_crossentropy
METRICS = {"accuracy": keras.metrics.categorical_accuracy}


def of(config: TrainConfig, examples: int) -> keras.Sequential:
    """Builds the network that a configuration asks for, to be trained on so many examples."""
    return build(
        optimizer=config.optimizer,
        learning_rate=_rate(config, examples),
        seed=config.seed,
        pooling_dropout=config.pooling_dropout,
        dense_dropout=config.dense_dropout,
        label_smoothing=config.label_smoothing,
        precision=config.precision,
    )


def rates(config: TrainConfig, examples: int) -> Callable[[int], float]:
    """Returns a function that gives the learning rate at the end of an epoch, counted from 0."""
    rate, steps = _rate(config, examples), _steps(config, examples)
    return lambda epoch: float(rate((epoch + 1) * steps) if callable(rate) else rate)


def loss(label_smoothing: float = 0.0) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Returns ``LOSS`` with the label smoothing that ``build`` compiles a model with."""
    return functools.partial(keras.losses.categorical_crossentropy, label_smoothing=label_smoothing)


def learning_rate(
    highest: float, schedule: Schedule, steps: int
) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """Returns the learning rate of each of a run's steps.

    Args:
        highest: The rate of ``constant``; the peak of ``one-cycle``: Smith and Topin, 2017,
            https://arxiv.org/abs/1708.07120, with a cosine for the way down.
        schedule: Which.
        steps: Of the whole run.
    """
    if schedule == "constant":
        return highest
    rising = int(WARM_UP * steps)
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=START * highest if rising else highest,
        decay_steps=steps - rising,
        warmup_target=highest if rising else None,
        warmup_steps=rising,
    )


def _rate(
    config: TrainConfig, examples: int
) -> float | keras.optimizers.schedules.LearningRateSchedule:
    steps = config.epochs * _steps(config, examples)
    return learning_rate(config.learning_rate, config.schedule, steps)


def _steps(config: TrainConfig, examples: int) -> int:
    return -(-examples // config.batch_size)


def build(
    *,
    optimizer: str,
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule,
    seed: int,
    pooling_dropout: float = 0.25,
    dense_dropout: float = 0.5,
    label_smoothing: float = 0.0,
    precision: Precision = "tensorfloat32",
) -> keras.Sequential:
    """Builds the network, compiled as the file it is saved in should be.

    Args:
        optimizer: Keras' name of the optimizer.
        learning_rate: Its learning rate.
        seed: Determines the initial weights and the dropout masks.
        pooling_dropout: Share that is dropped behind the pooling.
        dense_dropout: Share that is dropped behind the dense layer.
        label_smoothing: Of the loss.
        precision: ``mixed_bfloat16``: all but the last layer compute in bfloat16; their weights are
            float32.

    Returns:
        A built and compiled model. Input: float32 (n, 28, 28, 1), 0 to 1. Output: float32 (n, 10),
        probabilities.
    """
    layers = keras.layers
    seeds = [int(word) for word in np.random.SeedSequence(seed).generate_state(6)]

    def weights(layer: int) -> keras.initializers.Initializer:
        return keras.initializers.GlorotUniform(seed=seeds[layer])

    # The layout of the axes is written out, lest ~/.keras/keras.json name another.
    axes = {"data_format": "channels_last"}
    mixed = {"dtype": precision} if precision == "mixed_bfloat16" else {}
    model = keras.Sequential(
        [
            keras.Input(INPUT_SHAPE),
            layers.Conv2D(32, 3, activation="relu", kernel_initializer=weights(0), **axes, **mixed),
            layers.Conv2D(64, 3, activation="relu", kernel_initializer=weights(1), **axes, **mixed),
            layers.MaxPooling2D(2, **axes, **mixed),
            layers.Dropout(pooling_dropout, seed=seeds[4], **mixed),
            layers.Flatten(**axes, **mixed),
            layers.Dense(256, activation="relu", kernel_initializer=weights(2), **mixed),
            layers.Dropout(dense_dropout, seed=seeds[5], **mixed),
            layers.Dense(NUM_CLASSES, activation="softmax", kernel_initializer=weights(3)),
        ]
    )
    model.compile(
        optimizer=_optimizer(optimizer, learning_rate),
        loss=(
            keras.losses.CategoricalCrossentropy(label_smoothing=label_smoothing)
            if label_smoothing
            else "categorical_crossentropy"
        ),
        metrics=["accuracy"],
    )
    # Its variables cannot be made inside a tf.function.
    model.optimizer.build(model.trainable_variables)
    return model


def _optimizer(
    name: str, learning_rate: float | keras.optimizers.schedules.LearningRateSchedule
) -> keras.optimizers.Optimizer:
    optimizer = keras.optimizers.get(name)
    return type(optimizer)(learning_rate=learning_rate)


def preprocess(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Turns what the pipeline delivers into what the network takes.

    It runs on the device, inside the step, where a quarter of the bytes have to be copied to. On a
    CPU ``bench/pipeline.py`` found this cheaper than dividing in the pipeline in three runs of four
    (1.28 to 1.45 times its CPU time; 0.87 in the first), and the whole of it below a hundredth of
    training's, so the choice matters little there.

    Args:
        images: uint8 (n, 28, 28).
        labels: Integers (n,), 0 to 9.

    Returns:
        float32 (n, 28, 28, 1) from 0 to 1, and one-hot float32 (n, 10).
    """
    inputs = tf.cast(images[..., tf.newaxis], tf.float32) / 255.0
    return inputs, tf.one_hot(labels, NUM_CLASSES, dtype=tf.float32)


def probabilities(
    model: keras.Model,
    images: np.ndarray,
    *,
    batch_size: int,
    after_batch: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Passes images through the network.

    Args:
        model: As ``build`` returns it, under no strategy of several replicas.
        images: uint8 (n, 28, 28), 0 is background and 255 ink.
        batch_size: Images at once.
        after_batch: Called after each batch; what it raises ends the pass.

    Returns:
        float32 (n, 10), of each digit.

    Raises:
        NotFiniteError: The network gives something else: its weights overflow. What overflows in
            front of the pooling may stay unseen (see ``trainer.training.loop``).
    """
    # Not model.predict, which compiles with XLA: the kernels, and so the bits, are those of the
    # evaluation in training.
    predict = tf.function(lambda inputs: model(inputs, training=False), autograph=False)
    parts = []
    for start in range(0, len(images), batch_size):
        inputs = np.float32(images[start : start + batch_size, ..., np.newaxis]) / 255
        parts.append(predict(inputs).numpy())
        after_batch()
    found = np.concatenate(parts)
    if not np.isfinite(found).all():
        raise NotFiniteError(
            "Expected probabilities. Received: NaN from the network, for "
            f"{len(found) - int(np.isfinite(found).all(axis=1).sum()):,} of {len(found):,} images. "
            "Train it anew, with a smaller --learning-rate."
        )
    return found
