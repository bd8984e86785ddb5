"""A run's checkpoints as ``trainer.training.run`` handles them, without the rest of a run."""

import dataclasses

from trainer.config import TrainConfig
from trainer.distributed.collectives import Workers
from trainer.runtime import tf
from trainer.training.checkpoint import Checkpointer, Checkpoints
from trainer.training.manifest import RunManifest
from trainer.training.resume import resume

MANIFEST = RunManifest(
    run="this run",
    job=None,
    config=TrainConfig(epochs=2).as_dict(),
    data={"sha256": "of the data"},
    versions={"tensorflow": "2.21.0"},
    environment={"threads": 1},
)


def manifest(**parts):
    """Returns a manifest with other values in some of its parts."""
    values = {
        name: {**getattr(MANIFEST, name), **value} if isinstance(value, dict) else value
        for name, value in parts.items()
    }
    return dataclasses.replace(MANIFEST, **values)


class Stopper:
    """Asks the run to stop at one of its calls, counted from 1; None: never."""

    def __init__(self, at=None):
        self.at = at
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return "SIGTERM" if self.calls == self.at else None


class Session:
    """A run that resumes what is in a folder, and saves its checkpoints there."""

    def __init__(
        self,
        folder,
        *,
        manifest=MANIFEST,
        policy="auto",
        finished_run=None,
        stop=None,
        notify=None,
        keep=3,
        strategy=None,
        **options,
    ):
        self.manifest = manifest
        self.notify = notify or (lambda text: None)
        self.checkpoints = Checkpoints(folder, keep=keep)
        self.workers = Workers(strategy or tf.distribute.get_strategy())
        self.policy = policy
        self.finished_run = finished_run
        self.options = {"every": "1000h", "stop": stop or Stopper(), **options}

    def begin(self, model):
        self.checkpoints.track(model)
        position, described = resume(
            self.checkpoints,
            model,
            self.manifest,
            policy=self.policy,
            finished_run=self.finished_run,
            workers=self.workers,
            notify=self.notify,
        )
        self.checkpointer = Checkpointer(
            self.checkpoints, described, position, workers=self.workers, **self.options
        )
        return position

    def after_call(self, position):
        self.checkpointer.after_call(position)
