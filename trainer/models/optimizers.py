"""Keras optimizers by name, and the learning rate of a run.

    optimizer = create("adam", learning_rate(config, examples=60000))

One-cycle warms up from 10% of the peak over the first 30% of the steps, then cosine-decays to 0.
"""

import inspect
from collections.abc import Callable
from typing import TypeAlias

from trainer.config import TrainConfig
from trainer.errors import UsageError
from trainer.parameters import parse
from trainer.runtime import keras

LearningRate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule

WARM_UP = 0.3  # share of the steps in which the learning rate rises to its peak
START = 0.1  # initial learning rate, as a share of the peak


def create(text: str, learning_rate: LearningRate) -> keras.optimizers.Optimizer:
    """Returns Keras' optimizer of a name, with Keras' defaults for what is not given.

    Args:
        text: The name and its parameters: ``adamw weight_decay=0.05``.
        learning_rate: Its learning rate, or a schedule of it.

    Raises:
        UsageError: It has no such parameter, or not with that value.
        ValueError: Keras has no optimizer of that name.
    """
    name, parameters = parse(text)
    # Keras' get knows no lamb (3.15). It makes an optimizer, which is why Keras numbers this one:
    # its name, adadelta_1, is in mnist.h5.
    kind = keras.optimizers.Lamb if name == "lamb" else type(keras.optimizers.get(name))
    known = [
        parameter
        for parameter in inspect.signature(kind).parameters
        if parameter not in ("learning_rate", "name", "kwargs")
    ]
    if others := [parameter for parameter in parameters if parameter not in known]:
        raise UsageError(
            f"optimizer={name} has the parameters {', '.join(known)}. Received: "
            f"{', '.join(others)}. "
            + (
                "Give it as learning_rate."
                if others == ["learning_rate"]
                else "Leave it out, or use one of them."
            )
        )
    try:
        return kind(learning_rate=learning_rate, **parameters)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"optimizer={name} must have values that Keras takes. Received: {text}: "
            f"{' '.join(str(error).split())}. Correct them, or leave them out."
        ) from error


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
        steps_per_epoch=_steps_per_epoch(config, examples),
    )


def schedule(text: str, *, peak: float, steps: int, steps_per_epoch: int = 1) -> LearningRate:
    """Returns a learning rate schedule over the steps of a run.

    Args:
        text: Name and parameters. ``constant``: ``peak`` in every step. ``one-cycle``: the policy
            of Smith and Topin, 2017, https://arxiv.org/abs/1708.07120, with a cosine decay.
            ``cosine``: from 0 to ``peak`` over a share ``warmup`` of the steps, then along a cosine
            to ``alpha`` of it, as Loshchilov and Hutter, 2017, https://arxiv.org/abs/1608.03983,
            without restarts. ``exponential``: by ``decay_rate`` in each epoch. ``polynomial``: to
            ``end`` of the peak, of degree ``power``.
        peak: The highest learning rate.
        steps: Number of steps of the whole run.
        steps_per_epoch: Number of steps of an epoch.
    """
    kind, parameters = parse(text)
    values = {name: float(value or 0) for name, value in parameters.items()}
    schedules = keras.optimizers.schedules
    if kind == "constant":
        return peak
    if kind == "cosine":
        warm_up = int(values.get("warmup", 0.0) * steps)
        return schedules.CosineDecay(
            initial_learning_rate=0.0 if warm_up else peak,
            decay_steps=max(steps - warm_up, 1),
            alpha=values.get("alpha", 0.0),
            warmup_target=peak if warm_up else None,
            warmup_steps=warm_up,
        )
    if kind == "exponential":
        rate = values.get("decay_rate", 0.9)
        return schedules.ExponentialDecay(peak, steps_per_epoch, rate)
    if kind == "polynomial":
        end, power = values.get("end", 0.0) * peak, values.get("power", 1.0)
        return schedules.PolynomialDecay(peak, steps, end, power)
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
