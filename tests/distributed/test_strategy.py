"""Which strategy is chosen, and that several replicas compute what one does.

Replicas are logical CPU devices here, which run the same graph as GPUs or the cores of a TPU;
``test_workers`` has several processes.
"""

import json

import numpy as np
import pytest
from support import TIMEOUT, assert_alike, assert_gradients_alike

from trainer.data import pipeline
from trainer.distributed import replica_updates, strategy
from trainer.distributed.cluster import Cluster
from trainer.distributed.collectives import Workers
from trainer.distributed.strategy import bypass_proxy, check_batch_size, create, has_tpu
from trainer.errors import ConfigurationError, UsageError
from trainer.models import cnn
from trainer.runtime import keras, tf
from trainer.training.objective import PerExample


def chosen(kind="auto", **options):
    defaults = {"cluster": None, "gpus": None, "collectives": "tensorflow"}
    return create(kind, **{**defaults, "startup_timeout": TIMEOUT, **options})


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "one device: the CPU (no GPU is seen)"),
        ({"kind": "one"}, "one device: the CPU (no GPU is seen)"),
        ({"gpus": 0}, "one device: the CPU (gpus=0)"),
    ],
)
def test_what_is_chosen_is_said(options, reason, monkeypatch):
    monkeypatch.setattr(strategy, "_has_nvidia_gpu", lambda: False)
    assert chosen(**options).reason == reason


@pytest.mark.parametrize(
    ("cuda", "nvidia", "remedy"),
    [
        (False, True, "This TensorFlow is built without CUDA: pip install 'digits-trainer[gpu]'"),
        (True, False, "There is no NVIDIA device here: in a container, is the GPU passed to it?"),
        (True, True, "nvidia-smi shows whether the driver works"),
    ],
)
def test_why_no_gpu_is_seen_is_said(cuda, nvidia, remedy, monkeypatch):
    monkeypatch.setattr(tf.test, "is_built_with_cuda", lambda: cuda)
    monkeypatch.setattr(strategy, "_has_nvidia_gpu", lambda: nvidia)
    with pytest.raises(ConfigurationError, match=r"Expected 1 GPUs .* Received: 0") as refused:
        chosen(gpus=1)
    assert remedy in str(refused.value)
    if nvidia:
        reason = chosen().reason
        assert "no GPU is seen, though this machine has one" in reason
        assert remedy in reason


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Physical devices cannot be modified after being initialized"),
        ValueError("Cannot set memory growth on device when virtual devices configured"),
    ],
)
def test_a_gpu_that_the_caller_has_set_up_stays_so(monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["GPU"])
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", refuse)
    assert chosen().reason == "one device: GPU 0 of 1"


TWO = Cluster(("a:1", "b:2"), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "multiworker"}, "several workers .* Received: none described"),
        ({"kind": "one", "cluster": TWO}, "one worker for strategy='one'. Received: 2"),
        ({"kind": "tpu", "cluster": TWO}, "one worker for strategy='tpu'. Received: 2"),
        ({"collectives": "ring"}, "several workers that have CPUs only .* Received: one process"),
        ({"kind": "tpu"}, r"by the name local\. Received: .* no TPU kernels: pip install"),
    ],
)
def test_what_is_not_there_is_refused(options, message, monkeypatch):
    monkeypatch.delenv("TPU_NAME", raising=False)
    with pytest.raises(ConfigurationError, match=message) as refused:
        chosen(**options)
    assert refused.value.exit_code == 78


def test_a_tpu_that_does_not_answer_is_refused(command):
    command.env["TPU_NAME"] = "grpc://127.0.0.1:1"
    done = command.run("--startup-timeout", 2)
    assert done.returncode == 78
    assert "Expected a TPU that answers, by the name grpc://127.0.0.1:1. Received: noth" in (
        done.stderr
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "flags", [("--gpus", 2), pytest.param(("--strategy", "mirrored"), marks=pytest.mark.full)]
)
def test_gpus_that_are_not_there_are_no_slow_run_on_the_cpu(command, flags):
    done = command.run(*flags)
    assert done.returncode == 78
    assert "Received: " in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("environ", "device", "there"),
    [
        ({}, ("0x1ae0", "0x0063"), True),
        ({}, ("0x1ae0", "0x0042"), False),  # Google's network card
        ({}, ("0x10de", "0x0063"), False),
        ({"TPU_NAME": "mine"}, None, True),
    ],
)
def test_a_tpu_is_known_by_its_device_or_its_name(tmp_path, environ, device, there):
    if device:
        (tmp_path / "0000:00:04.0").mkdir()
        for name, value in zip(("vendor", "device"), device, strict=True):
            (tmp_path / "0000:00:04.0" / name).write_text(f"{value}\n")
    assert has_tpu(environ, tmp_path) == there


@pytest.mark.parametrize(
    ("size", "replicas", "use"), [(128, 3, "126 or 129"), (2, 4, "4"), (9, 4, "8 or 12")]
)
def test_a_batch_that_does_not_divide_names_the_sizes_that_do(size, replicas, use):
    with pytest.raises(UsageError, match=rf"Received: batch_size={size}\. Use {use}\."):
        check_batch_size(size, replicas)
    check_batch_size(size * replicas, replicas)


@pytest.fixture(scope="module")
def one(shared_replicas):
    return shared_replicas.compute("losses", examples=640, batch_size=128)


@pytest.mark.full
@pytest.mark.parametrize("devices", [2, 4])
def test_several_replicas_train_as_one(replicas, one, devices):
    assert len(one["losses"]) == 5
    several = replicas.compute("losses", devices=devices, examples=640, batch_size=128)
    assert_alike(several, one)


