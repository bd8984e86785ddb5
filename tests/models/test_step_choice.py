"""Which training step is chosen, and what the user is told about it."""

import subprocess
import sys

import pytest
from support import ROOT, needs_fast_step

from trainer.models import cnn, fast_step
from trainer.runtime import keras


def choose(kind="auto", *, accelerator=False, optimizer="adadelta", **options):
    found = fast_step.find(kind, accelerator=accelerator)
    return found.verify(optimizer=optimizer, **{"threads": 2, **options})


def build(optimizer="adadelta"):
    return cnn.build(optimizer=optimizer, learning_rate=1.0, seed=0)


@needs_fast_step
def test_where_it_is_compiled_it_is_used():
    choice = choose()
    assert choice.name.startswith("winograd "), choice.reason
    assert choice.reason == ""
    assert fast_step.find("auto", accelerator=False).name == choice.name
    model = build()
    with choice.step(model) as forward:
        assert forward is not model
        assert "update_step" in vars(model.optimizer)
    assert "update_step" not in vars(model.optimizer)


@needs_fast_step
@pytest.mark.parametrize(
    ("threads", "replicas", "each"), [(4, 1, 4), (4, 2, 2), (3, 2, 1), (1, 2, 1)]
)
def test_replicas_share_the_threads_of_their_process(threads, replicas, each):
    assert choose(threads=threads, replicas=replicas).threads == each


@pytest.mark.parametrize("options", [{"kind": "off"}, {"accelerator": True}])
def test_off_and_on_accelerators_the_step_is_keras_without_a_word(options):
    choice = choose(**options)
    assert (choice.name, choice.reason) == ("keras", "")
    model = build()
    with choice.step(model) as forward:
        assert forward is model
        assert "update_step" not in vars(model.optimizer)


def test_where_it_was_not_compiled_keras_step_is_used_and_the_user_is_told(monkeypatch):
    monkeypatch.setattr(fast_step, "_library", fast_step._library.__wrapped__)
    monkeypatch.setattr(fast_step.importlib.util, "find_spec", lambda name: None)
    choice = choose()
    assert choice.name == "keras"
    assert "no gcc or clang" in choice.reason


@needs_fast_step
@pytest.mark.parametrize(
    ("cached", "name", "value", "reason"),
    [
        ("_library", "_instructions", lambda path: None.x, "does not work with this TensorFlow"),
        ("_difference", "TOLERANCE", 0.0, "gives wrong results on this processor"),
    ],
)
def test_where_it_does_not_work_keras_step_is_used_and_the_user_is_told(
    monkeypatch, cached, name, value, reason
):
    monkeypatch.setattr(fast_step, cached, getattr(fast_step, cached).__wrapped__)
    monkeypatch.setattr(fast_step, name, value)
    choice = choose()
    assert choice.name == "keras"
    assert reason in choice.reason
    model = build()
    with choice.step(model) as forward:
        assert forward is model


@needs_fast_step
def test_where_only_the_update_differs_the_convolution_stays(monkeypatch):
    monkeypatch.setattr(fast_step, "find_problem", lambda optimizer: f"no {optimizer}")
    choice = choose(optimizer="adam")
    found = fast_step.find("auto", accelerator=False)
    assert choice.name == f"{found.name}, update by keras"
    assert choice.reason == (
        "the optimizer's update is Keras' own: the fused one does not work with Keras "
        f"{keras.__version__} (no adam)"
    )
    model = build("adam")
    with choice.step(model) as forward:
        assert forward is not model
        assert "update_step" not in vars(model.optimizer)


PROGRAM = """
from trainer.models import fast_step
from trainer.runtime import tf
print(fast_step.find("auto", accelerator=False).name)
# Refused once devices are started.
logical = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], logical)
print(len(tf.config.list_logical_devices("CPU")))
"""


def test_to_find_it_starts_no_device():
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [fast_step.find("auto", accelerator=False).name, "2"]
