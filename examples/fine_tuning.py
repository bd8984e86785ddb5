"""Fine-tunes a network of keras.applications on a folder of pictures, one folder for each class:

    python examples/make_pictures.py pictures
    python examples/fine_tuning.py pictures
    python -m trainer.launch -- examples/fine_tuning.py pictures

First a new head on the frozen network, then all of it. Its weights are random here, so that nothing
is downloaded: weights="imagenet" takes those of ImageNet.
"""

import sys

import keras

import trainer
from trainer.data.folders import ImageFolder

pictures = ImageFolder(sys.argv[1], image_size=(64, 64), channels=3)
keras.utils.set_random_seed(0)
network = keras.applications.MobileNetV2((64, 64, 3), alpha=0.35, include_top=False, weights=None)
network.trainable = False

inputs = keras.Input((64, 64, 3))
hidden = keras.layers.RandomFlip("horizontal")(inputs)
hidden = keras.applications.mobilenet_v2.preprocess_input(hidden)
hidden = network(hidden, training=False)
hidden = keras.layers.GlobalAveragePooling2D()(hidden)
outputs = keras.layers.Dense(len(pictures.classes), activation="softmax")(hidden)
model = keras.Model(inputs, outputs)

stages = {"head": (False, 1e-2, 2), "all": (True, 1e-4, 2)}
for name, (trainable, learning_rate, epochs) in stages.items():
    network.trainable = trainable
    model.compile(
        keras.optimizers.Adam(learning_rate),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    trainer.fit(
        model,
        pictures,
        validation_split=0.25,
        epochs=epochs,
        batch_size=32,
        output_dir=f"out/{name}",
    )
if trainer.is_chief():
    model.save("pictures.keras")
