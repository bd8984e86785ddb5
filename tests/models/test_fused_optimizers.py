"""The fused updates against Keras' own, and what happens where a release of Keras parts them."""

import numpy as np
import pytest

from trainer.models.fused_optimizers import find_problem, fused_update
from trainer.runtime import keras, tf

KINDS = {"adadelta": keras.optimizers.Adadelta, "adam": keras.optimizers.Adam}


def train(optimizer, steps=20):
    """Applies random gradients to two variables in float64; returns all that is then stored."""
    noise = np.random.default_rng(0)
    shapes = (3, 4), (5,)
    variables = [keras.Variable(noise.normal(size=s), dtype="float64", name="v") for s in shapes]
    optimizer.build(variables)
    with fused_update(optimizer) if optimizer.name == "fused" else keras.name_scope("stock"):
        for _ in range(steps):
            gradients = [tf.constant(noise.normal(size=shape)) for shape in shapes]
            optimizer.apply(gradients, variables)
    return [variable.numpy() for variable in (*variables, *optimizer.variables)]


@pytest.mark.parametrize("name", KINDS)
def test_fused_updates_are_keras_own_in_float64(name):
    stock, fused = (train(KINDS[name](0.1, name=kind)) for kind in ("stock", "fused"))
    for a, b in zip(fused, stock, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6 if name == "adam" else 1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["adadelta", "adam", "sgd", "lion"])
def test_with_this_keras_no_problem_is_found(name):
    assert find_problem.__wrapped__(name) == ""


def test_an_optimizer_is_fused_for_as_long_as_it_is_asked_for():
    for kind, fused in ((KINDS["adadelta"], True), (KINDS["adam"], True), (None, False)):
        optimizer = kind() if kind else keras.optimizers.Adam(amsgrad=True)
        with fused_update(optimizer):
            assert ("update_step" in vars(optimizer)) == fused
        assert "update_step" not in vars(optimizer)


def test_looking_for_a_problem_leaves_the_names_of_optimizers_alone():
    # Keras numbers them by process, and a model's file has the name.
    first = keras.optimizers.Adam().name
    find_problem.__wrapped__("adam")
    second = keras.optimizers.Adam().name
    count = int(first.partition("_")[2] or 0)
    assert second == f"adam_{count + 1}"


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        ("adadelta", "_accumulated_grads"),
        ("adadelta", "_accumulated_delta_vars"),
        ("adam", "_momentums"),
        ("adam", "_velocities"),
    ],
)
def test_a_renamed_slot_is_a_problem(monkeypatch, name, slot):
    build, update_step = KINDS[name].build, KINDS[name].update_step

    def renamed_build(self, variables):
        build(self, variables)
        self.renamed = getattr(self, slot)
        delattr(self, slot)

    def renamed_update_step(self, *values):
        vars(self)[slot] = self.renamed
        update_step(self, *values)
        del vars(self)[slot]

    monkeypatch.setattr(KINDS[name], "build", renamed_build)
    monkeypatch.setattr(KINDS[name], "update_step", renamed_update_step)
    assert slot in find_problem.__wrapped__(name)


@pytest.mark.parametrize("name", KINDS)
def test_a_changed_formula_is_a_problem(monkeypatch, name):
    update_step = KINDS[name].update_step

    def changed(self, gradient, variable, learning_rate):
        update_step(self, gradient, variable, 1.001 * learning_rate)

    monkeypatch.setattr(KINDS[name], "update_step", changed)
    assert "differs from that of Keras' update" in find_problem.__wrapped__(name)


def test_an_update_step_that_keras_does_not_call_is_a_problem(monkeypatch):
    def apply(self, gradients, variables):
        for gradient, variable in zip(gradients, variables, strict=True):
            type(self).update_step(self, gradient, variable.value, self.learning_rate)

    monkeypatch.setattr(KINDS["adadelta"], "apply", apply)
    assert "does not call update_step" in find_problem.__wrapped__("adadelta")
