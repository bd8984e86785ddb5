"""The call that stands where ``model.fit`` would, for a model and data of the user's own.

It is ``trainer.fit``, which has the defaults and the documentation.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer import files
from trainer.config import TrainConfig
from trainer.distributed import strategy as strategies
from trainer.distributed import worker_context
from trainer.distributed.collectives import Workers
from trainer.distributed.replica_variables import mirrored
from trainer.distributed.strategy import StrategyChoice
from trainer.distributed.worker import peer_errors
from trainer.distributed.worker_context import WorkerContext
from trainer.errors import ConfigurationError, StoppedError, UsageError
from trainer.runtime import keras, threads
from trainer.signals import Signals
from trainer.training import keras_model, loop
from trainer.training.callback_state import CallbackState
from trainer.training.checkpoint import Checkpointer, Checkpoints
from trainer.training.compiled import CompiledModel
from trainer.training.feed import Data, Feed, load, reading_errors, shard_of
from trainer.training.manifest import RunManifest
from trainer.training.position import Position
from trainer.training.resume import resume

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
    context = _context(config)
    _check_arguments(config, context, epochs=epochs, batch_size=batch_size)
    training, validation = load(
        data, validation_data, validation_split, class_weight, seed=config.seed
    )
    strategy = (context.choice if context else _create_strategy(config)).strategy
    workers = Workers(strategy)
    replicas = strategy.num_replicas_in_sync
    keras_model.check(model, replicas)
    shard = shard_of(workers)
    feed = Feed(training, batch_size, shard, seed=config.seed if shuffle else None)
    validation_batches = None
    if validation is not None:
        validation_feed = Feed(validation, batch_size, shard, seed=None)
        validation_batches = functools.partial(validation_feed, 0, 0)
    for notice in {part.notice for part in (training, validation) if part}:
        if notice and workers.index == 0:
            print(notice)
    keras_model.build(model, training.spec, batch_size)
    callbacks = list(callbacks)
    with contextlib.ExitStack() as held:
        signals = held.enter_context(Signals())
        manifest = None
        if output_dir is not None or context:  # Digests take time.
            arguments = {
                "epochs": epochs,
                "batch_size": batch_size,
                "shuffle": shuffle,
                "seed": config.seed,
            }
            digests = [training.digest, validation.digest if validation else None]
            manifest = _describe(model, arguments, digests, feed.steps, workers, context)
        if context and manifest:
            held.enter_context(_training(context))
            _check_same(manifest.config, manifest.data, workers)
        held.enter_context(mirrored(model, strategy))
        run = None
        if manifest and output_dir is not None:
            folder = Path(output_dir)
            if workers.index == 0:
                held.enter_context(files.lock_folder(folder))
            run = _Run(folder, model, callbacks, manifest, config, workers, signals)
        signals.defer()
        position = run.begin() if run else Position()
        verbose = 0 if workers.index else verbose
        listeners = _listeners(
            callbacks, model, workers, verbose, epochs=epochs, steps=feed.steps, add_history=True
        )
        if run:
            run.callbacks.set_model(model)
            listeners.callbacks.append(run.callbacks)  # After Keras' own, which reset themselves.
        held.callback(_close_files, callbacks)
        held.enter_context(reading_errors(training, validation))

        def after_call(position: Position) -> None:
            report = context.link.report_step if context else lambda epoch, step: None
            report(position.epoch + 1, position.step)
            if run:
                run.after_call(position)
            else:
                _stop(signals, workers, f"{position}. Nothing is saved: use output_dir")
            report(position.epoch + 1, position.step)  # Saving is not a step that hangs.

        loop.train(
            model,
            CompiledModel(model, strategy),
            feed,
            validation_batches,
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


def _describe(
    model: keras.Model,
    arguments: dict,
    digests: Sequence[str | None],
    steps: int,
    workers: Workers,
    context: WorkerContext | None,
) -> RunManifest:
    """Describes a run: what a run that resumes it, and all workers, must have, too."""
    return RunManifest.describe(
        config={**arguments, "model": keras_model.digest(model)},
        data={"sha256": hashlib.sha256(repr(digests).encode()).hexdigest(), "steps": steps},
        job=context.job if context else None,
        threads=threads(),
        step="keras",
        collectives="ring" if context and context.choice.ring else "tensorflow",
        workers=workers.count,
        replicas=workers.strategy.num_replicas_in_sync,
    )


def _listeners(
    callbacks: Sequence[keras.callbacks.Callback],
    model: keras.Model,
    workers: Workers,
    verbose: int | str,
    **options: Any,
) -> keras.callbacks.CallbackList:
    """Returns the callbacks of this worker: those that write files are worker 0's."""
    return keras.callbacks.CallbackList(
        [callback for callback in callbacks if not (workers.index and _writes(callback))],
        add_progbar=verbose != 0,
        model=model,
        verbose=verbose,
        **options,
    )


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
    try:
        with peer_errors():
            yield
    finally:  # The script may handle the error, and go on.
        context.link.tell("idle")


