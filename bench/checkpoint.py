"""Measures what saving the position of a run costs, by make bench."""

import statistics
import tempfile
import time
from pathlib import Path

SAVES = 15


def main() -> None:
    from trainer.models import cnn
    from trainer.training import checkpoint
    from trainer.training.manifest import RunManifest
    from trainer.training.position import Position

    model = cnn.build(optimizer="adadelta", learning_rate=1.0, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        manifest = RunManifest(
            run="bench", job=None, config={}, data={}, versions={}, environment={}
        )
        checkpoints = checkpoint.Checkpoints(Path(folder), keep=3)
        checkpoints.track(model)
        position = Position()
        seconds = []
        for step in range(1, SAVES + 1):
            position.step = position.steps = step
            start = time.perf_counter()
            checkpoints.save(position, manifest)
            seconds.append(time.perf_counter() - start)
    print(
        f"a checkpoint: median {statistics.median(seconds):.3f} s, most {max(seconds):.3f} s; "
        f"every 60 s that is {statistics.median(seconds) / 60:.2%} of the time"
    )


if __name__ == "__main__":
    main()
