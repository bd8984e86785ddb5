"""In the shape of Keras' "Bidirectional LSTM on IMDB": padded sequences of words' numbers."""

import keras
import numpy as np
from keras import layers

keras.utils.set_random_seed(0)
noise = np.random.default_rng(0)
sequences = [noise.integers(1, 200, noise.integers(5, 30)).tolist() for _ in range(64)]
x_train = keras.utils.pad_sequences(sequences, maxlen=30)
y_train = (x_train.sum(axis=1) > x_train.sum(axis=1).mean()).astype("int64")
x_val, y_val = x_train[:16], y_train[:16]

inputs = keras.Input(shape=(None,), dtype="int32")
hidden = layers.Embedding(200, 16)(inputs)
hidden = layers.Bidirectional(layers.LSTM(8, return_sequences=True))(hidden)
hidden = layers.Bidirectional(layers.LSTM(8))(hidden)
model = keras.Model(inputs, layers.Dense(1, activation="sigmoid")(hidden))
model.compile(optimizer="adam", loss="binary_crossentropy", metrics=["accuracy"])
model.fit(x_train, y_train, batch_size=16, epochs=3, validation_data=(x_val, y_val))
