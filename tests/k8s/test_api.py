"""Errors of an API server and the end of a watch; ``tests/cluster`` has a real server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from kubernetes.client import ApiException

from trainer.errors import ConfigurationError
from trainer.k8s.api import NotFoundError, RefusedError, Server

DEADLOCK = 120.0  # Seconds after which a wait that never ends becomes a failure.

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


class Silent(BaseHTTPRequestHandler):
    """Answers a list, once it may, with no objects; a watch of them never ends by itself."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.release()
        watch = "watch=true" in self.path.lower()
        if not watch:
            assert self.server.may_list.wait(DEADLOCK)
        answer = b'{"metadata": {"resourceVersion": "1"}, "items": []}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(1000 if watch else len(answer)))
        self.end_headers()
        if watch:
            self.server.over.wait(DEADLOCK)
        else:
            self.wfile.write(answer)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("during", ["list", "watch"])
def test_no_thread_is_left_in_the_client_after_close(kubeconfig, monkeypatch, during):
    # At the exit of the interpreter such a thread would abort the process.
    monkeypatch.setattr("trainer.k8s.api.CLOSE_SECONDS", DEADLOCK)
    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as http:
        http.requests, http.may_list, http.over = (
            threading.Semaphore(0),
            threading.Event(),
            threading.Event(),
        )
        threading.Thread(target=http.serve_forever).start()
        try:
            address = f"http://127.0.0.1:{http.server_port}"
            kubeconfig(clusters=[{"name": "c", "cluster": {"server": address}}])
            server = Server()
            if during == "list":
                http.may_list = server.closed  # The answer comes when close() has begun.
            else:
                http.may_list.set()
            read = []
            reader = threading.Thread(
                target=lambda: read.extend(server.changes("Pod")), daemon=True
            )
            reader.start()
            for _ in range(1 if during == "list" else 2):
                assert http.requests.acquire(timeout=DEADLOCK)
            assert reader.is_alive()
            server.close([reader])
            assert not reader.is_alive()
            assert read[0].type == "LISTED"
        finally:
            http.over.set()
            http.shutdown()
