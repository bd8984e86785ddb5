"""Keras optimizers by name, and the learning rate of a run.

    optimizer = create("adam", learning_rate(config, examples=60000))

One-cycle warms up from 10% of the peak over the first 30% of the steps, then cosine-decays to 0.
"""

from collections.abc import Callable
from typing import TypeAlias

from trainer.config import Schedule, TrainConfig
from trainer.runtime import keras

LearningRate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule

WARM_UP = 0.3  # share of the steps in which the learning rate rises to its peak
START = 0.1  # initial learning rate, as a share of the peak


def create(name: str, learning_rate: LearningRate) -> keras.optimizers.Optimizer:
    """Returns Keras' optimizer of a name, with Keras' defaults for everything but the learning
    rate.

    Raises:
        ValueError: Keras has no optimizer of that name.
    """
    optimizer = keras.optimizers.get(name)
    return type(optimizer)(learning_rate=learning_rate)


def learning_rate(config: TrainConfig, examples: int) -> LearningRate:
    """Returns the learning rate that a configuration asks for, as Keras' optimizers take it.

    Args:
        config: The configuration of the run.
        examples: Number of training examples.
    """
    return schedule(
        config.schedule,
        peak=config.learning_rate,
        steps=config.epochs * _steps_per_epoch(config, examples),
    )


def schedule(kind: Schedule, *, peak: float, steps: int) -> LearningRate:
    """Returns a learning rate schedule over the steps of a run.

    Args:
        kind: ``constant``: ``peak`` in every step. ``one-cycle``: the policy of Smith and Topin,
            2017, https://arxiv.org/abs/1708.07120, with a cosine decay.
        peak: The highest learning rate.
        steps: Number of steps of the whole run.
    """
    if kind == "constant":
        return peak
    warm_up = int(WARM_UP * steps)
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=START * peak if warm_up else peak,
        decay_steps=steps - warm_up,
        warmup_target=peak if warm_up else None,
        warmup_steps=warm_up,
    )


def learning_rate_by_epoch(config: TrainConfig, examples: int) -> Callable[[int], float]:
    """Returns a function from an epoch, counted from 0, to the learning rate at its end."""
    rate, steps = learning_rate(config, examples), _steps_per_epoch(config, examples)
    return lambda epoch: float(rate((epoch + 1) * steps) if callable(rate) else rate)


def _steps_per_epoch(config: TrainConfig, examples: int) -> int:
    return -(-examples // config.batch_size)
