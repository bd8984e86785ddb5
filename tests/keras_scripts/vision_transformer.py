"""In the shape of Keras' "Image classification with Vision Transformer": augmentation inside the
model, attention, weight decay, top-k accuracy, saved weights.
"""

import keras
import numpy as np
from keras import layers, ops

keras.utils.set_random_seed(0)
noise = np.random.default_rng(0)
y_train = noise.integers(0, 10, (64, 1))
x_train = noise.integers(0, 256, (64, 16, 16, 3)).astype("uint8")
WIDTH, PATCHES = 16, 16


class Patches(layers.Layer):
    """Cuts images into squares of four pixels."""

    def call(self, images):
        patches = ops.image.extract_patches(images, size=4)
        return ops.reshape(patches, (ops.shape(images)[0], PATCHES, 4 * 4 * 3))


class PatchEncoder(layers.Layer):
    """Adds an embedding of its place to each."""

    def __init__(self):
        super().__init__()
        self.projection = layers.Dense(WIDTH)
        self.position = layers.Embedding(PATCHES, WIDTH)

    def call(self, patches):
        return self.projection(patches) + self.position(ops.arange(PATCHES))


augmentation = keras.Sequential(
    [layers.Normalization(), layers.RandomFlip("horizontal"), layers.RandomRotation(0.02)]
)
augmentation.layers[0].adapt(x_train)
inputs = keras.Input(shape=x_train.shape[1:])
encoded = PatchEncoder()(Patches()(augmentation(inputs)))
for _ in range(2):
    hidden = layers.LayerNormalization(epsilon=1e-6)(encoded)
    hidden = layers.MultiHeadAttention(num_heads=2, key_dim=WIDTH, dropout=0.1)(hidden, hidden)
    encoded = layers.Add()([hidden, encoded])
    hidden = layers.LayerNormalization(epsilon=1e-6)(encoded)
    hidden = layers.Dense(WIDTH, activation=keras.activations.gelu)(hidden)
    encoded = layers.Add()([layers.Dropout(0.1)(hidden), encoded])
features = layers.Flatten()(layers.LayerNormalization(epsilon=1e-6)(encoded))
model = keras.Model(inputs, layers.Dense(10)(layers.Dropout(0.5)(features)))
model.compile(
    optimizer=keras.optimizers.AdamW(learning_rate=0.001, weight_decay=0.0001),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=[
        keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
        keras.metrics.SparseTopKCategoricalAccuracy(5, name="top-5-accuracy"),
    ],
)
best = keras.callbacks.ModelCheckpoint(
    "checkpoint.weights.h5", monitor="val_accuracy", save_best_only=True, save_weights_only=True
)
model.fit(x_train, y_train, batch_size=16, epochs=3, validation_split=0.25, callbacks=[best])
