"""What a run is made of before it trains: strategy, training step, and run manifest.

assembly = assemble(config, workload, cluster=None, link=None, job=None)
assembly.strategy, assembly.step, assembly.manifest
"""

import dataclasses
from typing import NamedTuple

from trainer.config import TrainConfig
from trainer.distributed import strategy as strategies
from trainer.distributed.cluster import Cluster
from trainer.distributed.collectives import Workers
from trainer.distributed.strategy import StrategyChoice
from trainer.distributed.worker import Link
from trainer.errors import ConfigurationError
from trainer.models import fast_step
from trainer.models.fast_step import StepChoice
from trainer.runtime import tf
from trainer.training.manifest import RunManifest
from trainer.training.workload import Workload


class Assembly(NamedTuple):
    """What a run has chosen before it trains."""

    strategy: StrategyChoice
    step: StepChoice
    manifest: RunManifest


def assemble(
    config: TrainConfig,
    workload: Workload,
    *,
    cluster: Cluster | None,
    link: Link | None,
    job: str | None,
) -> Assembly:
    """Chooses strategy and step, makes the run manifest, and waits for the other workers.

    Args:
        config: The run's.
        workload: What is trained; it is prepared.
        cluster: The workers of the run; None: this process trains alone.
        link: To the parent process, which each of several workers has.
        job: UID of the Kubernetes Job; None outside one.

    Raises:
        ConfigurationError: The devices or workers that were asked for do not exist, or the training
            step does not work on one of the workers.
    """

    def describe(step: StepChoice, workers: int, replicas: int) -> RunManifest:
        return RunManifest.create(
            config,
            data=workload.data,
            step=step.name,
            workers=workers,
            replicas=replicas,
            job=job,
        )

    if cluster is None:
        choice = create_strategy(config)
        found = workload.find_step(accelerator=strategies.has_accelerator())
        step = _verify_step(found, config, choice.strategy)
        workload.prepare(choice.strategy)
        return Assembly(choice, step, describe(step, 1, choice.strategy.num_replicas_in_sync))
    # What each worker is about to do is compared before TensorFlow connects them: it would wait
    # for one that does something else, with Python's lock held.
    gpus = strategies.count_gpus(config.gpus)
    found = workload.find_step(accelerator=gpus > 0)
    workers = len(cluster.workers)
    manifest = describe(found, workers, workers * max(gpus, 1))
    if link:
        link.meet(manifest.shared_by_workers())
    choice = create_strategy(config, cluster)
    if link:
        link.tell("connected")
    step = _verify_step(found, config, choice.strategy)
    _check_all_workers(found, step, choice.strategy)
    workload.prepare(choice.strategy)
    manifest = dataclasses.replace(manifest, data=workload.data)
    return Assembly(choice, step, manifest)


def create_strategy(config: TrainConfig, cluster: Cluster | None = None) -> StrategyChoice:
    """Creates the strategy that a configuration asks for."""
    return strategies.create(
        config.strategy,
        cluster=cluster,
        gpus=config.gpus,
        collectives=config.collectives,
        startup_timeout=config.startup_timeout,
    )


def choose_step(config: TrainConfig, strategy: tf.distribute.Strategy) -> StepChoice:
    """Chooses the training step that a configuration asks for, and verifies it."""
    found = find_step(config, accelerator=strategies.has_accelerator())
    return _verify_step(found, config, strategy)


def find_step(config: TrainConfig, *, accelerator: bool) -> StepChoice:
    """Tells which training step a configuration asks for, before it is verified."""
    # XLA cannot compile the fast step, and it computes in float32.
    unfit = config.jit_compile or config.precision == "mixed_bfloat16"
    return fast_step.find("off" if unfit else config.fast, accelerator=accelerator)


def _verify_step(
    step: StepChoice, config: TrainConfig, strategy: tf.distribute.Strategy
) -> StepChoice:
    return step.verify(
        optimizer=config.optimizer_name,
        threads=config.threads,
        replicas=Workers(strategy).local_replicas,
    )


def _check_all_workers(
    found: StepChoice, verified: StepChoice, strategy: tf.distribute.Strategy
) -> None:
    """Raises on all workers if the step failed its check on one, whose bits would differ."""
    failed = Workers(strategy).gather(int(verified.name != found.name))
    if any(failed):
        reason = f" ({verified.reason})" if verified.reason else ""
        raise ConfigurationError(
            f"Expected the training step {found.name} to work on every worker. Received: worker "
            f"{failed.index(1)}, on which it does not{reason}. Use fast='off'."
        )
