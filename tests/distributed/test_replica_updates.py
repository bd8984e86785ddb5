"""Several replicas update the weights as one does, whatever the optimizer does with gradients.

Each run is a process of its own (``support.Replicas``).
"""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def one(shared_replicas):
    return shared_replicas.compute("optimized")


def assert_alike(several, one):
    """Compares every copy of every variable."""
    assert several.keys() == one.keys()
    for name, variables in one.items():
        for copies, (expected,) in zip(several[name], variables, strict=True):
            for copy in copies:
                np.testing.assert_allclose(copy, expected, rtol=1e-12, atol=1e-15, err_msg=name)


@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.full)])
def test_any_optimizer_updates_replicas_as_one_device(replicas, one, jit_compile):
    assert_alike(replicas.compute("optimized", devices=2, jit_compile=jit_compile), one)


@pytest.mark.full
def test_any_optimizer_updates_workers_as_one_device(replicas, one):
    for worker in replicas.compute_together("optimized", [{}] * 2):
        assert_alike(worker, one)


def test_a_gradient_that_is_not_finite_skips_the_update_of_all(one):
    # So that the comparisons above are of a run in which it happened, once.
    def scalars(name):
        return [variable[0][0] for variable in one[name] if len(variable[0]) == 1]

    scale, iterations = 2.0**14, 5
    assert {scale, iterations} <= set(scalars("scaled, not finite"))
    assert not {scale, iterations} & set(scalars("scaled"))
