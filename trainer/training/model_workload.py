"""Any images on any network, trained as ``trainer.fit`` trains a model.

    workload = ModelWorkload(TrainConfig(model="resnet"), sources.load("pictures"))

Images are read as they are needed, by each worker its own; the network is built in, or made by a
function of the user's own (``models.registry``).
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer import machine
from trainer.config import TrainConfig
from trainer.data import dataset, pipeline, resident
from trainer.data.arrays import ArrayDataset
from trainer.data.augment import Augmentation
from trainer.data.cache import Cached, bytes_of
from trainer.data.dataset import Dataset, OneHot, Splits, Subset
from trainer.data.digits import NUM_CLASSES, Digits
from trainer.data.order import epoch_order
from trainer.data.pipeline import Augment, Deferred
from trainer.distributed.collectives import Workers
from trainer.distributed.replica_variables import mirrored
from trainer.distributed.strategy import has_accelerator
from trainer.errors import ConfigurationError, DataError, NotFiniteError, UsageError
from trainer.files import OTHERS
from trainer.models import registry
from trainer.models.fast_step import StepChoice
from trainer.parameters import check_augmentation
from trainer.runtime import keras, tf
from trainer.training import artifacts, keras_model, loop
from trainer.training.compiled import CompiledModel
from trainer.training.feed import Feed, reading_errors, shard_of
from trainer.training.workload import Predictions, Workload, no_test_images

if TYPE_CHECKING:
    from trainer.training.position import Position


CACHE_SHARE = 0.5  # Of the memory that is free, for images that stay in it.


class ModelWorkload(Workload):
    """Images of any shape, and a network for them.

    Args:
        config: The run's.
        source: The whole data set.

    Attributes:
        train: What is trained on.
        measured: What is measured after each epoch.
        test_set: What the trained model is judged on: the test images, where there are any.
        spec: What the network is given.

    Raises:
        DataError: There are no training images.
        UsageError: A limit is more than there are; or nothing is left to measure the model on.
    """

    names = OTHERS

    def __init__(self, config: TrainConfig, source: Splits | Digits) -> None:
        self.config = config
        splits = splits_of(source) if isinstance(source, Digits) else source
        if splits.train is None:
            raise DataError(
                f"Expected training images in {config.data}. Received: test images alone."
            )
        self.parts = [
            part for part in (splits.train, splits.validation, splits.test) if part is not None
        ]
        train = limited(splits.train, "train_limit", config.train_limit, config.seed)
        test, validation = splits.test, splits.validation
        if test is not None:
            test = limited(test, "test_limit", config.test_limit, config.seed)
        if config.validation_split and validation is not None:
            raise UsageError(
                f"validation_split is for data without validation images. Received: {config.data}, "
                "which has some. Leave it out."
            )
        if config.validation_split:
            train, validation = dataset.split(train, config.validation_split, seed=config.seed)
        judges = test if test is not None else validation
        if judges is None:
            raise no_test_images(config)
        self.judged = "test" if test is not None else "validation"
        self.train: Dataset = train
        self.measured: Dataset = validation if validation is not None else judges
        self.test_set: Dataset = judges
        if config.label_smoothing:  # Which the loss wants one-hot labels for.
            classes = len(train.classes or ())
            self.train, self.measured = OneHot(train, classes), OneHot(self.measured, classes)
        self.counts = [0 if part is None else len(part) for part in (train, validation, test)]
        self.train_examples = len(train)
        images = train.spec[0]
        self.spec = registry.DataSpec(
            tuple(images.shape), images.dtype.name, tuple(train.classes or ())
        )
        self.model_sha256 = ""
        check_augmentation(config.augment, self.spec.shape[-1])
        self.augmentation = Augmentation.of(config.augment)

    @property
    def data(self) -> dict:
        """The data, as the run manifest describes them, and a digest of the network."""
        digests = [part.digest for part in self.parts]
        train, validation, test = self.counts
        described = {
            "source": self.config.data,
            "sha256": hashlib.sha256(repr(digests).encode()).hexdigest(),
            "train_examples": train,
            "test_examples": test,
            "shape": list(self.spec.shape),
            "dtype": self.spec.dtype,
            "classes": list(self.spec.classes),
        }
        if validation:
            described["validation_examples"] = validation
        if self.model_sha256:
            described["model_sha256"] = self.model_sha256
        return described

    def summary(self) -> str:
        """Returns the numbers of examples, their shape, and the number of classes."""
        train, validation, test = self.counts
        validated = f", {validation:,} validation" if validation else ""
        shape = "×".join(map(str, self.spec.shape))
        return (
            f"{train:,} training{validated} and {test:,} test images of {shape}, "
            f"{len(self.spec.classes)} classes"
        )

    def notices(self) -> Iterator[str]:
        """Yields a sentence about pictures that are left out."""
        skipped: dict = {}
        for part in self.parts:
            skipped |= getattr(part, "skipped", {})
        if skipped:
            names = [f"{path} ({why})" for path, why in list(skipped.items())[:3]]
            more = f" and {len(skipped) - 3:,} others" if len(skipped) > 3 else ""
            yield f"{len(skipped):,} pictures are left out: {', '.join(names)}{more}"

    @property
    def bytes_in_memory(self) -> int:
        """What arrays take that are not mapped from files."""
        arrays = [part.arrays[0] for part in self.parts if isinstance(part, ArrayDataset)]
        return sum(array.nbytes for array in arrays if not isinstance(array, np.memmap))

    def build(self) -> keras.Model:
        """Returns the network, compiled and with all its variables."""
        model = registry.build(self.config, self.spec, examples=self.train_examples)
        keras_model.check(model, 1)
        keras_model.build(model, self.train.spec, self.config.batch_size)
        artifacts.archive(model)  # Hours later it would be too late to learn that it cannot be.
        return model

    def find_step(self, *, accelerator: bool) -> StepChoice:
        """Returns Keras' step: the fast one is for the network for digits."""
        del accelerator
        return StepChoice("keras")

    def prepare(self, strategy: tf.distribute.Strategy) -> None:
        """Builds the network, which is the same one on all workers, and decides whether images stay
        in memory.
        """
        workers = Workers(strategy)
        self.model = self.build()
        keras_model.check(self.model, strategy.num_replicas_in_sync)
        self.model_sha256 = keras_model.digest(self.model)
        if others := workers.differing(bytes.fromhex(self.model_sha256)):
            raise ConfigurationError(
                f"Expected the same network on all workers. Received: another one of "
                f"{self.config.model} on worker {', '.join(map(str, others))} than on worker 0. "
                "Install the same code there."
            )
        self._cache(workers)

    def _cache(self, workers: Workers) -> None:
        """Has images that are read from files stay in memory, where they fit."""
        streamed = [part for part in (self.train, self.measured) if not _in_memory(part)]
        size = sum(map(bytes_of, streamed))
        # Workers may share a machine.
        most = int((machine.available_memory() or 0) * CACHE_SHARE / workers.count)
        if self.config.cache == "none" or not streamed:
            return
        if size > most:
            if self.config.cache == "memory":
                raise DataError(
                    f"Expected images that fit into {most / 1e9:.1f} GB, half of the memory that "
                    f"is free, for cache='memory'. Received: {size / 1e9:.1f} GB at "
                    f"{self.config.data}. Use cache='auto', or a smaller image_size."
                )
            return
        self.train, self.measured = (
            part if _in_memory(part) else Cached(part) for part in (self.train, self.measured)
        )

    def fit(
        self,
        *,
        strategy: tf.distribute.Strategy,
        step: StepChoice,
        callbacks: Sequence[keras.callbacks.Callback],
        begin: "Callable[[keras.Model], Position]",
        after_call: "Callable[[Position], None]",
        notify: Callable[[str], None],
    ) -> tuple[keras.Model, dict[str, list[float]]]:
        """Trains the network; as ``trainer.fit``."""
        del step
        config, model = self.config, self.model
        shard = shard_of(Workers(strategy))
        train, measured = self.train, self.measured
        augment: Augment | None = self.augmentation
        train_inputs = test_inputs = None
        if has_accelerator():
            train, train_inputs = _on_devices(train, strategy, self.augmentation)
            measured, test_inputs = _on_devices(measured, strategy)
            augment = Deferred(augment) if augment else None
            if train is self.train and _in_memory(train):
                notify(pipeline.does_not_fit(bytes_of(train)))
        feed = Feed(train, config.batch_size, shard, seed=config.seed, augment=augment)
        measured_feed = Feed(measured, config.batch_size, shard, seed=None)
        with mirrored(model, strategy), reading_errors(self.train, self.measured):
            history = loop.train(
                model,
                CompiledModel(model, strategy, train_inputs=train_inputs, test_inputs=test_inputs),
                feed,
                functools.partial(measured_feed, 0, 0),
                strategy=strategy,
                epochs=config.epochs,
                jit_compile=config.jit_compile,
                program=False,
                steps_per_execution=config.steps_per_execution,
                listeners=keras.callbacks.CallbackList(list(callbacks), model=model),
                position=begin(model),
                after_call=after_call,
            )
        return model, history

    def augmented(self, count: int) -> "Iterator[np.ndarray]":
        """Yields the first training images as the augmentation makes them in the first epoch."""
        if not self.augmentation:
            return
        numbers = np.arange(min(count, len(self.train)))
        drawn = self.augmentation.draw(numbers, self.config.seed, 0)
        for (x, _), rows in zip(self.train.batches(numbers, 1), drawn, strict=True):
            yield self.augmentation(x, rows[np.newaxis])[0].numpy().astype(np.uint8)

    def release(self) -> None:
        """Forgets the training images."""
        del self.train, self.measured

    def predictions(
        self, model: keras.Model, *, batch_size: int, after_batch: Callable[[], None]
    ) -> Predictions:
        """Returns what a trained model predicts for the images that judge it."""
        return predict(model, self.test_set, batch_size=batch_size, after_batch=after_batch)


