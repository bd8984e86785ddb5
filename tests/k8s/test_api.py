"""What is said of an API server's refusals; ``tests/cluster`` has a real one."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from kubernetes.client import ApiException

from trainer.errors import ConfigurationError
from trainer.k8s.api import NotFoundError, RefusedError, Server

CONFIG = {
    "apiVersion": "v1",
    "kind": "Config",
    "clusters": [{"name": "c", "cluster": {"server": "https://kubernetes.example"}}],
    "users": [{"name": "u", "user": {"token": "secret"}}],
    "contexts": [
        {"name": "first", "context": {"cluster": "c", "user": "u", "namespace": "research"}},
        {"name": "second", "context": {"cluster": "c", "user": "u"}},
    ],
    "current-context": "first",
}


@pytest.fixture
def kubeconfig(tmp_path, monkeypatch):
    def write(**changes):
        path = tmp_path / "config"
        path.write_text(json.dumps({**CONFIG, **changes}))
        # The client has read the variable when it was imported.
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))

    return write


@pytest.mark.parametrize(
    ("options", "namespace"),
    [
        ({}, "research"),
        ({"context": "second"}, "default"),
        ({"context": "second", "namespace": "mine"}, "mine"),
        ({"namespace": "mine"}, "mine"),
    ],
)
def test_the_namespace_is_the_contexts_unless_another_is_named(kubeconfig, options, namespace):
    kubeconfig()
    assert Server(**options).namespace == namespace


def test_a_context_can_be_named_where_none_is_current(kubeconfig):
    kubeconfig(**{"current-context": ""})
    assert Server(context="first", namespace="mine").namespace == "mine"
    with pytest.raises(ConfigurationError, match="Set KUBECONFIG"):
        Server()


def refusal(status, message):
    return ApiException(status=status, reason="Reason", body=json.dumps({"message": message}))


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (refusal(401, "Unauthorized"), RefusedError, "401, Unauthorized. Log in"),
        (refusal(403, "exceeded quota"), RefusedError, "403, exceeded quota. Ask for"),
        (refusal(404, 'namespaces "x" not found'), NotFoundError, '404, namespaces "x" not found.'),
        (refusal(422, "invalid"), ConfigurationError, "422, invalid."),
        (ApiException(status=503, reason="Busy", body="<html>"), ConfigurationError, "503, Busy."),
        (
            ApiException(status=0, reason="Handshake status 403 Forbidden -+-+- {'a': 'b'}"),
            RefusedError,
            "403, Forbidden.",
        ),
        (OSError("no route\nto host"), ConfigurationError, "Received: no route to host."),
    ],
)
def test_a_refusal_is_one_line_in_the_servers_words(kubeconfig, error, kind, says):
    kubeconfig()
    server = Server()
    with pytest.raises(ConfigurationError) as caught, server._errors():
        raise error
    assert type(caught.value) is kind
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


class Slow(BaseHTTPRequestHandler):
    """Lists nothing, after a while, and then has no more to say."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.release()
        watch = "watch=true" in self.path.lower()
        if not watch:
            time.sleep(0.5)
        answer = b'{"metadata": {"resourceVersion": "1"}, "items": []}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(1000 if watch else len(answer)))
        self.end_headers()
        if watch:
            self.server.over.wait()
        else:
            self.wfile.write(answer)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("requests", [1, 2], ids=["is asked for a list", "is watched"])
def test_nothing_is_read_any_more_after_it_is_left(kubeconfig, requests):
    # In a thread that is still in the client at the end of the process, which then is aborted.
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as http:
        http.asked, http.over = threading.Semaphore(0), threading.Event()
        threading.Thread(target=http.serve_forever).start()
        try:
            address = f"http://127.0.0.1:{http.server_port}"
            kubeconfig(clusters=[{"name": "c", "cluster": {"server": address}}])
            server = Server()
            read = []
            reader = threading.Thread(
                target=lambda: read.extend(server.changes("Pod")), daemon=True
            )
            reader.start()
            for _ in range(requests):
                assert http.asked.acquire(timeout=30)
            server.leave([reader])
            assert not reader.is_alive()
            assert read[0].type == "LISTED"
        finally:
            http.over.set()
            http.shutdown()
