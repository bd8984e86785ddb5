import pytest

from trainer.config import TrainConfig
from trainer.errors import UsageError
from trainer.models import optimizers
from trainer.models.optimizers import learning_rate_by_epoch, schedule
from trainer.recipes import LEARNING_RATES
from trainer.runtime import keras


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


@pytest.mark.parametrize("name", sorted(LEARNING_RATES))
def test_every_optimizer_of_keras_is_known_by_its_name(name):
    optimizer = optimizers.create(name, 0.5)
    assert type(optimizer).__name__.lower() == name
    assert float(optimizer.learning_rate) == 0.5


def test_no_optimizer_of_keras_is_missing():
    special = {"lossscaleoptimizer", "multioptimizer", "optimizer", "optimizermap"}
    theirs = {
        name.lower()
        for name, kind in vars(keras.optimizers).items()
        if isinstance(kind, type) and issubclass(kind, keras.optimizers.Optimizer)
    }
    assert theirs - special - LEARNING_RATES.keys() <= {"schedulefreeadamw"}


def test_an_optimizer_has_its_parameters():
    optimizer = optimizers.create("adamw weight_decay=0.05 clipnorm=1 use_ema=True", 0.1)
    assert (optimizer.weight_decay, optimizer.clipnorm, optimizer.use_ema) == (0.05, 1, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sgd beta_1=0.5", "optimizer=sgd has the parameters momentum, .*Received: beta_1"),
        ("sgd learning_rate=1", "Received: learning_rate. Give it as learning_rate."),
        ("sgd momentum=2", "optimizer=sgd must have values that Keras takes"),
        ("sgd clipnorm=1 clipvalue=1", "must have values that Keras takes"),
    ],
)
def test_parameters_that_an_optimizer_does_not_have_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        optimizers.create(text, 0.1)


def rates(text, steps=100, steps_per_epoch=10):
    rate = optimizers.schedule(text, peak=0.5, steps=steps, steps_per_epoch=steps_per_epoch)
    return [float(rate(step)) for step in range(steps + 1)]


def test_cosine_warms_up_from_zero_and_decays_to_a_share():
    found = rates("cosine warmup=0.1 alpha=0.2")
    assert found[0] == 0
    assert found[5] == pytest.approx(0.25)
    assert max(found) == found[10] == pytest.approx(0.5)
    assert found[55] == pytest.approx((0.5 + 0.1) / 2)
    assert found[100] == pytest.approx(0.1)
    assert rates("cosine")[0] == pytest.approx(0.5)


def test_exponential_decays_by_a_share_in_each_epoch():
    found = rates("exponential decay_rate=0.8")
    assert [found[step] for step in (0, 10, 100)] == pytest.approx([0.5, 0.4, 0.5 * 0.8**10])


def test_polynomial_decays_to_a_share_of_the_peak():
    found = rates("polynomial end=0.1 power=2")
    assert [found[step] for step in (0, 50, 100)] == pytest.approx([0.5, 0.45 / 4 + 0.05, 0.05])