def predict(
    model: keras.Model,
    data: Dataset,
    *,
    batch_size: int,
    after_batch: Callable[[], None] = lambda: None,
) -> Predictions:
    """Returns what a model predicts for a data set.

    Args:
        model: A model of ``registry.build``, on one device.
        data: Images with class numbers.
        batch_size: Images in one forward pass.
        after_batch: Called after each batch; what it raises ends the prediction.

    Raises:
        DataError: A picture cannot be read.
        NotFiniteError: A probability is NaN or infinite.
    """
    forward = predictor(model)
    labels, probabilities = [], []
    with reading_errors(data):
        for x, y in data.batches(np.arange(len(data)), batch_size).prefetch(tf.data.AUTOTUNE):
            labels.append(y.numpy())
            probabilities.append(forward(x))
            after_batch()
    return Predictions(
        np.concatenate(labels),
        np.concatenate(probabilities),
        _Pictures(data),
        tuple(data.classes or ()),
    )


def predictor(model: keras.Model) -> Callable[[tf.Tensor | np.ndarray], np.ndarray]:
    """Returns a function that predicts the probabilities of one batch of images.

    Args:
        model: A model of ``registry.build``, on one device.

    Returns:
        A function from images of the dtype that the model was trained on to float32 (n, classes).
        It raises NotFiniteError where a probability is NaN or infinite.
    """
    forward = tf.function(lambda images: model(images, training=False), autograph=False)

    def predict(images: tf.Tensor | np.ndarray) -> np.ndarray:
        predicted = forward(tf.convert_to_tensor(images)).numpy().astype(np.float32)
        if not np.isfinite(predicted).all():
            raise NotFiniteError(
                "Expected finite probabilities. Received: NaN or infinity from the network. Train "
                "the model again, with a smaller learning_rate."
            )
        return predicted

    return predict


