"""The CNN for handwritten digits: two convolutions, two dense layers, 2,380,938 parameters.

    model = build(optimizer="adadelta", learning_rate=1.0, seed=0)
    probabilities(model, images)        # uint8 (n, 28, 28) -> float32 (n, 10)

All its layers are stock Keras layers, so the saved file loads in any Keras 3.
"""

import functools
from collections.abc import Callable
from typing import get_args

import numpy as np

from trainer.config import Precision, TrainConfig
from trainer.errors import NotFiniteError
from trainer.models import optimizers
from trainer.runtime import keras, tf

INPUT_SHAPE = (28, 28, 1)
NUM_CLASSES = 10

# One value an example, float32 (n,), from one-hot labels (n, 10) and probabilities (n, 10).
LOSS = keras.losses.categorical_crossentropy
METRICS = {"accuracy": keras.metrics.categorical_accuracy}


def from_config(config: TrainConfig, examples: int) -> keras.Sequential:
    """Builds the network that a configuration asks for; see ``build``.

    Args:
        config: The configuration of the run.
        examples: Number of training examples, which the learning rate schedule depends on.
    """
    return build(
        optimizer=config.optimizer,
        learning_rate=optimizers.learning_rate(config, examples),
        seed=config.seed,
        pooling_dropout=config.pooling_dropout,
        dense_dropout=config.dense_dropout,
        label_smoothing=config.label_smoothing,
        precision=config.precision,
    )


def build(
    *,
    optimizer: str,
    learning_rate: optimizers.LearningRate,
    seed: int,
    pooling_dropout: float = 0.25,
    dense_dropout: float = 0.5,
    label_smoothing: float = 0.0,
    precision: Precision = "tensorfloat32",
) -> keras.Sequential:
    """Builds and compiles the network.

    Args:
        optimizer: Keras' name of the optimizer.
        learning_rate: Its learning rate, or a schedule of it.
        seed: Determines the initial weights and the dropout masks.
        pooling_dropout: Dropout rate after the pooling layer.
        dense_dropout: Dropout rate after the first dense layer.
        label_smoothing: Share of each label that is spread evenly over all classes, in the loss.
        precision: With ``mixed_bfloat16``, all but the last layer compute in bfloat16, with float32
            weights; the other precisions do not change the model.

    Returns:
        A model with its optimizer's variables created. Input: float32 (n, 28, 28, 1), from 0 to 1.
        Output: float32 (n, 10), probabilities.

    Raises:
        ValueError: Keras has no optimizer of that name, or the precision is another one.
    """
    if precision not in get_args(Precision):
        expected = ", ".join(get_args(Precision))
        raise ValueError(f"Expected a precision of {expected}. Received: {precision!r}.")
    layers = keras.layers
    seeds = [int(word) for word in np.random.SeedSequence(seed).generate_state(6)]

    def weights(layer: int) -> keras.initializers.Initializer:
        return keras.initializers.GlorotUniform(seed=seeds[layer])

    # Explicit, because ~/.keras/keras.json may set another default.
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
        optimizer=optimizers.create(optimizer, learning_rate),
        loss=(
            keras.losses.CategoricalCrossentropy(label_smoothing=label_smoothing)
            if label_smoothing
            else "categorical_crossentropy"
        ),
        metrics=["accuracy"],
    )
    # The optimizer's variables cannot be created inside a tf.function.
    model.optimizer.build(model.trainable_variables)
    return model


def loss(label_smoothing: float = 0.0) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Returns ``LOSS`` with the label smoothing that ``build`` compiles a model with."""
    return functools.partial(LOSS, label_smoothing=label_smoothing)


def preprocess(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Converts a batch of the input pipeline to the network's input and targets.

    It runs on the device inside the step, so that uint8 is copied there, a quarter of the bytes. On
    CPUs ``bench/pipeline.py`` measured no clear difference to scaling in the pipeline, and less
    than 1% of the time of training for the whole pipeline.

    Args:
        images: uint8 (n, 28, 28).
        labels: Integers (n,), 0 to 9.

    Returns:
        ``scale(images)``, and the labels as one-hot float32 (n, 10).
    """
    return scale(images), tf.one_hot(labels, NUM_CLASSES, dtype=tf.float32)


def scale(images: tf.Tensor | np.ndarray) -> tf.Tensor:
    """Converts images to the network's input.

    Args:
        images: uint8 (n, 28, 28), 0 for background and 255 for ink.

    Returns:
        float32 (n, 28, 28, 1), from 0 to 1.
    """
    return tf.cast(images[..., tf.newaxis], tf.float32) / 255.0


def probabilities(
    model: keras.Model,
    images: np.ndarray,
    *,
    batch_size: int,
    after_batch: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Predicts the class probabilities of images.

    Args:
        model: A model with the input and output of ``build``'s, on one device.
        images: uint8 (n, 28, 28), 0 for background and 255 for ink.
        batch_size: Images in one forward pass.
        after_batch: Called after each batch; an exception it raises ends the prediction.

    Returns:
        float32 (n, 10).

    Raises:
        NotFiniteError: As the function that ``predictor`` returns.
    """
    predict = predictor(model)
    parts = []
    for start in range(0, len(images), batch_size):
        parts.append(predict(images[start : start + batch_size]))
        after_batch()
    return np.concatenate(parts)


def predictor(model: keras.Model) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that predicts the class probabilities of one batch of images, whatever its
    size. It is compiled once, when it is first called.

    Args:
        model: A model with the input and output of ``build``'s, on one device.

    Returns:
        A function from uint8 (n, 28, 28), 0 for background and 255 for ink, to float32 (n, 10). It
        raises NotFiniteError where the network returns NaN or infinity, as with weights that
        overflow. Some overflows before the pooling layer stay unseen: with AVX-512, oneDNN's
        pooling ignores NaN (TensorFlow 2.21).
    """

    # Not model.predict, which compiles with XLA: these are the kernels, and so the bits, of the
    # evaluation during training.
    @tf.function(
        input_signature=[tf.TensorSpec((None, *INPUT_SHAPE[:2]), tf.uint8)], autograph=False
    )
    def forward(images: tf.Tensor) -> tf.Tensor:
        return model(scale(images), training=False)

    def predict(images: np.ndarray) -> np.ndarray:
        predicted = forward(images).numpy()
        finite = np.isfinite(predicted).all(axis=1)
        if not finite.all():
            raise NotFiniteError(
                "Expected finite probabilities. Received: NaN from the network, for "
                f"{np.count_nonzero(~finite):,} of {len(finite):,} images. Train the model again, "
                "with a smaller learning_rate."
            )
        return predicted

    return predict
