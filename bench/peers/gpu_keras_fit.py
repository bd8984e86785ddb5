"""The notebook's program in Keras' fit on a GPU: as it is, and as fast as its settings make it."""

import os

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import gpu_work as work
import keras
import tensorflow as tf
from keras import layers

flags = work.arguments()
for gpu in tf.config.list_physical_devices("GPU"):
    tf.config.experimental.set_memory_growth(gpu, True)
x_train, y_train, x_test, y_test = work.load(flags)
x_train = x_train.reshape(-1, 28, 28, 1).astype("float32") / 255
x_test = x_test.reshape(-1, 28, 28, 1).astype("float32") / 255
y_train = keras.utils.to_categorical(y_train, 10)
y_test = keras.utils.to_categorical(y_test, 10)


def measure(name: str, batch_size: int, precision: str, **settings: object) -> None:
    """Times the epochs of one combination."""
    tf.config.experimental.enable_tensor_float_32_execution(precision != "float32")
    keras.config.set_dtype_policy("mixed_bfloat16" if "bfloat16" in precision else "float32")
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(2),
            layers.Dropout(0.25),
            layers.Flatten(),
            layers.Dense(256, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax", dtype="float32"),
        ]
    )
    model.compile(
        loss="categorical_crossentropy",
        optimizer=keras.optimizers.Adadelta(learning_rate=1.0),
        metrics=["accuracy"],
        **settings,
    )
    steps = -(-len(x_train) // batch_size)

    def epoch():
        model.fit(x_train, y_train, batch_size=batch_size, epochs=1, verbose=0)

    work.time_epochs(name, batch_size, precision, steps, flags.epochs, epoch)
    _, accuracy = model.evaluate(x_test, y_test, batch_size=1000, verbose=0)
    work.say("accuracy", name=name, value=accuracy, epochs=flags.epochs)


for precision in flags.precisions:
    for batch_size in flags.batch_sizes:
        measure("Keras fit", batch_size, precision)
        measure(
            "Keras fit, jit_compile, steps_per_execution",
            batch_size,
            precision,
            jit_compile=True,
            steps_per_execution=max(1, min(64, len(x_train) // batch_size)),
        )
