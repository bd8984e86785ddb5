"""In the shape of Keras' "Imbalanced classification: credit card fraud detection": class weights,
and metrics that count.
"""

import keras
import numpy as np

keras.utils.set_random_seed(0)
noise = np.random.default_rng(0)
x_train = noise.normal(size=(160, 12)).astype("float32")
y_train = (x_train[:, :1] > 1.2).astype("uint8")
x_val, y_val = x_train[:40], y_train[:40]

model = keras.Sequential(
    [
        keras.Input(shape=x_train.shape[1:]),
        keras.layers.Dense(32, activation="relu"),
        keras.layers.Dropout(0.3),
        keras.layers.Dense(32, activation="relu"),
        keras.layers.Dropout(0.3),
        keras.layers.Dense(1, activation="sigmoid"),
    ]
)
metrics = [
    keras.metrics.FalseNegatives(name="fn"),
    keras.metrics.FalsePositives(name="fp"),
    keras.metrics.TrueNegatives(name="tn"),
    keras.metrics.TruePositives(name="tp"),
    keras.metrics.Precision(name="precision"),
    keras.metrics.Recall(name="recall"),
]
model.compile(optimizer=keras.optimizers.Adam(1e-2), loss="binary_crossentropy", metrics=metrics)
weights = {0: 1 / (y_train == 0).sum(), 1: 1 / (y_train == 1).sum()}
saved = [keras.callbacks.ModelCheckpoint("fraud_model_at_epoch_{epoch}.keras")]
options = {"validation_data": (x_val, y_val), "class_weight": weights}
model.fit(x_train, y_train, batch_size=32, epochs=3, callbacks=saved, **options)
