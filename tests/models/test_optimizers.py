import pytest

from trainer.config import TrainConfig
from trainer.models.optimizers import learning_rate_by_epoch, schedule


def test_one_cycle_warms_up_from_a_tenth_and_decays_to_zero():
    rate = schedule("one-cycle", peak=0.5, steps=100)
    values = [float(rate(step)) for step in range(101)]
    assert values[0] == pytest.approx(0.05)
    assert max(values) == values[30] == 0.5
    assert values[30:] == sorted(values[30:], reverse=True)
    assert values[65] == pytest.approx(0.25, rel=1e-3)  # half way down a cosine
    assert values[100] == 0
    assert float(schedule("one-cycle", peak=0.5, steps=1)(0)) == 0.5  # too short to rise
    assert schedule("constant", peak=0.5, steps=100) == 0.5


def test_the_learning_rate_of_an_epoch_is_that_of_its_last_step():
    config = TrainConfig(
        epochs=4, batch_size=10, optimizer="sgd", learning_rate=0.5, schedule="one-cycle"
    )
    rate = learning_rate_by_epoch(config, 245)  # 25 steps an epoch
    by_step = schedule("one-cycle", peak=0.5, steps=100)
    assert [rate(epoch) for epoch in range(4)] == [float(by_step(25 * n)) for n in (1, 2, 3, 4)]
    constant = TrainConfig(epochs=4, optimizer="sgd", learning_rate=0.5)
    assert learning_rate_by_epoch(constant, 245)(2) == 0.5
