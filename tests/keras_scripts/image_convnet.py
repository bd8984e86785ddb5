"""In the shape of Keras' "Simple MNIST convnet": one-hot labels, dropout, a validation split."""

import keras
import numpy as np
from keras import layers

keras.utils.set_random_seed(0)
noise = np.random.default_rng(0)
y_train = noise.integers(0, 10, 96)
x_train = noise.random((96, 28, 28, 1), "float32") + y_train[:, None, None, None] / 10
y_train = keras.utils.to_categorical(y_train, 10)

model = keras.Sequential(
    [
        keras.Input(shape=(28, 28, 1)),
        layers.Conv2D(8, kernel_size=(3, 3), activation="relu"),
        layers.MaxPooling2D(pool_size=(2, 2)),
        layers.Conv2D(8, kernel_size=(3, 3), activation="relu"),
        layers.MaxPooling2D(pool_size=(2, 2)),
        layers.Flatten(),
        layers.Dropout(0.5),
        layers.Dense(10, activation="softmax"),
    ]
)
model.compile(loss="categorical_crossentropy", optimizer="adam", metrics=["accuracy"])
model.fit(x_train, y_train, batch_size=16, epochs=3, validation_split=0.1667)