def _check_same(config: dict, data: dict, workers: Workers) -> None:
    """Compares what the workers are about to train, before any of them waits for the others.

    Raises:
        ConfigurationError: One of them trains something else; on all workers.
    """
    arguments = {name: value for name, value in config.items() if name != "model"}
    parts = {"model": config["model"], "data": data, "arguments": arguments}
    for name, value in parts.items():
        content = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
        if others := workers.differing(content):
            raise ConfigurationError(
                f"Expected the same {name} on all workers. Received: another one on worker "
                f"{', '.join(map(str, others))} than on worker 0. Make it there from the same "
                "files and seeds."
            )


def evaluate(
    model: keras.Model,
    data: Data,
    *,
    batch_size: int,
    callbacks: Sequence[keras.callbacks.Callback],
    verbose: int | str,
    config: TrainConfig,
) -> dict[str, float]:
    """Evaluates a compiled Keras model; arguments, result and errors as ``trainer.evaluate`` has
    them.
    """
    context = _context(config)
    _check_arguments(config, context, batch_size=batch_size)
    examples, _ = load(data, None, 0.0, None)
    strategy = (context.choice if context else _create_strategy(config)).strategy
    workers = Workers(strategy)
    keras_model.check(model, workers.strategy.num_replicas_in_sync)
    feed = Feed(examples, batch_size, shard_of(workers), seed=None)
    keras_model.build(model, examples.spec, batch_size)
    with contextlib.ExitStack() as held:
        signals = held.enter_context(Signals())
        if context:
            held.enter_context(_training(context))
            arguments = {"batch_size": batch_size, "model": keras_model.digest(model)}
            _check_same(arguments, {"sha256": examples.digest}, workers)
        held.enter_context(mirrored(model, strategy))
        signals.defer()
        verbose = 0 if workers.index else verbose
        listeners = _listeners(callbacks, model, workers, verbose, epochs=1, steps=feed.steps)
        held.enter_context(reading_errors(examples))

        def after_call() -> None:
            if context:
                context.link.report_step(1, 0)
            _stop(signals, workers, "an evaluation")

        return loop.measure(
            CompiledModel(model, strategy),
            feed(0, 0),
            strategy=strategy,
            listeners=listeners,
            steps_per_execution=config.steps_per_execution,
            after_call=after_call,
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


def _stop(signals: Signals, workers: Workers, where: str) -> None:
    """Ends on all workers at the same place what has no checkpoints."""
    numbers = workers.gather(getattr(signal, signals.received or "", 0))
    if number := next(filter(None, numbers), 0):
        raise StoppedError(f"stopped by {signal.Signals(number).name} at {where}.")


def _context(config: TrainConfig) -> WorkerContext | None:
    """Returns the other workers' context, unless the configuration is for this process alone."""
    return worker_context.current() if config.strategy in ("auto", "multiworker") else None


def _check_arguments(config: TrainConfig, context: WorkerContext | None, **numbers: int) -> None:
    default = TrainConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == getattr(default, field.name):
            continue
        if context and field.name in _OF_THE_PROCESS:
            raise UsageError(
                f"{field.name} is decided before several workers connect, by the command that runs "
                f"the script. Received: {field.name}={value!r}. Leave it out here."
            )
        if field.name not in _HOW:
            raise UsageError(
                f"Expected a configuration of how to train: {', '.join(_HOW)}. Received: "
                f"{field.name}={value!r}. Give it to fit or to model.compile, or leave it out."
            )
    for name, number in numbers.items():
        if not isinstance(number, (int, np.integer)) or isinstance(number, bool) or number < 1:
            raise UsageError(f"{name} must be an integer of at least 1. Received: {number!r}.")
