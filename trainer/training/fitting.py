"""The call that stands where ``model.fit`` would, for a model and data of the user's own.

It is ``trainer.fit``, which has the defaults and the documentation.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from trainer import files
from trainer.config import TrainConfig
from trainer.data import pipeline
from trainer.data.order import epoch_order
from trainer.distributed import strategy as strategies
from trainer.distributed import worker_context
from trainer.distributed.collectives import Workers
from trainer.distributed.replica_variables import mirrored
from trainer.distributed.strategy import StrategyChoice
from trainer.distributed.worker import peer_errors
from trainer.distributed.worker_context import WorkerContext
from trainer.errors import ConfigurationError, DataError, StoppedError, UsageError
from trainer.runtime import keras, tf, threads
from trainer.signals import Signals
from trainer.training import loop
from trainer.training.callback_state import CallbackState
from trainer.training.checkpoint import Checkpointer, Checkpoints
from trainer.training.compiled import CompiledModel
from trainer.training.manifest import RunManifest
from trainer.training.position import Position
from trainer.training.resume import resume

# An array, or a list, tuple or dictionary of them; all of one length, examples first.
Arrays: TypeAlias = Any
Data: TypeAlias = tuple[Arrays, ...]  # (x, y) or (x, y, sample_weight)

_MEANS = ("sum_over_batch_size", "mean")  # reductions of keras.losses.Loss

# Of a configuration; the others are about a model and data that are given here.
_HOW = (
    "seed",
    "strategy",
    "gpus",
    "steps_per_execution",
    "checkpoint_every",
    "keep_checkpoints",
    "resume",
    "startup_timeout",
)
_OF_THE_PROCESS = ("gpus", "startup_timeout")  # Decided before several workers connect.


def fit(
    model: keras.Model,
    data: Data,
    *,
    validation_data: Data | None,
    validation_split: float,
    epochs: int,
    batch_size: int,
    shuffle: bool,
    class_weight: Mapping[int, float] | None,
    callbacks: Sequence[keras.callbacks.Callback],
    verbose: int | str,
    output_dir: str | Path | None,
    config: TrainConfig,
) -> keras.callbacks.History:
    """Trains a compiled Keras model; arguments, result and errors as ``trainer.fit`` has them."""
    context = worker_context.current() if config.strategy in ("auto", "multiworker") else None
    _check_arguments(config, epochs, batch_size, validation_split, context)
    if validation_split:
        data, validation_data = _split(data, validation_split)
    data = _with_class_weight(data, class_weight)
    examples = _check_data("data", data)
    if validation_data is not None:
        _check_data("validation_data", validation_data)
    strategy = (context.choice if context else _create_strategy(config)).strategy
    workers = Workers(strategy)
    replicas = strategy.num_replicas_in_sync
    strategies.check_batch_size(batch_size, replicas)
    _check_model(model, replicas)
    for count in (examples, _length(validation_data or data)):
        if count % batch_size and count % batch_size < replicas:
            raise UsageError(
                f"The last batch must have an example for each of the {replicas} devices. "
                f"Received: {count % batch_size} of {count} examples, with "
                f"batch_size={batch_size}. Use another batch_size."
            )
    arrays = pipeline.tensors(data)
    validation = None
    if validation_data is not None:
        order = np.arange(_length(validation_data))
        validation = pipeline.batches(
            pipeline.tensors(validation_data), order, batch_size=batch_size
        )

    def train_data(epoch: int) -> tf.data.Dataset:
        order = epoch_order(examples, config.seed, epoch) if shuffle else np.arange(examples)
        return pipeline.batches(arrays, order, batch_size=batch_size)

    _build(model, train_data(0))
    callbacks = list(callbacks)
    with contextlib.ExitStack() as held:
        signals = held.enter_context(Signals())
        manifest = None
        if output_dir is not None or context:
            manifest = RunManifest.describe(
                config={
                    "epochs": epochs,
                    "batch_size": batch_size,
                    "shuffle": shuffle,
                    "seed": config.seed,
                    "model": _digest_of_model(model),
                },
                data={"sha256": _digest([data, validation_data or ()]), "train_examples": examples},
                job=context.job if context else None,
                threads=threads(),
                step="keras",
                collectives="ring" if context and context.choice.ring else "tensorflow",
                workers=workers.count,
                replicas=replicas,
            )
        if context and manifest:
            held.enter_context(_training(context))
            _check_same(manifest, workers)
        held.enter_context(mirrored(model, strategy))
        run = None
        if manifest and output_dir is not None:
            folder = Path(output_dir)
            if workers.index == 0:
                held.enter_context(files.lock_folder(folder))
            run = _Run(folder, model, callbacks, manifest, config, workers, signals)
        signals.defer()
        position = run.begin() if run else Position()
        if workers.index:
            verbose = 0
        listeners = keras.callbacks.CallbackList(
            [callback for callback in callbacks if not (workers.index and _writes(callback))],
            add_history=True,
            add_progbar=verbose != 0,
            model=model,
            verbose=verbose,
            epochs=epochs,
            steps=math.ceil(examples / batch_size),
        )
        if run:
            run.callbacks.set_model(model)
            listeners.callbacks.append(run.callbacks)  # After Keras' own, which reset themselves.
        held.callback(_close_files, callbacks)

        def after_call(position: Position) -> None:
            report = context.link.report_step if context else lambda epoch, step: None
            report(position.epoch + 1, position.step)
            if run:
                run.after_call(position)
            else:
                _stop(signals, workers, position)
            report(position.epoch + 1, position.step)  # Saving is not a step that hangs.

        loop.train(
            model,
            CompiledModel(model, strategy),
            train_data,
            validation,
            strategy=strategy,
            epochs=epochs,
            jit_compile=model.jit_compile is True,
            program=False,
            steps_per_execution=config.steps_per_execution,
            listeners=listeners,
            verbose=verbose,
            position=position,
            after_call=after_call,
        )
        if run and workers.index == 0:
            run.checkpoints.delete_all()
    return model.history


def _create_strategy(config: TrainConfig) -> StrategyChoice:
    return strategies.create(
        config.strategy,
        cluster=None,
        gpus=config.gpus,
        collectives="tensorflow",
        startup_timeout=config.startup_timeout,
    )


@contextlib.contextmanager
def _training(context: WorkerContext) -> Iterator[None]:
    """Tells the parent process when steps are to be expected; names the errors of a lost peer."""
    context.link.tell("training")
    with peer_errors():
        yield
    context.link.tell("idle")


def _check_same(manifest: RunManifest, workers: Workers) -> None:
    """Compares what the workers are about to train, before any of them waits for the others.

    Raises:
        ConfigurationError: One of them trains something else; on all workers.
    """
    config = dict(manifest.config)
    parts = {"model": config.pop("model"), "data": manifest.data, "arguments": config}
    for name, value in parts.items():
        content = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
        if others := workers.differing(content):
            raise ConfigurationError(
                f"Expected the same {name} on all workers. Received: another one on worker "
                f"{', '.join(map(str, others))} than on worker 0. Make it there from the same "
                "files and seeds."
            )


class _Run:
    """The checkpoints of a run."""

    def __init__(
        self,
        folder: Path,
        model: keras.Model,
        callbacks: Sequence[keras.callbacks.Callback],
        manifest: RunManifest,
        config: TrainConfig,
        workers: Workers,
        signals: Signals,
    ) -> None:
        self.model = model
        self.manifest = manifest
        self.config = config
        self.workers = workers
        self.signals = signals
        self.checkpoints = Checkpoints(folder, keep=config.keep_checkpoints)
        self.callbacks = CallbackState(callbacks)
        self.checkpoints.track(model, extra=self.callbacks.dumps)

    def begin(self) -> Position:
        """Restores the unfinished run, if there is one."""
        position, manifest = resume(
            self.checkpoints,
            self.model,
            self.manifest,
            policy=self.config.resume,
            finished_run=None,
            workers=self.workers,
            notify=print if self.workers.index == 0 else lambda text: None,
        )
        self.checkpointer = Checkpointer(
            self.checkpoints,
            manifest,
            position,
            every=self.config.checkpoint_every,
            stop=lambda: self.signals.received,
            workers=self.workers,
        )
        if position.steps:
            self.callbacks.resume(self.checkpoints.extra.numpy(), position.epoch)
        return dataclasses.replace(position)

    def after_call(self, position: Position) -> None:
        """Saves a checkpoint if one is due."""
        self.checkpointer.after_call(position)


def _close_files(callbacks: Sequence[keras.callbacks.Callback]) -> None:
    """Closes what only the end of a training closes."""
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.CSVLogger) and callback.csv_file:
            callback.csv_file.close()


def _writes(callback: keras.callbacks.Callback) -> bool:
    """Tells whether all that a callback does is to write files, which worker 0 alone does."""
    kinds = keras.callbacks
    return isinstance(callback, (kinds.ModelCheckpoint, kinds.CSVLogger, kinds.TensorBoard))


def _stop(signals: Signals, workers: Workers, position: Position) -> None:
    """Ends a run that has no folder, on all workers at the same position."""
    numbers = workers.gather(getattr(signal, signals.received or "", 0))
    if number := next(filter(None, numbers), 0):
        raise StoppedError(
            f"stopped by {signal.Signals(number).name} at {position}. Nothing is saved: use "
            "output_dir."
        )


def _check_arguments(
    config: TrainConfig,
    epochs: int,
    batch_size: int,
    validation_split: float,
    context: WorkerContext | None,
) -> None:
    default = TrainConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == getattr(default, field.name):
            continue
        if context and field.name in _OF_THE_PROCESS:
            raise UsageError(
                f"{field.name} is the command's where there are several workers. Received: "
                f"{field.name}={value!r}. Leave it out, and use python -m trainer.script "
                f"--{field.name.replace('_', '-')}."
            )
        if field.name not in _HOW:
            raise UsageError(
                f"Expected a configuration of how to train: {', '.join(_HOW)}. Received: "
                f"{field.name}={value!r}. Give it to fit or to model.compile, or leave it out."
            )
    for name, number in (("epochs", epochs), ("batch_size", batch_size)):
        if not isinstance(number, (int, np.integer)) or isinstance(number, bool) or number < 1:
            raise UsageError(f"{name} must be an integer of at least 1. Received: {number!r}.")
    if not 0 <= validation_split < 1:
        raise UsageError(
            f"validation_split must be from 0 to less than 1. Received: {validation_split!r}."
        )


def _check_model(model: keras.Model, replicas: int) -> None:
    """Raises ``ConfigurationError`` for a model that would be trained otherwise than it says."""
    if not getattr(model, "compiled", False) or model.optimizer is None:
        raise ConfigurationError(
            "Expected a model that is compiled with an optimizer. Received: one that is not. Call "
            "model.compile first."
        )
    own = ["train_step", "test_step"]
    if replicas > 1:
        own += ["compute_loss"]
    for name in own:
        if getattr(type(model), name) is not getattr(keras.Model, name):
            raise ConfigurationError(
                f"Expected a model with Keras' own {name}. Received: {type(model).__name__} with "
                "one of its own, which would not be called. Use a loss, compute_metrics and "
                "add_loss in its place."
            )
    if model.run_eagerly:
        raise ConfigurationError(
            "Expected a model that can be compiled into a graph. Received: run_eagerly=True. "
            "Use model.compile(run_eagerly=False), and model.fit to debug it."
        )
    if any(
        isinstance(variable.value, tf.distribute.DistributedValues) for variable in model.variables
    ):
        raise ConfigurationError(
            "Expected a model that was made outside of any tf.distribute strategy. Received: one "
            "of a strategy's scope. Leave the scope out: config=TrainConfig(strategy=...) says "
            "what to train under."
        )
    for loss in keras.tree.flatten(getattr(model, "loss", None)) if replicas > 1 else []:
        if isinstance(loss, keras.losses.Loss) and loss.reduction not in _MEANS:
            raise ConfigurationError(
                f"Expected losses that are means over a batch, for {replicas} devices. Received: "
                f"{type(loss).__name__} with reduction={loss.reduction!r}. Use "
                "reduction='sum_over_batch_size'."
            )


def _build(model: keras.Model, batches: tf.data.Dataset) -> None:
    """Makes all variables of a model, its metrics and its optimizer, as ``model.fit`` does."""
    model._symbolic_build(data_batch=next(iter(batches)))


def _with_class_weight(data: Data, class_weight: Mapping[int, float] | None) -> Data:
    """Returns the data with the sample weights that class weights stand for, as in Keras."""
    if class_weight is None:
        return data
    if len(data) != 2 or isinstance(data[1], (list, tuple, dict)):
        raise UsageError(
            "class_weight is for one output, without sample weights. Received: "
            f"{'sample weights, too' if len(data) > 2 else 'several outputs'}. Multiply the "
            "weights yourself, and give them as sample_weight."
        )
    x, y = data
    labels = np.asarray(y)
    if labels.ndim > 1 and labels.shape[-1] > 1:
        labels = labels.argmax(axis=-1)
    labels = labels.reshape(len(labels), -1)[:, 0]
    weight = np.ones(len(labels), keras.config.floatx())
    for number, value in class_weight.items():
        weight[np.round(labels) == number] = value
    return x, y, weight


def _split(data: Data, share: float) -> tuple[Data, Data]:
    """Returns the data without its last examples, and those."""
    count = _check_data("data", data)
    kept = math.floor(count * (1 - share))
    if not 0 < kept < count:
        raise UsageError(
            f"validation_split must leave examples on both sides. Received: {share} of {count}."
        )
    first = keras.tree.map_structure(lambda array: array[:kept], data)
    return first, keras.tree.map_structure(lambda array: array[kept:], data)


def _check_data(name: str, data: Data) -> int:
    """Returns the number of examples.

    Raises:
        DataError: Arrays differ in it, or there are none.
        UsageError: It is no tuple ``(x, y)`` or ``(x, y, sample_weight)``.
    """
    if not isinstance(data, tuple) or len(data) not in (2, 3):
        raise UsageError(
            f"{name} must be (x, y) or (x, y, sample_weight). Received: {type(data).__name__}"
            f"{f' of {len(data)}' if isinstance(data, tuple) else ''}."
        )
    arrays = [np.asarray(array) for array in keras.tree.flatten(data)]
    for array in arrays:
        if array.dtype == object or not array.ndim:
            raise DataError(
                f"Expected arrays of numbers, examples first, in {name}. Received: "
                f"{f'objects of shape {array.shape}' if array.ndim else 'one number'}. Rows of "
                "different lengths need padding."
            )
    counts = {len(array) for array in arrays}
    if len(counts) != 1 or not max(counts):
        raise DataError(
            f"Expected arrays of one length in {name}. Received: {sorted(counts)} examples."
        )
    return counts.pop()


def _length(data: Data) -> int:
    return len(keras.tree.flatten(data)[0])


def _digest(value: Any) -> str:
    """Returns the SHA-256 of arrays in any structure: their places, types, shapes and bytes."""
    digest = hashlib.sha256()
    for path, array in keras.tree.flatten_with_path(value):
        array = np.ascontiguousarray(array)
        digest.update(f"{path} {array.dtype.str} {array.shape} ".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _digest_of_model(model: keras.Model) -> str:
    """Returns a SHA-256 of what decides whether the variables of one model fit another. The names
    of layers and optimizers do not: Keras numbers them, and goes on counting in a process that
    makes two models.
    """
    variables = [
        (variable.name.rstrip("0123456789_"), list(variable.shape), variable.dtype)
        for variable in model.variables
    ]
    optimizer = _without_names(keras.optimizers.serialize(model.optimizer))
    text = json.dumps([variables, optimizer], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_names(item) for key, item in value.items() if key != "name"}
    return value
