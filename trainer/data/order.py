"""The order of the training examples, a function of seed and epoch alone.

    epoch_order(60000, seed=0, epoch=3)

It is the same on every worker and machine.
"""

import numpy as np


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of an epoch: a permutation of 0 to n - 1, int64 (n,).

    The numbers are sorted by random 64-bit keys: Philox (Salmon et al., 2011,
    https://doi.org/10.1145/2063384.2063405) seeded by a SeedSequence. NumPy keeps both streams
    unchanged from version to version, which it does not promise for ``Generator.permutation``.

    >>> epoch_order(5, seed=0, epoch=0).tolist()
    [0, 3, 1, 2, 4]
    """
    keys = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(n)
    return np.argsort(keys, kind="stable")
