"""The digits in ten lines; with two workers: python -m trainer.launch -- examples/digits.py"""

import keras

import trainer

keras.utils.set_random_seed(0)
layers = keras.layers
digits = trainer.load_data("bundled")
model = keras.Sequential([keras.Input((28, 28)), layers.Rescaling(1 / 255)])
model.add(layers.Reshape((28, 28, 1)))
model.add(layers.Conv2D(16, 3, strides=2, activation="relu"))
model.add(layers.Flatten())
model.add(layers.Dense(10, activation="softmax"))
model.compile("adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
trainer.fit(model, (digits.x_train, digits.y_train), batch_size=128, output_dir="out")
print(trainer.evaluate(model, (digits.x_test, digits.y_test), verbose=0))
