"""Digits on the network for digits, with the training step that is made for it.

    workload = DigitsWorkload(TrainConfig(), sources.load("bundled"))
    model, history = fit(config, digits)        # of a script that writes no file

The images are in memory, on GPUs in theirs; a batch is one gather from them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from trainer.config import TrainConfig
from trainer.data import plausibility
from trainer.data.digits import NUM_CLASSES, Digits
from trainer.data.order import split_numbers
from trainer.errors import DataError
from trainer.files import DIGITS
from trainer.parameters import check_augmentation
from trainer.training.workload import Predictions, Workload, no_test_images

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

    from trainer.models.fast_step import StepChoice
    from trainer.training.position import Position


class DigitsWorkload(Workload):
    """Digits, and the network for them.

    Args:
        config: The run's.
        source: The whole data set.

    Attributes:
        digits: What is trained on; its test images are those that are measured after each epoch.

    Raises:
        DataError: There are no training images.
        UsageError: A limit is more than there are; or nothing is left to measure the model on.
    """

    names = DIGITS
    bytes_in_memory = 0

    def __init__(self, config: TrainConfig, source: Digits) -> None:
        self.config = config
        check_augmentation(config.augment, 1)
        self.sha256 = source.sha256
        self.bytes_in_memory = source.x_train.nbytes + source.x_test.nbytes
        digits = source.first(config.train_limit, config.test_limit)
        if not len(digits.x_train):
            raise DataError(
                f"Expected training images in {config.data}. Received: test images alone."
            )
        self.test_images, self.test_labels = digits.x_test, digits.y_test
        self.tests = len(digits.x_test)
        self.digits = digits
        self.validations = 0
        if config.validation_split:
            kept, held = split_numbers(len(digits.x_train), config.validation_split, config.seed)
            x, y = digits.x_train, digits.y_train
            self.digits = Digits(x[kept], y[kept], x[held], y[held])
            self.validations = len(held)
            if not self.tests:
                self.judged = "validation"
                self.test_images, self.test_labels = x[held], y[held]
        elif not self.tests:
            raise no_test_images(config)
        self.train_examples = len(self.digits.x_train)

    @property
    def data(self) -> dict:
        """The data, as the run manifest describes them."""
        validation = {"validation_examples": self.validations} if self.validations else {}
        return {
            "source": self.config.data,
            "sha256": self.sha256,
            "train_examples": self.train_examples,
            "test_examples": self.tests,
            **validation,
        }

    def summary(self) -> str:
        """Returns the numbers of examples."""
        validation = f", {self.validations:,} validation" if self.validations else ""
        return f"{self.train_examples:,} training{validation} and {self.tests:,} test images"

    def notices(self) -> Iterator[str]:
        """Yields sentences about images that look unusual."""
        return plausibility.notices(self.digits)

    def build(self) -> "keras.Model":
        """Returns the network for digits."""
        from trainer.models import cnn

        return cnn.from_config(self.config, self.train_examples)

    def find_step(self, *, accelerator: bool) -> "StepChoice":
        """Tells which training step is used: Keras', or the fast one."""
        from trainer.training import assembly

        return assembly.find_step(self.config, accelerator=accelerator)

    def prepare(self, strategy: "tf.distribute.Strategy") -> None:
        """Does nothing: the network is made in the strategy's scope as it is trained."""

    def fit(
        self,
        *,
        strategy: "tf.distribute.Strategy",
        step: "StepChoice",
        callbacks: Sequence["keras.callbacks.Callback"],
        begin: "Callable[[keras.Model], Position]",
        after_call: "Callable[[Position], None]",
        notify: Callable[[str], None],
    ) -> tuple["keras.Model", dict[str, list[float]]]:
        """Trains the network; as ``fit``."""
        return fit(
            self.config,
            self.digits,
            strategy=strategy,
            step=step,
            callbacks=callbacks,
            begin=begin,
            after_call=after_call,
            notify=notify,
        )

    def augmented(self, count: int) -> Iterator[np.ndarray]:
        """Yields the first training images as the augmentation makes them in the first epoch."""
        from trainer.data.augment import Augmentation

        if augmentation := Augmentation.of(self.config.augment):
            images = self.digits.x_train[:count]
            drawn = augmentation.draw(np.arange(len(images)), self.config.seed, 0)
            yield from augmentation(images, drawn).numpy()

    def release(self) -> None:
        """Forgets the training images."""
        del self.digits

    def predictions(
        self, model: "keras.Model", *, batch_size: int, after_batch: Callable[[], None]
    ) -> Predictions:
        """Returns what a trained model predicts for the test images."""
        from trainer.models import cnn

        probabilities = cnn.probabilities(
            model, self.test_images, batch_size=batch_size, after_batch=after_batch
        )
        classes = [str(number) for number in range(NUM_CLASSES)]
        return Predictions(self.test_labels, probabilities, self.test_images, classes)


