"""What is said of an API server's refusals; ``tests/cluster`` has a real one."""

import json

import pytest
from kubernetes.client import ApiException

from trainer.apiserver import NotFoundError, RefusedError, Server
from trainer.errors import ConfigurationError

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
