"""Measures what saving the position of a run costs, by make bench."""

import statistics
import tempfile
import time
from pathlib import Path

SAVES = 15


def main() -> None:
    from trainer.distributed.collectives import Workers
    from trainer.models import cnn
    from trainer.runtime import tf
    from trainer.training import checkpoint

    model = cnn.build(optimizer="adadelta", learning_rate=1.0, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        keeper = checkpoint.Keeper(
            Path(folder),
            {"run": "bench"},
            finished_run=None,
            resume="auto",
            every="1",
            keep=3,
            stop=lambda: None,
            workers=Workers(tf.distribute.get_strategy()),
            warn=print,
        )
        position = keeper.restore(model)
        seconds = []
        for step in range(1, SAVES + 1):
            position.step = position.steps = step
            start = time.perf_counter()
            keeper.after_call(position)
            seconds.append(time.perf_counter() - start)
    print(
        f"a checkpoint: median {statistics.median(seconds):.3f} s, most {max(seconds):.3f} s; "
        f"every 60 s that is {statistics.median(seconds) / 60:.2%} of the time"
    )


if __name__ == "__main__":
    main()
