"""The network that the workers of one machine have for themselves."""

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys

import pytest

from trainer import launch
from trainer.distributed import private_network
from trainer.distributed.private_network import open_private_network

LISTEN = """
import socket
server = socket.create_server(("", 0))
print(server.getsockname()[1], flush=True)
server.accept()[0].sendall(b"reached")
"""
CALL = """
import socket, sys
print(socket.create_connection(("127.0.0.1", int(sys.argv[1]))).recv(10).decode())
"""


@pytest.fixture
def network():
    try:
        opened = open_private_network()
    except OSError as error:
        pytest.skip(f"the system has no network namespaces for this user: {error}")
    with contextlib.closing(opened):
        yield opened


def test_who_is_in_it_reaches_the_others_and_nobody_else_does(network):
    command = [sys.executable, "-c", LISTEN]
    with subprocess.Popen(
        command, preexec_fn=network.enter, stdout=subprocess.PIPE, text=True
    ) as server:
        port = server.stdout.readline().strip()
        for host in ("127.0.0.1", socket.gethostname()):
            with pytest.raises(OSError, match=r"refused|not known|No address"):
                socket.create_connection((host, int(port)))
        called = subprocess.run(
            [sys.executable, "-c", CALL, port],
            preexec_fn=network.enter,
            capture_output=True,
            text=True,
            check=True,
        )
    assert called.stdout == "reached\n"


def test_files_are_as_before_in_it(network, tmp_path):
    script = "import os; open('made', 'x').close(); print(os.geteuid(), os.getegid())"
    inside = subprocess.run(
        [sys.executable, "-c", script],
        preexec_fn=network.enter,
        capture_output=True,
        cwd=tmp_path,
        text=True,
        check=True,
    )
    assert inside.stdout.split() == [str(os.geteuid()), str(os.getegid())]
    made = (tmp_path / "made").stat()
    assert (made.st_uid, made.st_gid) == (os.geteuid(), os.getegid())


class NoWorkers:
    """In place of ``LocalWorkers``: they end at once."""

    signals = ()

    def __init__(self, command, variables, *, prefix, network):
        self.networks.append(network)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def wait(self):
        return 0


@pytest.fixture
def networks(monkeypatch):
    """Returns the networks in which workers were started."""
    NoWorkers.networks = []
    monkeypatch.setattr(launch, "LocalWorkers", NoWorkers)
    return NoWorkers.networks


def refuse():
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_a_system_without_one_is_warned_of_once(networks, monkeypatch, capsys):
    monkeypatch.setattr(launch, "open_private_network", refuse)
    assert launch.main(["--workers", "2", "--max-restarts", "2"]) == 0
    assert networks == [None]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("TensorFlow listens on all network interfaces of this machine")
    assert line.endswith("The workers have no network of their own: Operation not permitted.")
    assert launch.main(["--workers", "2", "--", "--log-format", "json"]) == 0
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["severity"]) == ("notice", "WARNING")


@pytest.mark.parametrize("data", ["keras", "tfds:mnist"])
def test_data_that_may_be_downloaded_is_not_cut_off(networks, capsys, data):
    assert launch.main(["--workers", "2", "--", "--data", data]) == 0
    assert networks == [None]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"own: data='{data}' may have to be downloaded.")


def test_one_worker_alone_needs_none(networks, monkeypatch, capsys):
    monkeypatch.setattr(launch, "open_private_network", refuse)
    assert launch.main(["--workers", "1"]) == 0
    assert capsys.readouterr().err == ""


def test_the_network_of_the_machine_is_used_where_it_is_asked_for(networks, capsys):
    assert launch.main(["--workers", "2", "--network", "host"]) == 0
    assert networks == [None]
    assert capsys.readouterr().err == ""


def test_a_private_network_that_is_asked_for_and_not_there_is_78(networks, monkeypatch, capsys):
    monkeypatch.setattr(launch, "open_private_network", refuse)
    assert launch.main(["--workers", "2", "--network", "private"]) == 78
    assert networks == []
    line = capsys.readouterr().err
    assert "Received: Operation not permitted. Use network='host'" in line
    assert "(--network)" in line


def test_another_system_than_linux_has_none(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OSError, match="only Linux has network namespaces"):
        private_network.open_private_network()
