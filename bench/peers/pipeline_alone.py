"""The trainer's pipeline alone: batches of 128, taken as fast as they come."""

import json
import time

import work

from trainer.data import pipeline
from trainer.data.digits import Digits
from trainer.runtime import set_threads

flags = work.arguments()
set_threads(flags.threads)
digits = Digits(*work.load(flags))
for epoch in range(3):  # The last one counts.
    batches = pipeline.train_batches(
        digits.x_train, digits.y_train, batch_size=flags.batch_size, seed=0, epoch=epoch
    )
    start = time.perf_counter()
    for _ in batches:
        pass
    seconds = time.perf_counter() - start
print(json.dumps({"event": "rate", "rate": len(digits.x_train) / seconds}))
