import dataclasses
import json

import pytest

from trainer.config import TrainConfig
from trainer.training.digits_workload import DigitsWorkload
from trainer.training.manifest import RunManifest
from trainer.training.resume import changed_environment


def describe(mnist, **changes):
    values = {"step": "keras", "workers": 2, "replicas": 2, **changes}
    config = values.pop("config", TrainConfig(threads=1))
    data = DigitsWorkload(TrainConfig(train_limit=100, test_limit=10), mnist).data
    return RunManifest.create(config, data=data, **values)


def test_it_is_what_a_file_can_hold(mnist):
    manifest = describe(mnist, job="a Job")
    assert json.loads(json.dumps(manifest.as_dict())) == manifest.as_dict()
    assert manifest.job == "a Job"
    assert manifest.data["train_examples"] == 100
    assert manifest.data["sha256"] == mnist.sha256
    assert TrainConfig(**manifest.config) == TrainConfig(threads=1)


def test_it_cannot_be_changed(mnist):
    with pytest.raises(dataclasses.FrozenInstanceError):
        describe(mnist).run = "another"


def test_each_run_has_an_identity_of_its_own(mnist):
    assert describe(mnist).run != describe(mnist).run


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"step": "winograd avx2"}, "step"),
        ({"config": TrainConfig(threads=1, collectives="ring")}, "collectives"),
        ({"config": TrainConfig(threads=1, seed=1)}, "seed"),
        ({"config": TrainConfig(threads=1, recipe="best", epochs=10)}, "recipe"),
    ],
)
def test_workers_that_would_compute_something_else_differ_by_name(mnist, changes, name):
    ours, theirs = describe(mnist).shared_by_workers(), describe(mnist, **changes)
    assert ours[name] != theirs.shared_by_workers()[name]


def test_workers_may_differ_in_what_decides_nothing(mnist):
    other = TrainConfig(threads=3, output_dir="elsewhere", log_format="json", data="a/copy")
    theirs = describe(mnist, config=other)
    assert theirs.shared_by_workers() == describe(mnist).shared_by_workers()


DECIDING = ("XLA_FLAGS", "TF_DETERMINISTIC_OPS", "ONEDNN_MAX_CPU_ISA", "NVIDIA_TF32_OVERRIDE")


@pytest.fixture
def no_variables(monkeypatch):
    for name in DECIDING:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_variables")
@pytest.mark.parametrize("name", DECIDING)
def test_a_variable_that_decides_bits_is_recorded_and_a_resume_under_another_says_so(
    mnist, monkeypatch, name
):
    without = describe(mnist)
    monkeypatch.setenv(name, "1")
    under = describe(mnist)
    assert without.environment["variables"] == {}
    assert under.environment["variables"] == {name: "1"}
    assert changed_environment(without.as_dict(), under) == [f"{name} is 1 and was not set"]
    assert changed_environment(under.as_dict(), without) == [f"{name} is not set and was 1"]
    assert changed_environment(under.as_dict(), under) == []
    monkeypatch.setenv(name, "2")
    assert changed_environment(under.as_dict(), describe(mnist)) == [f"{name} is 2 and was 1"]


def test_a_checkpoint_that_recorded_no_variables_is_resumed_without_a_notice(mnist, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    manifest = describe(mnist)
    earlier = manifest.as_dict()
    del earlier["environment"]["variables"]
    assert changed_environment(earlier, manifest) == []