def _on_devices(
    data: Dataset,
    strategy: tf.distribute.Strategy,
    augment: Augmentation | None = None,
) -> tuple[Dataset, Callable[[Any], tf.Tensor] | None]:
    """Places a data set on the devices, if it is one of arrays that fit there; returns what is fed,
    and what makes the inputs of that in the step.
    """
    placed = resident.place(data, strategy) if _in_memory(data) else None
    gather = placed.inputs if placed else None
    if not augment:
        return placed or data, gather

    def inputs(pair: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        given, drawn = pair
        return augment(gather(given) if gather else given, drawn)

    return placed or data, inputs


def _in_memory(data: Dataset) -> bool:
    """Tells whether a data set is one of arrays."""
    while isinstance(data, (Subset, OneHot)):
        data = data.dataset
    return isinstance(data, ArrayDataset)


class _Pictures:
    """The images of a data set by their numbers."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        numbers = np.asarray(numbers, np.int64)
        if not len(numbers):
            return np.empty((0, *self.data.spec[0].shape), np.uint8)
        [(x, _)] = self.data.batches(numbers, len(numbers))
        return x.numpy().round().astype(np.uint8)


def splits_of(digits: Digits) -> Splits:
    """Returns digits as a data set of images like any other."""
    classes = [str(number) for number in range(NUM_CLASSES)]

    def part(x: np.ndarray, y: np.ndarray) -> Dataset | None:
        if not len(x):
            return None
        return ArrayDataset((x[..., np.newaxis], y.astype(np.int32)), classes=classes)

    return Splits(part(digits.x_train, digits.y_train), part(digits.x_test, digits.y_test))


def limited(data: Dataset, name: str, limit: int | None, seed: int) -> Dataset:
    """Returns as many examples of a data set: the first ones; of data that are sorted by class
    some that the seed decides.
    """
    if limit is None:
        return data
    if limit > len(data):
        raise UsageError(
            f"{name} must be at most the {len(data)} examples there are. "
            f"Received: {name}={limit}. Leave it out to use them all."
        )
    numbers = np.arange(limit)
    if data.sorted_by_class:
        numbers = np.sort(epoch_order(len(data), seed, 0)[:limit])
    return Subset(data, numbers)
