import socket
import threading

import pytest
from support import free_ports

from trainer.diagnosis import connections
from trainer.diagnosis.connections import check_cluster
from trainer.distributed.authentication import Secret
from trainer.distributed.cluster import Cluster

SECRET = Secret(b"0" * 32, "")


def checked(*workers, index=0, in_pod=False, secret=SECRET):
    findings = list(check_cluster(Cluster(workers, index, secret), in_pod=in_pod))
    return [finding for finding in findings if finding.check == "workers"][1:]


@pytest.fixture
def addresses():
    return [f"127.0.0.1:{port}" for port in free_ports(2)]


def test_a_worker_that_has_not_started_is_ok(addresses):
    own, other = checked(*addresses)
    assert (own.status, other.status) == ("ok", "ok")
    assert f"worker 0 ({addresses[0]}), 127.0.0.1: this one" in own.seen
    assert f"worker 1 ({addresses[1]}), 127.0.0.1: its machine answers" in other.seen


def test_a_worker_that_listens_is_ok(addresses):
    host, port = addresses[1].split(":")
    with socket.create_server((host, int(port))):
        _, other = checked(*addresses)
    assert (other.status, other.seen.endswith("it listens")) == ("ok", True)


@pytest.mark.parametrize(("in_pod", "status"), [(False, "error"), (True, "warning")])
def test_a_name_that_cannot_be_resolved_is_named(addresses, in_pod, status):
    _, other = checked(addresses[0], "digits-1.invalid:2222", in_pod=in_pod)
    assert other.status == status
    assert other.seen.startswith("worker 1 (digits-1.invalid:2222): its name cannot be resolved")
    assert "name" in other.remedy


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    ended = threading.Event()

    def silent(*_, **__):
        ended.wait()
        raise socket.gaierror

    monkeypatch.setattr(connections, "RESOLVE_TIMEOUT", 0.0)
    monkeypatch.setattr(socket, "getaddrinfo", silent)
    address, reason = connections.examine_address("any.example", 2222)
    ended.set()
    assert (address, reason) == ("", "its name is not resolved: no answer")


def test_every_address_of_a_name_is_tried(addresses, monkeypatch):
    host, port = addresses[1].split(":")
    infos = [(None, None, None, "", (one, 0)) for one in ("127.0.0.2", host)]
    monkeypatch.setattr(socket, "getaddrinfo", with_literals(infos))
    with socket.create_server((host, int(port))):
        assert connections.examine_address("any.example", int(port)) == (host, "")
    assert connections.examine_address("any.example", int(port)) == (
        "127.0.0.2",
        "connection refused",
    )


def with_literals(infos):
    """Resolves a name to these; an address to itself, as a connection asks for it."""
    resolve = socket.getaddrinfo

    def getaddrinfo(host, *arguments, **options):
        return infos if host == "any.example" else resolve(host, *arguments, **options)

    return getaddrinfo


def test_a_port_of_its_own_that_is_in_use_is_an_error(addresses):
    host, port = addresses[0].split(":")
    with socket.create_server((host, int(port))):
        own, _ = checked(*addresses)
    assert own.status == "error"
    assert f"Expected to listen on port {port}" in own.seen


def test_workers_without_a_secret_are_a_warning(addresses):
    cluster = Cluster(tuple(addresses), 0)
    (finding,) = (one for one in check_cluster(cluster, in_pod=False) if one.check == "secret")
    assert finding.status == "warning"
    assert "TRAINER_TOKEN_FILE" in finding.seen


def test_a_process_that_trains_alone_connects_to_nobody():
    workers, network = check_cluster(None, in_pod=False)
    assert (workers.status, workers.seen) == ("ok", "this process trains alone")
    assert (network.check, network.status) == ("private network", "ok")
