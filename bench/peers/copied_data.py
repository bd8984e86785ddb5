"""Writes a data set of the training images several times over: not a peer, but what one is given.

    python bench/peers/copied_data.py mnist.npz 10 copied.npz

In a process of its own: memory that ``bench/compare.py`` took would count as its children's.
"""

import sys

import numpy as np

source, copies, target = sys.argv[1:]
with np.load(source) as data:
    arrays = dict(data)
for name in ("x_train", "y_train"):
    arrays[name] = np.concatenate([arrays[name]] * int(copies))
np.savez(target, **arrays)
