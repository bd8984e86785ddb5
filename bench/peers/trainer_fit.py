"""The trainer itself, called as its notebook calls it: ``digits_workload.fit``."""

import keras
import work

from trainer import runtime
from trainer.config import TrainConfig
from trainer.data.digits import Digits
from trainer.training.digits_workload import fit

flags = work.arguments()
config = TrainConfig(
    epochs=flags.epochs, batch_size=flags.batch_size, threads=flags.threads, fast=flags.fast
)
runtime.set_threads(flags.threads)


class Events(keras.callbacks.Callback):
    """Says when steps and epochs end."""

    def on_train_batch_end(self, batch, logs=None):
        work.say("step", step=batch + 1)

    def on_epoch_end(self, epoch, logs=None):
        work.say("epoch", epoch=epoch + 1, accuracy=logs["val_accuracy"])


model, history = fit(config, Digits(*work.load(flags)), callbacks=[Events()])
if flags.output:
    model.save(flags.output)
