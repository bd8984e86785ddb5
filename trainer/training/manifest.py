"""The run manifest: identity, configuration, data, versions and environment of a run.

It is part of mnist.json and of each checkpoint; workers compare theirs before they train together.
"""

import dataclasses
import os
import platform
import uuid

import numpy as np

import trainer
from trainer import machine
from trainer.config import TrainConfig, fixed_fields
from trainer.runtime import ONEDNN, deciding_variables, keras, tf


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunManifest:
    """A JSON-serializable description of a run, made once, before its workers connect.

    Attributes:
        run: Identity of the run: a random hexadecimal number, the same after a resume.
        job: UID of the Kubernetes Job it is trained by; None outside one.
        config: The fields of its ``TrainConfig``.
        data: ``source``, ``sha256`` of the whole source, and the numbers of examples used,
            ``train_examples`` and ``test_examples``; where there are some, those of
            ``validation_examples``, and of other images than digits the ``classes`` and the
            ``shape``.
        versions: Versions of Python and of the packages that compute.
        environment: What else the last bits of results depend on: processor, threads, oneDNN,
            other environment variables that are set, collectives, the training step, and the
            numbers of workers and replicas.
    """

    run: str
    job: str | None
    config: dict
    data: dict
    versions: dict
    environment: dict

    @classmethod
    def create(
        cls,
        config: TrainConfig,
        *,
        data: dict,
        step: str,
        workers: int,
        replicas: int,
        job: str | None = None,
    ) -> "RunManifest":
        """Describes a new run.

        Args:
            config: Its configuration.
            data: As ``Workload.data``.
            step: Name of the training step: ``models.fast_step.StepChoice.name``.
            workers: Number of workers.
            replicas: Number of replicas, over all workers.
            job: UID of the Kubernetes Job; None outside one.
        """
        return cls.describe(
            config=config.as_dict(),
            data=data,
            job=job,
            threads=config.threads,
            step=step,
            collectives=config.collectives,
            workers=workers,
            replicas=replicas,
        )

    @classmethod
    def describe(
        cls, *, config: dict, data: dict, job: str | None, threads: int, **environment: str | int
    ) -> "RunManifest":
        """Describes a new run, in the words of its fields.

        Args:
            config: What a run that resumes it must have, too; ``epochs`` among it.
            data: With ``sha256``.
            job: UID of the Kubernetes Job; None outside one.
            threads: Number of TensorFlow's threads.
            environment: ``step``, ``collectives``, ``workers`` and ``replicas``.
        """
        return cls(
            run=uuid.uuid4().hex,
            job=job,
            config=config,
            data=data,
            versions={"python": platform.python_version(), **package_versions()},
            environment={
                "processor": machine.processor(),
                "threads": threads,
                "TF_ENABLE_ONEDNN_OPTS": ONEDNN,
                "variables": deciding_variables(os.environ),
                **environment,
            },
        )

    def shared_by_workers(self) -> dict:
        """Returns, by name, what must be equal on all workers of a run."""
        return {
            **{name: self.config[name] for name in fixed_fields()},
            **package_versions(),
            "data": self.data["sha256"],
            "step": self.environment["step"],
            "collectives": self.environment["collectives"],
        }

    def as_dict(self) -> dict:
        """Returns the fields as JSON can hold them."""
        return dataclasses.asdict(self)


def package_versions() -> dict[str, str]:
    """Returns the versions of this package and of those that compute, which all workers must
    share.
    """
    return {
        "digits-trainer": trainer.__version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
    }
