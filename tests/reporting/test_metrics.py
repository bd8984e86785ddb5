"""What Prometheus reads of a run, and when a run counts as hung."""

import contextlib
import http.client
import math
import shutil
import socket
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import Pause, free_ports, wait_for

from trainer.config import TrainConfig
from trainer.distributed.parent import step_deadline
from trainer.errors import ConfigurationError, UsageError
from trainer.reporting import metrics as module
from trainer.reporting.exporter import Exporter
from trainer.reporting.metrics import Metrics

FEW = ("--train-limit", 300, "--test-limit", 50, "--batch-size", 64, "--no-report")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def metrics(clock):
    one = Metrics(
        "127.0.0.1", 0, deadline=lambda longest: step_deadline(None, longest), clock=clock
    )
    with one.serve():
        yield one


def get(port, path="/metrics", method="GET"):
    """Returns status and text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def is_answered(port):
    with contextlib.suppress(OSError, http.client.HTTPException):
        return get(port, "/healthz")[0] == 200
    return False


def values(text):
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_an_epoch_is_counted_to_its_last_example(metrics, clock):
    exporter = Exporter(metrics, 64, 300, clock)
    exporter.set_params({"steps": 5, "epochs": 2})
    exporter.on_train_begin()
    exporter.on_epoch_begin(0)
    for first, last in ((0, 1), (2, 4)):
        exporter.on_train_batch_begin(first)
        clock.now += 2
        exporter.on_train_batch_end(last, {"loss": 0.5, "accuracy": 0.75})
    found = values(get(metrics.port)[1])
    assert found["trainer_epoch",] == 1
    assert found["trainer_epochs",] == 2
    assert found["trainer_step",] == found["trainer_epoch_steps",] == 5
    assert found["trainer_steps_total",] == 5
    assert found["trainer_examples_total",] == 300
    assert found["trainer_examples_per_second",] == 96  # three steps of 64 in two seconds
    assert found["trainer_metric", "accuracy", "training"] == 0.75
    assert math.isnan(found["trainer_checkpoint_age_seconds",])
    exporter.on_epoch_end(0, {"loss": 0.4, "val_loss": 0.3})
    # An epoch that is resumed in its middle.
    exporter.on_epoch_begin(1)
    exporter.on_train_batch_begin(3)
    clock.now += 2
    exporter.on_train_batch_end(4, {"loss": 0.2})
    found = values(get(metrics.port)[1])
    assert found["trainer_metric", "loss", "validation"] == 0.3
    assert found["trainer_steps_total",] == 7
    assert found["trainer_examples_total",] == 300 + 300 - 3 * 64


def test_a_run_is_alive_until_a_step_takes_too_long(metrics, clock):
    def health():
        return get(metrics.port, "/healthz")[0]

    clock.now = 10_000  # Reading data has no deadline.
    assert health() == 200
    metrics.progress()
    clock.now += 1200  # The first step compiles.
    assert health() == 200
    clock.now += 1
    assert health() == 503
    metrics.progress()
    clock.now += 20 * 1201
    assert health() == 200
    clock.now += 1
    assert health() == 503
    metrics.unwatch()
    assert health() == 200


def test_nothing_else_is_answered(metrics):
    assert get(metrics.port, "/")[0] == 404
    assert get(metrics.port, "/metrics", "POST")[0] == 405
    assert get(metrics.port, "/healthz", "HEAD")[0] == 200


def test_a_slow_client_and_a_crowd_keep_nobody_out(monkeypatch, clock):
    monkeypatch.setattr(module, "CONNECTIONS", 2)
    monkeypatch.setattr(module._Handler, "timeout", 0.2)
    one = Metrics("127.0.0.1", 0, deadline=lambda longest: 1, clock=clock)
    with one.serve(), contextlib.ExitStack() as held:
        slow = [
            held.enter_context(socket.create_connection(("127.0.0.1", one.port))) for _ in range(2)
        ]
        for connection in slow:
            connection.sendall(b"GET /metrics")
            connection.settimeout(60)
        refused = http.client.HTTPConnection("127.0.0.1", one.port, timeout=60)
        with contextlib.suppress(OSError, http.client.HTTPException):
            refused.request("GET", "/healthz")
            refused.getresponse()
        for connection in slow:
            assert connection.recv(1) == b""  # cut off
        wait_for(lambda: is_answered(one.port))  # Their threads end after that.


def test_all_addresses_are_listened_at_where_that_is_asked_for(clock):
    one = Metrics("*", 0, deadline=lambda longest: 1, clock=clock)
    with one.serve():
        assert get(one.port, "/healthz")[0] == 200
        if socket.has_dualstack_ipv6():
            connection = http.client.HTTPConnection("::1", one.port, timeout=60)
            with contextlib.closing(connection), contextlib.suppress(OSError):
                connection.request("GET", "/healthz")  # Not every machine has the address.
                assert connection.getresponse().status == 200


def test_an_address_that_is_taken_is_named(metrics):
    other = Metrics("127.0.0.1", metrics.port, deadline=lambda longest: 1)
    with pytest.raises(ConfigurationError, match="Address already in use"), other.serve():
        pass


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9090", ("127.0.0.1", 9090)),
        ("*:9090", ("*", 9090)),
        ("[::1]:80", ("::1", 80)),
        ("10.0.0.7:9090", ("10.0.0.7", 9090)),
    ],
)
def test_a_port_may_have_an_address(text, address):
    assert TrainConfig(metrics_port=text).metrics_address == address


@pytest.mark.parametrize("text", ["0", "65536", "http", "a b:80", ":", "*:", "::1:80"])
def test_another_text_is_refused(text):
    with pytest.raises(UsageError, match="metrics_port must be"):
        TrainConfig(metrics_port=text)


def test_a_run_is_seen_while_it_trains(command, tmp_path):
    (port,) = free_ports(1)
    pause = Pause(folder=tmp_path / "pause", after_step=(2, 3))
    flags = (*FEW, "--epochs", 2, "--steps-per-execution", 1, "--metrics-port", port)
    run = command.start(*flags, hooks=[pause])
    pause.wait(run)
    status, text = get(port)
    assert status == 200
    found = values(text)
    assert found["trainer_epoch",] == 2
    assert found["trainer_steps_total",] == 5 + 3
    assert found["trainer_examples_total",] == 300 + 3 * 64
    assert found["trainer_checkpoint_age_seconds",] >= 0
    assert found["trainer_resumed",] == 0
    if promtool := shutil.which("promtool"):
        done = subprocess.run(
            [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
    run.kill()
    run.communicate()
    pause.go()
    done = command.run(*flags)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_port_that_is_taken_ends_the_command_before_it_trains(command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = command.run(*FEW, "--metrics-port", taken.getsockname()[1])
    assert done.returncode == 78
    assert "Use another port. (--metrics-port)" in done.stderr


def test_workers_of_one_machine_share_a_port(command, tmp_path):
    command.program = ["-m", "trainer.launch"]
    (port,) = free_ports(1)
    done = command.run("--", *FEW, "--epochs", 1, "--metrics-port", port)
    assert done.returncode == 0, done.stderr


def test_an_installation_without_the_extra_is_78(command):
    command.program = [
        "-c",
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from trainer.task import main; sys.exit(main())",
    ]
    done = command.run(*FEW, "--metrics-port", 9090)
    assert done.returncode == 78
    assert "pip install 'digits-trainer[metrics]'" in done.stderr
