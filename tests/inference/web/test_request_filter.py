"""Which requests reach the application behind the filter."""

import json

import pytest

pytest.importorskip("starlette")

from starlette.testclient import TestClient

from trainer.inference.web.request_filter import RequestFilter

MAX_BYTES = 100_000
PREDICT = "/gradio_api/run/predict"


class Application:
    """Keeps the bodies of the requests that reach it."""

    def __init__(self):
        self.bodies = []

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message.get("more_body", False)
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})


@pytest.fixture
def application():
    return Application()


@pytest.fixture
def client(application, tmp_path):
    (tmp_path / "uploads").mkdir()
    uploads = (tmp_path / "uploads").resolve()
    return TestClient(RequestFilter(application, uploads=uploads, max_bytes=MAX_BYTES))


def test_a_request_of_the_page_is_passed_on_whole(client, application, tmp_path):
    assert client.get("/").status_code == 204
    assert client.get("/gradio_api/file=picture.png").status_code == 204
    content = bytes(MAX_BYTES)
    assert client.post("/gradio_api/upload", content=content).status_code == 204
    body = json.dumps({"data": [{"path": str(tmp_path / "uploads" / "a.png")}]}).encode()
    assert client.post(PREDICT, content=body).status_code == 204
    assert application.bodies == [b"", b"", content, body]


@pytest.mark.parametrize(
    "picture",
    [
        {"path": "/etc/passwd"},
        {"path": ""},
        {"path": "uploads/../../secret"},
        {"path": "https://example.com/seven.png", "meta": {"_type": "gradio.FileData"}},
        [{"image": {"path": "/etc/passwd"}}],
        {"a": {"b": [[{"path": "/etc/passwd"}]]}},
    ],
)
def test_a_file_that_was_not_uploaded_is_refused(client, application, picture):
    answer = client.post(PREDICT, json={"data": [picture]})
    assert answer.status_code == 403
    assert answer.json()["error"].startswith("Expected an uploaded picture. Received: ")
    assert application.bodies == []


def test_a_link_out_of_the_folder_is_not_followed(client, application, tmp_path):
    (tmp_path / "uploads" / "link.png").symlink_to("/etc/passwd")
    path = str(tmp_path / "uploads" / "link.png")
    assert client.post(PREDICT, json={"data": [{"path": path}]}).status_code == 403


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/gradio_api/file=http://example.com/", None, 404),
        ("GET", "/gradio_api/%66ile=http://example.com/", None, 404),
        ("GET", "/gradio_api/file/http://example.com/", None, 404),
        ("GET", "/gradio_api/proxy=http://example.com/", None, 404),
        ("POST", "/", b"{}", 404),
        ("POST", "/gradio_api/process_recording", b"{}", 404),
        ("POST", "/gradio_api/run/other", b"{}", 404),
        ("POST", PREDICT, b"no JSON", 400),
        ("POST", PREDICT, b"\xff", 400),
        ("POST", PREDICT, b"[" * 100_000, 400),
        ("POST", PREDICT, b'{"path": "a\\u0000b"}', 400),
        ("POST", PREDICT, bytes(MAX_BYTES * 4 // 3 + 100_001), 413),
        ("POST", "/gradio_api/upload", bytes(MAX_BYTES * 4 // 3 + 100_001), 413),
        ("POST", PREDICT, iter([b"{}"]), 411),
    ],
)
def test_any_other_request_has_its_status_and_goes_no_further(
    client, application, method, path, content, status
):
    answer = client.request(method, path, content=content)
    assert answer.status_code == status
    assert answer.json()["error"].startswith("Expected ")
    assert application.bodies == []
