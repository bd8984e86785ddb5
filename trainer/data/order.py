"""The order of the training examples, a function of seed and epoch alone.

    epoch_order(60000, seed=0, epoch=3)

It is the same on every worker and machine.
"""

import math

import numpy as np

from trainer.errors import UsageError

_NO_EPOCH = 2**32 - 1  # Of the order that decides a split: none that a run reaches.


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


def split_numbers(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of the examples that are kept, and of those that are held out: of a
    sorted data set, too, every class has its share of both.

    Args:
        n: Number of examples.
        share: Share that is held out.
        seed: Of the choice.

    Raises:
        UsageError: One part would be empty.

    >>> split_numbers(6, 0.5, seed=0)
    (array([0, 2, 5]), array([1, 3, 4]))
    """
    order = epoch_order(n, seed, _NO_EPOCH)
    kept = count_kept(n, share)
    return np.sort(order[:kept]), np.sort(order[kept:])


def count_kept(n: int, share: float) -> int:
    """Returns how many of n examples are left where a share is held out.

    Raises:
        UsageError: None, or all of them.
    """
    kept = math.floor(n * (1 - share))
    if not 0 < kept < n:
        raise UsageError(
            f"validation_split must leave examples on both sides. Received: {share} of {n}."
        )
    return kept
