import dataclasses
import json
import math
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from trainer.config import TrainConfig
from trainer.errors import UsageError
from trainer.evaluate import EvaluateConfig
from trainer.export import ExportConfig
from trainer.machine import available_cpus
from trainer.predict import PredictConfig
from trainer.recipes import LEARNING_RATES, RECIPES
from trainer.serve import ServeConfig
from trainer.submit import SubmitConfig


def test_the_default_is_the_recipe():
    config = TrainConfig()
    assert (config.batch_size, config.epochs) == (128, 10)
    assert (config.optimizer, config.learning_rate) == ("adadelta", 1.0)
    assert config.data == "bundled"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", -3),
        ("epochs", 2.5),
        ("epochs", True),
        ("batch_size", 0),
        ("batch_size", "128"),
        ("seed", -1),
        ("seed", 2**32),
        ("threads", 0),
        ("steps_per_execution", 0),
        ("train_limit", 0),
        ("test_limit", -1),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", 0.0),
        ("learning_rate", -1.0),
        ("learning_rate", "1"),
        ("optimizer", "adadelt"),
        ("fast", "on"),
        ("precision", "float16"),
        ("log_format", "xml"),
        ("recipe", "slow"),
        ("schedule", "two-cycle"),
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("label_smoothing", "0.1"),
        ("pooling_dropout", 1.0),
        ("dense_dropout", -0.5),
        ("dense_dropout", True),
        ("augment", "elastics"),
        ("augment", 3),
        ("data", ""),
        ("data", 3),
        ("data", b"digits.npz"),
        ("data", "a\0b"),
        ("output_dir", 3),
        ("output_dir", None),
        ("output_dir", "a\0b"),
        ("epochs", np.array([3])),
        ("epochs", np.float64(3)),
        ("epochs", np.True_),
        ("optimizer", np.array(["adam", "sgd"])),
        ("optimizer", ["adam"]),
        pytest.param("learning_rate", 10**400, id="learning_rate-of-400-digits"),
        ("learning_rate", np.float32("nan")),
        ("report", "no"),
        ("jit_compile", 1),
        ("deterministic", None),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_expected(field, value):
    with pytest.raises(UsageError, match=rf"{field} must .*Received: {field}=") as raised:
        TrainConfig(**{field: value})
    assert "\n" not in str(raised.value)


def test_an_optimizer_without_a_rate_gets_its_own():
    for name, rate in LEARNING_RATES.items():
        assert TrainConfig(optimizer=name).learning_rate == rate
    assert TrainConfig(optimizer="adam", learning_rate=0.5).learning_rate == 0.5


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_is_not_given(name):
    config = TrainConfig(recipe=name)
    for field, value in RECIPES[name].items():
        assert getattr(config, field) == value, field
    # What is given comes first, also where it is the notebook's, or nothing.
    given = {"epochs": 10, "pooling_dropout": 0.0, "augment": "none", "schedule": "constant"}
    changed = TrainConfig(recipe=name, **given)
    assert {field: getattr(changed, field) for field in given} == given
    assert changed.batch_size == RECIPES[name]["batch_size"]


def test_a_recipes_rate_is_for_its_optimizer():
    assert TrainConfig(recipe="fast").learning_rate == RECIPES["fast"]["learning_rate"]
    assert TrainConfig(recipe="fast", optimizer="sgd").learning_rate == LEARNING_RATES["sgd"]
    assert TrainConfig(recipe="fast", learning_rate=0.5).learning_rate == 0.5


def test_the_rates_are_those_of_keras_except_for_adadelta():
    from trainer.runtime import keras

    kinds = {name.lower(): kind for name, kind in vars(keras.optimizers).items()}
    for name, rate in LEARNING_RATES.items():
        default = float(kinds[name]().learning_rate)
        assert (default == pytest.approx(rate)) is (name != "adadelta")


