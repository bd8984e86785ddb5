import json
import socket

import pytest

from trainer.config import TrainConfig
from trainer.diagnosis.environment import check_keras_json, check_proxies


@pytest.fixture
def keras_json(tmp_path):
    """Returns a function that gives the finding for the content of a keras.json."""

    def check(content):
        (tmp_path / "keras.json").write_text(content)
        (finding,) = check_keras_json({"KERAS_HOME": str(tmp_path)})
        assert str(tmp_path) in finding.seen
        return finding

    return check


def test_a_keras_json_with_which_keras_cannot_be_imported_is_an_error(keras_json):
    finding = keras_json(json.dumps({"floatx": "float8"}))
    assert finding.status == "error"
    assert "floatx='float8'" in finding.seen
    assert "keras.json" in finding.remedy


def test_a_keras_json_that_only_others_obey_is_a_warning(keras_json):
    assert keras_json("{").status == "warning"
    finding = keras_json('{"backend": "jax"}')
    assert finding.status == "warning"
    assert "jax" in finding.seen


def test_a_sound_keras_json_is_ok(keras_json):
    assert keras_json('{"floatx": "float16", "backend": "tensorflow"}').status == "ok"


def test_no_keras_json_is_ok(tmp_path):
    (finding,) = check_keras_json({"KERAS_HOME": str(tmp_path)})
    assert finding.status == "ok"


def test_a_proxy_that_does_not_answer_is_named():
    proxies = {"https_proxy": "http://me:secret@127.0.0.1:9"}
    (finding,) = check_proxies(TrainConfig(), proxies)
    assert finding.status == "warning"
    assert finding.seen.startswith("https_proxy=http://127.0.0.1:9: connection refused")
    assert "secret" not in str(finding)
    (finding,) = check_proxies(TrainConfig(data="keras"), proxies)
    assert "data='keras' is downloaded through it" in finding.seen


@pytest.mark.parametrize("value", ["http://", "http://a:port", "http://[::"])
def test_a_proxy_that_is_no_address_is_named(value):
    (finding,) = check_proxies(TrainConfig(), {"http_proxy": value})
    assert (finding.status, "http_proxy" in finding.seen) == ("warning", True)


def test_a_proxy_that_answers_is_ok():
    with socket.create_server(("127.0.0.1", 0)) as server:
        value = f"127.0.0.1:{server.getsockname()[1]}"
        (finding,) = check_proxies(TrainConfig(), {"HTTPS_PROXY": value})
    assert finding.status == "ok"
    (finding,) = check_proxies(TrainConfig(), {})
    assert finding.seen == "none set"
