import numpy as np
import pytest

from trainer.data.order import epoch_order


def test_the_order_stays_what_it_was():
    # Golden: a run that is resumed by a newer version goes on in this order. It may change only
    # with a note in the CHANGELOG that runs cannot be resumed across it.
    assert epoch_order(10, seed=7, epoch=3).tolist() == [7, 1, 9, 6, 0, 4, 2, 8, 3, 5]


def test_the_whole_set_is_shuffled():
    order = epoch_order(60000, seed=0, epoch=0)
    # An example moves by a third of the set on average; with a window of k, by about k.
    assert np.abs(order - np.arange(60000)).mean() == pytest.approx(20000, rel=0.02)


def test_every_order_is_about_as_likely():
    counts = {}
    for epoch in range(2400):
        order = tuple(epoch_order(4, seed=5, epoch=epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    expected = 2400 / 24
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert len(counts) == 24
    assert chi_square < 49.7  # the 0.1% point of 23 degrees of freedom
