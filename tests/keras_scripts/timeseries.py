"""In the shape of Keras' "Timeseries classification from scratch": batch normalization, and three
callbacks that remember.
"""

import keras
import numpy as np

keras.utils.set_random_seed(0)
noise = np.random.default_rng(0)
y_train = noise.integers(0, 2, 80)
x_train = noise.normal(size=(80, 50, 1)) + np.sin(np.arange(50) * (1 + y_train[:, None]))[..., None]


def make_model(shape):
    inputs = keras.layers.Input(shape)
    hidden = inputs
    for _ in range(3):
        hidden = keras.layers.Conv1D(8, 3, padding="same")(hidden)
        hidden = keras.layers.BatchNormalization()(hidden)
        hidden = keras.layers.ReLU()(hidden)
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    return keras.models.Model(inputs, keras.layers.Dense(2, activation="softmax")(pooled))


model = make_model(x_train.shape[1:])
callbacks = [
    keras.callbacks.ModelCheckpoint("best_model.keras", save_best_only=True, monitor="val_loss"),
    keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=0.5, patience=1, min_lr=0.0001),
    keras.callbacks.EarlyStopping(monitor="val_loss", patience=5),
]
model.compile("adam", "sparse_categorical_crossentropy", metrics=["sparse_categorical_accuracy"])
model.fit(x_train, y_train, batch_size=16, epochs=4, callbacks=callbacks, validation_split=0.2)