@pytest.mark.full
@pytest.mark.parametrize("devices", [2, 4])
def test_several_replicas_train_an_epoch_as_one(replicas, devices):
    data = {"examples": 5120, "batch_size": 128}
    one, several = (replicas.compute("losses", devices=n, **data) for n in (1, devices))
    assert len(one["losses"]) == 40
    assert_alike(several, one)


@pytest.mark.full
@pytest.mark.parametrize("devices", [2, 4])
def test_gradients_are_those_of_one(replicas, tmp_path, devices):
    # The second batch of 64 has 36 examples, of which the last replicas have few or none.
    for n in (1, devices):
        file = str(tmp_path / f"{n}.npz")
        replicas.compute("gradients", devices=n, examples=100, batch_size=64, file=file)
    assert_gradients_alike(tmp_path / f"{devices}.npz", tmp_path / "1.npz")


def test_replicas_drop_other_units_and_the_first_what_it_would_alone(replicas):
    several, alone = (replicas.compute("masks", devices=n) for n in (4, 1))
    for drawn, (mask,) in zip(several["drawn"], alone["drawn"], strict=True):
        assert len({str(one) for one in drawn}) == 4
        assert drawn[0] == mask
    assert several["drawn"][0] != several["drawn"][1]
    assert several["state"] == alone["state"]


@pytest.mark.full
def test_several_replicas_repeat_the_same_bits_and_save_stock_layers(replicas, tmp_path):
    data = {"examples": 200, "batch_size": 64, "folder": str(tmp_path)}
    first, second = (replicas.compute("saved", devices=4, **data) for _ in range(2))
    assert first == second
    loaded = keras.models.load_model(tmp_path / "mnist.h5")
    stock = cnn.build(optimizer="adadelta", learning_rate=1.0, seed=0)
    for layer, expected in zip(loaded.layers, stock.layers, strict=True):
        assert type(layer) is type(expected)
        if isinstance(layer, keras.layers.Dropout):
            assert (layer.rate, layer.seed) == (expected.rate, expected.seed)


def test_the_step_can_be_compiled_for_a_device_with_static_shapes_only(mnist):
    # What a TPU needs. XLA is TPUs' compiler too; it refuses a shape that is known late.
    digits = mnist.first(8, 8)
    network = keras.Sequential(
        [
            keras.Input(cnn.INPUT_SHAPE),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5, seed=1),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    network.compile(optimizer=keras.optimizers.Adadelta(1.0), loss="categorical_crossentropy")
    network.optimizer.build(network.trainable_variables)
    objective = PerExample(network, loss=cnn.LOSS, metrics=cnn.METRICS, preprocess=cnn.preprocess)
    update = replica_updates.create(
        network.optimizer, network.trainable_variables, tf.distribute.get_strategy()
    )
    step = tf.function(
        objective.train_step(update, jit_compile=False),
        jit_compile=True,
        autograph=False,
    )
    batch = next(
        iter(pipeline.train_batches(digits.x_train, digits.y_train, batch_size=8, seed=0, epoch=0))
    )
    sums = step(*batch, tf.constant(8.0))
    assert sums[0] == 8


@pytest.mark.full
@pytest.mark.parametrize("devices", [1, 2])
def test_images_on_the_devices_train_the_same_bits(replicas, devices):
    # As on GPUs; with a batch that is not full.
    data = {"examples": 300, "batch_size": 64}
    host, there = (
        replicas.compute("placed", devices=devices, **data, on_devices=on) for on in (False, True)
    )
    assert host == there


@pytest.mark.full
@pytest.mark.parametrize("devices", [1, 2])
def test_a_step_that_xla_compiles_computes_the_same(replicas, devices):
    data = {"examples": 24, "batch_size": 8}
    plain, compiled = (
        replicas.compute("compiled", devices=devices, **data, jit_compile=on)
        for on in (False, True)
    )
    np.testing.assert_allclose(compiled["losses"], plain["losses"], rtol=1e-12)
    assert plain["val_loss"] == pytest.approx(compiled["val_loss"], rel=1e-12)


@pytest.mark.parametrize(
    ("environ", "hosts"),
    [
        ({}, "a.b,::1"),
        ({"no_proxy": "example.com"}, "example.com,a.b,::1"),
        ({"no_proxy": "example.com", "no_grpc_proxy": "a.b,c"}, "a.b,c,::1"),
    ],
)
def test_no_proxy_stands_between_workers_and_downloads_keep_theirs(environ, hosts):
    changed = dict(environ)
    bypass_proxy(("a.b:2222", "a.b:2223", "[::1]:2222"), changed)
    assert changed == {**environ, "no_grpc_proxy": hosts}


def test_alone_there_is_nothing_to_exchange():
    workers = Workers(tf.distribute.get_strategy())
    assert (workers.count, workers.index) == (1, 0)
    assert workers.gather(7) == [7]
    assert workers.broadcast(b"odd") == b"odd"


@pytest.mark.full
def test_the_command_trains_on_several_logical_devices(command, tmp_path):
    # As on a machine with GPUs, which is where the command itself finds several.
    start = (
        "import sys; from trainer.runtime import tf; from trainer import task; "
        "logical = 2 * [tf.config.LogicalDeviceConfiguration()]; "
        "cpu = tf.config.list_physical_devices('CPU')[0]; "
        "tf.config.set_logical_device_configuration(cpu, logical); "
        "sys.exit(task.main())"
    )
    command.program = ["-c", start]
    flags = (
        "--strategy",
        "mirrored",
        "--epochs",
        1,
        "--train-limit",
        256,
        "--test-limit",
        100,
        "--no-report",
    )
    done = command.run(*flags, "--log-format", "json")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[1]["message"].startswith("MirroredStrategy over 2 logical CPU devices")
