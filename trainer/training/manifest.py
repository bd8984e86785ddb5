"""What decides the outcome of a run, down to its last bits: for its manifest, its checkpoints, and
the workers that train together.
"""

import os
import platform
import uuid
from pathlib import Path

import numpy as np

import trainer
from trainer.config import TrainConfig
from trainer.data.dataset import Digits
from trainer.runtime import keras, tf
from trainer.training.checkpoint import FREE_FIELDS


def gather(config: TrainConfig, source: Digits, digits: Digits, *, job: str | None) -> dict:
    """Returns the facts of a run that begins.

    Args:
        config: How it trains.
        source: The data, whole.
        digits: What the run uses of it.
        job: Its Job's UID, in a pod of Kubernetes.

    Returns:
        As JSON holds them: ``run``, its identity; ``job``; ``config``; ``data``, with its digest;
        ``versions``; ``environment``.
    """
    return {
        "run": uuid.uuid4().hex,
        "job": job,
        "config": config.as_dict(),
        "data": {
            "source": config.data,
            "sha256": source.sha256,
            "train_examples": len(digits.x_train),
            "test_examples": len(digits.x_test),
        },
        "versions": {
            "digits-trainer": trainer.__version__,
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
        },
        # What else changes the last bits of a result.
        "environment": {
            "processor": _processor(),
            "threads": config.threads,
            "TF_ENABLE_ONEDNN_OPTS": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "the processor's"),
        },
    }


def in_common(facts: dict) -> dict:
    """Returns what all workers of a run must have in common."""
    packages = {name: version for name, version in facts["versions"].items() if name != "python"}
    config = {name: value for name, value in facts["config"].items() if name not in FREE_FIELDS}
    return {**config, **packages, "data": facts["data"]["sha256"]}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
