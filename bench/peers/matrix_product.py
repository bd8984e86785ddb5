"""How fast the machine multiplies matrices: the limit of a step whose work is such products."""

import argparse
import json
import time

import tensorflow as tf

SIZE = 2048

parser = argparse.ArgumentParser()
parser.add_argument("--threads", type=int, default=2)
tf.config.threading.set_intra_op_parallelism_threads(parser.parse_args().threads)

a, b = (tf.random.normal((SIZE, SIZE)) for _ in range(2))
product = tf.function(lambda: tf.matmul(a, b))
product()
seconds = []
for _ in range(30):
    start = time.perf_counter()
    product()
    seconds.append(time.perf_counter() - start)
print(json.dumps({"event": "rate", "rate": 2 * SIZE**3 / min(seconds) / 1e9}))