def fit(
    config: TrainConfig,
    digits: "Digits",
    *,
    strategy: "tf.distribute.Strategy | None" = None,
    step: "StepChoice | None" = None,
    callbacks: Sequence["keras.callbacks.Callback"] = (),
    begin: "Callable[[keras.Model], Position] | None" = None,
    after_call: "Callable[[Position], None]" = lambda position: None,
    notify: Callable[[str], None] = lambda text: None,
) -> tuple["keras.Model", dict[str, list[float]]]:
    """Builds the model of a configuration and trains it; writes no file.

    Args:
        config: The configuration.
        digits: The data set to train on.
        strategy: The strategy to train under; None: the one that ``config`` asks for, in this
            process.
        step: The training step; None: the one that ``config`` asks for.
        callbacks: Keras callbacks, called as in ``loop.fit``.
        begin: Called with the model; returns the position to resume from. None: start from the
            beginning.
        after_call: As that of ``loop.fit``.
        notify: Called with each sentence for the user.

    Returns:
        The compiled model, in float32, and its history as ``loop.fit`` returns it.

    Raises:
        UsageError: The batch size does not divide among the replicas.
        NotFiniteError: The loss or the weights became NaN or infinite.
    """
    from trainer.data import pipeline
    from trainer.data.augment import Augmentation
    from trainer.distributed.strategy import check_batch_size, has_accelerator
    from trainer.models import cnn
    from trainer.training import loop
    from trainer.training.assembly import choose_step, create_strategy

    strategy = strategy or create_strategy(config).strategy
    step = step or choose_step(config, strategy)
    check_batch_size(config.batch_size, strategy.num_replicas_in_sync)
    with strategy.scope():
        model = cnn.from_config(config, len(digits.x_train))
    position = begin(model) if begin else None
    dataset = pipeline.put_on_devices(
        digits,
        strategy=strategy if has_accelerator() else None,
        preprocess=cnn.preprocess,
        augment=Augmentation.of(config.augment),
    )
    if dataset.notice:
        notify(dataset.notice)
    with step.step(model) as forward:
        history = loop.fit(
            model,
            lambda epoch: pipeline.train_batches(
                *dataset.train,
                batch_size=config.batch_size,
                seed=config.seed,
                epoch=epoch,
                augment=dataset.augment,
            ),
            pipeline.test_batches(*dataset.test, batch_size=config.batch_size),
            strategy=strategy,
            loss=cnn.loss(config.label_smoothing),
            metrics=cnn.METRICS,
            epochs=config.epochs,
            preprocess=dataset.preprocess,
            forward=forward,
            jit_compile=config.jit_compile,
            steps_per_execution=config.steps_per_execution,
            callbacks=callbacks,
            position=position,
            after_call=after_call,
        )
    if config.precision == "mixed_bfloat16":  # Saved as a plain float32 model.
        with strategy.scope():
            plain = cnn.from_config(
                dataclasses.replace(config, precision="float32"), len(digits.x_train)
            )
        plain.set_weights(model.get_weights())
        model = plain
    return model, history
