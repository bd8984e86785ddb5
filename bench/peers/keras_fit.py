"""The notebook's own program, in Keras' fit."""

import keras
import tensorflow as tf
import work
from keras import layers

flags = work.arguments()
tf.config.threading.set_intra_op_parallelism_threads(flags.threads)

x_train, y_train, x_test, y_test = work.load(flags)
x_train = x_train.reshape(-1, 28, 28, 1).astype("float32") / 255
x_test = x_test.reshape(-1, 28, 28, 1).astype("float32") / 255
y_train = keras.utils.to_categorical(y_train, 10)
y_test = keras.utils.to_categorical(y_test, 10)

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
        layers.Dense(10, activation="softmax"),
    ]
)
model.compile(
    loss="categorical_crossentropy",
    optimizer=keras.optimizers.Adadelta(learning_rate=1.0),
    metrics=["accuracy"],
)


class Events(keras.callbacks.Callback):
    """Says when steps and epochs end."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 0 or batch % 10 == 9:
            work.say("step", step=batch + 1)

    def on_epoch_end(self, epoch, logs=None):
        work.say("epoch", epoch=epoch + 1, accuracy=logs["val_accuracy"])


model.fit(
    x_train,
    y_train,
    batch_size=flags.batch_size,
    epochs=flags.epochs,
    verbose=0,
    validation_data=(x_test, y_test),
    callbacks=[Events()],
)
if flags.output:
    model.save(flags.output)