def test_what_decides_no_result_is_off_unless_it_is_asked_for():
    config = TrainConfig()
    assert (config.tensorboard, config.tensorflow_logs) == (False, False)
    assert TrainConfig(tensorboard=True).as_dict()["tensorboard"] is True


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().epochs = 3


def test_a_configuration_becomes_json_with_the_rate_it_used():
    fields = TrainConfig().as_dict()
    assert json.loads(json.dumps(fields)) == fields  # a checkpoint's are compared with a run's
    assert fields["learning_rate"] == 1.0


class Inside:
    """A path of another library, as ``upath.UPath`` and ``py.path.local`` are."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path


def test_numbers_of_numpy_and_paths_of_any_kind_are_pythons_own():
    given = TrainConfig(
        epochs=np.int64(3),
        batch_size=np.uint8(64),
        seed=np.int32(7),
        learning_rate=np.float32(0.5),
        dense_dropout=np.float64(0.25),
        optimizer=np.str_("adam"),
        report=np.False_,
        data=Path("digits.npz"),
        output_dir=Inside(b"out/\xff"),
    )
    assert given == TrainConfig(
        epochs=3,
        batch_size=64,
        seed=7,
        learning_rate=0.5,
        dense_dropout=0.25,
        optimizer="adam",
        report=False,
        data="digits.npz",
        output_dir=Path("out/\udcff"),
    )
    recorded = json.loads(json.dumps(given.as_dict()))
    assert TrainConfig(**recorded) == given
    assert {type(value) for value in recorded.values()} <= {int, float, bool, str, type(None)}
    assert TrainConfig(data=PurePosixPath("a")).data == "a"
    assert TrainConfig(output_dir="out").output_dir == Path("out")


V2 = "sys/fs/cgroup/cpu.max"
V1 = ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "sys/fs/cgroup/cpu/cpu.cfs_period_us")
NESTED_V2 = {"proc/self/cgroup": "0::/user.slice/run.scope\n", V2: "max 100000\n"}
NESTED_V1 = {"proc/self/cgroup": "5:memory:/\n4:cpu,cpuacct:/slurm/job_1/step_0\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({V2: "max 100000\n"}, None),
        ({V2: "50000 100000\n"}, 1),
        ({V2: "100001 100000\n"}, 2),
        ({V2: "100000 0\n"}, None),
        (dict(zip(V1, ("-1\n", "100000\n"), strict=True)), None),
        (dict(zip(V1, ("100000\n", "100000\n"), strict=True)), 1),
        ({V2: "nonsense\n"}, None),
        ({V2: "200000 100000\n", "proc/self/cgroup": "nonsense\n"}, 2),
        ({}, None),
        # The smallest of the quotas from the process' group up to the root.
        ({**NESTED_V2, "sys/fs/cgroup/user.slice/run.scope/cpu.max": "150000 100000\n"}, 2),
        (
            {
                **NESTED_V2,
                "sys/fs/cgroup/user.slice/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/user.slice/run.scope/cpu.max": "max 100000\n",
            },
            3,
        ),
        (
            {
                **NESTED_V2,
                V2: "200000 100000\n",
                "sys/fs/cgroup/user.slice/cpu.max": "300000 100000\n",
            },
            2,
        ),
        (
            {
                **NESTED_V1,
                "sys/fs/cgroup/cpu/slurm/job_1/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu/slurm/job_1/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/slurm/job_1/step_0/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/slurm/job_1/step_0/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        # Not a group of this process.
        ({**NESTED_V2, "sys/fs/cgroup/system.slice/cpu.max": "100000 100000\n"}, None),
        # The host's path in a container: nothing of it exists below the mount.
        ({"proc/self/cgroup": "0::/docker/1f2e\n", V2: "200000 100000\n"}, 2),
    ],
)
def test_the_smallest_cpu_quota_limits_the_threads(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cpus(tmp_path) == (expected or 8)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(recipe="fast", optimizer="sgd"),
        TrainConfig(recipe="best", epochs=3, output_dir=Path("out"), step_timeout=60),
    ],
)
def test_a_configuration_comes_back_from_what_is_recorded_of_it(config):
    assert TrainConfig(**json.loads(json.dumps(config.as_dict()))) == config


@pytest.mark.parametrize(
    ("recipe", "field", "remedy"),
    [
        ("fast", "batch_size", "Use 64, the value of the recipe fast."),
        ("best", "epochs", "Use 10, the value of the recipe best."),
        ("default", "batch_size", "Use 128, the value of the recipe default."),
    ],
)
def test_the_remedy_is_the_recipes_own_value(recipe, field, remedy):
    with pytest.raises(UsageError) as raised:
        TrainConfig(recipe=recipe, **{field: 0})
    assert str(raised.value).endswith(remedy)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_rate_that_a_remedy_names_is_the_one_that_is_used(recipe):
    with pytest.raises(UsageError) as raised:
        TrainConfig(recipe=recipe, learning_rate=-1.0)
    config = TrainConfig(recipe=recipe)
    assert f"Leave it out for {config.learning_rate}, that of" in str(raised.value)


@pytest.mark.parametrize("name", ["output_dir", "data"])
@pytest.mark.parametrize(
    "url", ["gs://bucket/run", "s3://bucket/run", "hdfs://host/run", "file:///run"]
)
def test_a_url_is_refused_and_not_taken_for_a_folder(name, url):
    for value in (url, Path(url)) if name == "output_dir" else (url,):
        with pytest.raises(UsageError, match=f"{name} must be a path on this machine.*Mount the"):
            TrainConfig(**{name: value})


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert TrainConfig(output_dir="~/out").output_dir == Path("/home/somebody/out")
    assert TrainConfig(output_dir="out/~").output_dir == Path("out/~")
    assert TrainConfig(data="tfds:mnist").data == "tfds:mnist"


@pytest.mark.parametrize(
    "make",
    [
        lambda url: EvaluateConfig(model=url),
        lambda url: ExportConfig(model=Path("mnist.h5"), format="onnx", output=url),
        lambda url: PredictConfig(model=Path("mnist.h5"), images=("a.png",), show=url),
        lambda url: ServeConfig(model=url),
        lambda url: SubmitConfig(output_dir=url),
    ],
)
def test_the_commands_refuse_urls_too(make):
    with pytest.raises(UsageError, match=r"must be a path on this machine"):
        make(Path("gs://bucket/mnist.onnx"))


def test_a_name_and_its_parameters_have_one_spelling():
    config = TrainConfig(optimizer="adamw  weight_decay=.05 beta_1=0.8", schedule="cosine")
    assert config.optimizer == "adamw beta_1=0.8 weight_decay=0.05"
    assert (config.optimizer_name, config.learning_rate) == ("adamw", 0.001)
    assert TrainConfig(**config.as_dict()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamw 0.05"}, "must be name=value. Received: '0.05'"),
        ({"optimizer": "adam beta_1=x"}, "must be a number, True, False or None. Received: 'x'"),
        ({"optimizer": "adam beta_1=[1]"}, r"Received: '\[1\]'"),
        ({"optimizer": "adam beta_1=1 beta_1=2"}, "beta_1 must be there once"),
        (
            {"optimizer": "madam"},
            "optimizer must be one of adadelta, .*Received: optimizer='madam'",
        ),
        ({"schedule": "cosine beta=1"}, "schedule=cosine has the parameters: alpha, warmup"),
        ({"schedule": "one-cycle warmup=1"}, "has the parameters: none"),
        ({"schedule": "cosine warmup=2"}, "warmup of schedule=cosine must be from 0 to 1"),
        ({"schedule": "cosine warmup=True"}, "must be from 0 to 1"),
        ({"schedule": "polynomial power=0"}, "power of schedule=polynomial must be above 0"),
    ],
)
def test_parameters_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**settings)
