"""A subclassed model of two inputs, the picture of a digit and a number: is their sum even?

python examples/two_inputs.py
python -m trainer.launch -- examples/two_inputs.py
"""

import keras
import numpy as np

import trainer


class EvenSum(keras.Model):
    """Reads the digit, and joins what it has read with the number."""

    def __init__(self) -> None:
        super().__init__()
        self.read = keras.Sequential(
            [
                keras.layers.Rescaling(1 / 255),
                keras.layers.Flatten(),
                keras.layers.Dense(64, activation="relu"),
                keras.layers.Dropout(0.2),
            ]
        )
        self.embed = keras.layers.Embedding(10, 8)
        self.join = keras.layers.Dense(32, activation="relu")
        self.decide = keras.layers.Dense(1, activation="sigmoid")

    def call(self, inputs, training=False):
        """Returns the probabilities, (n, 1)."""
        read = self.read(inputs["picture"], training=training)
        joined = keras.layers.concatenate([read, self.embed(inputs["number"])])
        return self.decide(self.join(joined))


digits = trainer.load_data("bundled").first(8000, None)
numbers = np.random.default_rng(0).integers(0, 10, len(digits.x_train))
keras.utils.set_random_seed(0)
model = EvenSum()
model.compile("adam", loss="binary_crossentropy", metrics=["accuracy", "auc"])
trainer.fit(
    model,
    ({"picture": digits.x_train, "number": numbers}, (digits.y_train + numbers) % 2 == 0),
    validation_split=0.2,
    epochs=3,
    batch_size=64,
    callbacks=[keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True)],
    output_dir="out",
)
