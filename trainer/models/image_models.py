"""Networks for images of any size and number of classes, made of stock Keras layers.

    model = cnn((32, 32, 3), classes=10, config=TrainConfig())
    model = resnet((32, 32, 3), classes=10, config=TrainConfig())

Both take values from 0 to 255, and scale them in their first layer, so that a saved model takes
pictures as they are. They are not compiled (``registry`` does it).
"""

from trainer.config import TrainConfig
from trainer.runtime import keras

_WIDEST = 14  # Of what the dense layers are given: the digits' 12, and 14 of 32x32 pixels.
_SMALLEST = 8  # Below it, convolutions pad.


def cnn(shape: tuple[int, int, int], classes: int, config: TrainConfig) -> keras.Model:
    """Builds the network for digits (``models.cnn``) for other images: with as many more
    convolutions of 64 filters and poolings before its dense layers as bring them to 14x14.

    Args:
        shape: Height, width and channels of an image.
        classes: Number of classes.
        config: Its dropout rates.

    Returns:
        A model from (n, *shape), 0 to 255, to probabilities float32 (n, classes).
    """
    layers = keras.layers
    padding = "same" if min(shape[:2]) < _SMALLEST else "valid"

    def convolution(filters: int) -> keras.Layer:
        return layers.Conv2D(
            filters, 3, activation="relu", padding=padding, data_format="channels_last"
        )

    def pooling() -> keras.Layer:
        return layers.MaxPooling2D(2, padding="same", data_format="channels_last")

    stack = [keras.Input(shape), layers.Rescaling(1 / 255), convolution(32), convolution(64)]
    stack += [pooling()]
    height, width = ((side - 4 * (padding == "valid") + 1) // 2 for side in shape[:2])
    while max(height, width) > _WIDEST and min(height, width) >= _SMALLEST:
        stack += [convolution(64), pooling()]
        height, width = ((side - 2 + 1) // 2 for side in (height, width))
    return keras.Sequential(
        [
            *stack,
            layers.Dropout(config.pooling_dropout),
            layers.Flatten(data_format="channels_last"),
            layers.Dense(256, activation="relu"),
            layers.Dropout(config.dense_dropout),
            layers.Dense(classes, activation="softmax", dtype="float32"),
        ],
        name="cnn",
    )


def resnet(
    shape: tuple[int, int, int], classes: int, config: TrainConfig, *, blocks: int = 3
) -> keras.Model:
    """Builds ResNet-20 of He et al. (2015), https://arxiv.org/abs/1512.03385, section 4.2: three
    stages of 16, 32 and 64 filters, each of ``blocks`` pairs of convolutions with a shortcut. A
    shortcut to more filters is a convolution of 1x1 (option B there).

    Args:
        shape: Height, width and channels of an image.
        classes: Number of classes.
        config: Not used: it has no dropout.
        blocks: Pairs of convolutions in a stage; the network has 6 * blocks + 2 layers.

    Returns:
        As ``cnn``.
    """
    del config
    layers = keras.layers
    axes = {"data_format": "channels_last"}

    def convolution(x: keras.KerasTensor, filters: int, size: int, strides: int) -> object:
        x = layers.Conv2D(
            filters,
            size,
            strides,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
            **axes,
        )(x)
        return layers.BatchNormalization()(x)

    images = keras.Input(shape)
    x = layers.Rescaling(1 / 127.5, offset=-1)(images)
    x = layers.ReLU()(convolution(x, 16, 3, 1))
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(blocks):
            strides = 2 if stage and not block else 1
            shortcut = convolution(x, filters, 1, strides) if strides > 1 else x
            x = layers.ReLU()(convolution(x, filters, 3, strides))
            x = convolution(x, filters, 3, 1)
            x = layers.ReLU()(layers.Add()([x, shortcut]))
    x = layers.GlobalAveragePooling2D(**axes)(x)
    outputs = layers.Dense(classes, activation="softmax", dtype="float32")(x)
    return keras.Model(images, outputs, name="resnet")
