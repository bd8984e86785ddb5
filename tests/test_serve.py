"""The page in a browser, its endpoint, and what is refused."""

import base64
import contextlib
import http.client
import io
import json
import re
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import COLOURS, TIMEOUT, Command

from trainer import cli, serve
from trainer.errors import UsageError


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "65536"], "port must be a whole number from 0 to 65535."),
        (["--port", "-1"], "port must be a whole number from 0 to 65535."),
        (["--max-upload-mb", "0"], "max_upload_mb must be a whole number from 1 to 64."),
        (["one.h5", "two.h5"], "Unrecognized options: two.h5."),
    ],
)
def test_a_wrong_flag_is_one_line(argv, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        cli.parse(serve.PROG, serve.ServeConfig, argv)


def test_flags_make_the_configuration():
    assert cli.parse(serve.PROG, serve.ServeConfig, []) == serve.ServeConfig()
    config = cli.parse(serve.PROG, serve.ServeConfig, ["my.h5", "--port", "0"])
    assert config == serve.ServeConfig(model=Path("my.h5"), port=0)
    assert serve.ServeConfig().host == "127.0.0.1"  # No other machine, unless asked for.


def assert_one_line(done, code, *words):
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


@pytest.mark.full
def test_a_missing_model_is_66(command):
    command.program = ["-m", "trainer.serve"]
    assert_one_line(command.run("nowhere.h5", "--port", 0), 66, "nowhere.h5")


def test_an_address_that_cannot_be_listened_at_is_78(command):
    command.program = ["-m", "trainer.serve"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line(command.run("--port", port), 78, f"127.0.0.1:{port}", "--port 0")
    # 192.0.2.0/24 is nobody's (RFC 5737).
    assert_one_line(command.run("--host", "192.0.2.1"), 78, "192.0.2.1", "--host 127.0.0.1")


def test_an_installation_without_the_extra_is_78(command):
    command.program = [
        "-c",
        "import sys; sys.modules['gradio'] = None\n"
        "from trainer.serve import main; sys.exit(main())",
    ]
    assert_one_line(command.run(), 78, "pip install 'digits-trainer[web]'")


class Server:
    """The command, answering, and what it connects to."""

    # Python says what it is about to connect to, and whose address it asks for.
    LISTEN_IN = """
import os, sys
def note(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        with open(os.environ["CONNECTIONS"], "a") as file:
            print(args[1][0] if event == "socket.connect" else args[0], file=file)
sys.addaudithook(note)
"""

    def __init__(self, folder: Path, model: Path) -> None:
        self.connections = folder / "connections"
        self.connections.touch()
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        (folder / "sitecustomize.py").write_text(self.LISTEN_IN)
        command = Command(folder, folder)
        command.program = ["-m", "trainer.serve"]
        command.env |= {"TMPDIR": str(self.temporary), "CONNECTIONS": str(self.connections)}
        command.env["PYTHONPATH"] += f":{folder}"
        self.process = command.start(model, "--port", 0)
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.url = re.search(r"http://127\.0\.0\.1:\d+", line)[0]

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
        """Returns status and body of an answer, which may come before all is sent."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=TIMEOUT)
        with contextlib.closing(connection):
            with contextlib.suppress(ConnectionError):
                connection.request("GET" if body is None else "POST", path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def predict(self, picture: object) -> tuple[int, dict]:
        body = json.dumps({"data": [picture]}).encode()
        headers = {"Content-Type": "application/json"}
        status, answer = self.ask("/gradio_api/run/predict", body, **headers)
        return status, json.loads(answer)

    def upload(self, content: bytes) -> tuple[int, str]:
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        body = head + content + b"\r\n--x--\r\n"
        return self.ask("/gradio_api/upload", body, **headers)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        """Returns the exit code, and what it has said beside its line."""
        self.process.send_signal(number)
        said = "".join(self.process.communicate(timeout=TIMEOUT))
        return self.process.returncode, said


@pytest.fixture(scope="module")
def model(trained):
    return trained / "mnist.h5"


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"), model)
    try:
        yield server
    finally:
        code, said = server.end(signal.SIGTERM)
    # Whatever the tests have sent it, it has complained of nothing, and leaves nothing.
    assert (code, said) == (0, "")
    assert not list(server.temporary.glob("digits-*"))
    assert set(server.connections.read_text().split()) <= {"127.0.0.1"}


@contextlib.contextmanager
def browser(server: Server):
    """A page of Chromium's at the server, and the URLs that it asked for."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        window = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = window.new_page(viewport={"width": 1200, "height": 800})
        page.set_default_timeout(60_000)
        sync_api.expect.set_options(timeout=1000 * TIMEOUT)
        requests, failures = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: failures.append(error))
        page.on(
            "response",
            lambda response: response.status >= 400 and failures.append(response.url),
        )
        page.goto(server.url)
        page.locator("#pixels").wait_for()
        yield page, sync_api.expect
        window.close()
        assert not failures
        assert requests
        near = (f"{server.url}/", "data:", f"blob:{server.url}/")
        assert [url for url in requests if not url.startswith(near)] == []


def draw(page, *points: tuple[float, float]) -> None:
    """Draws a line with the mouse, through points of the unit square."""
    box = page.locator("canvas").bounding_box()
    for number, (x, y) in enumerate(points):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=8)
        if number == 0:
            page.mouse.down()
    page.mouse.up()


def png(pixels: np.ndarray) -> bytes:
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def one_of_each(mnist) -> np.ndarray:
    """Returns the first test image of each digit."""
    return mnist.x_test[[list(mnist.y_test).index(digit) for digit in range(10)]]


SEVEN = ((0.28, 0.26), (0.42, 0.24), (0.7, 0.25), (0.6, 0.45), (0.52, 0.62), (0.46, 0.8))


@pytest.mark.full
def test_a_drawn_7_is_a_7_until_it_is_cleared(server):
    with browser(server) as (page, expect):
        draw(page, *SEVEN)
        answer = page.get_by_test_id("label-output-value")
        expect(answer).to_have_text("7")
        expect(page.get_by_test_id("label").locator("dt")).to_have_count(10)
        seen = page.locator("#pixels img")
        # Waits: its place is there before its pixels are.
        for name, pixels in {"naturalWidth": 28, "naturalHeight": 28}.items():
            expect(seen).to_have_js_property(name, pixels)
        assert seen.evaluate("e => [e.width, e.height]") == [224, 224]
        page.get_by_role("button", name="Clear").click()
        expect(answer).to_have_count(0)
        expect(seen).to_have_count(0)
        draw(page, (0.5, 0.2), (0.5, 0.8))  # the 7 is gone from the paper, too
        expect(answer).to_have_text("1")


@pytest.mark.full
def test_an_upload_is_its_digit_or_a_sentence(server, mnist):
    seven = png(one_of_each(mnist)[7])
    bomb = png(np.zeros((10_000, 10_000), np.uint8))
    with browser(server) as (page, expect):
        page.get_by_role("tab", name="Upload").click()
        answer, toast = page.get_by_test_id("label-output-value"), page.get_by_test_id("toast-body")
        for content, sentence in (
            (b"no image", "Expected an image at a.png. Received: a file that is none of PNG"),
            (seven[: len(seven) // 2], "a truncated or damaged file"),
            (png(np.full((200, 200), 255, np.uint8)), "a blank picture"),
            (bomb, "40,000,000"),
            (seven + bytes(20 * 2**20), "exceed the maximum allowed size of 10"),
        ):
            # What was said of the picture before is not said of this one.
            upload(page, seven)
            expect(answer).to_have_text("7")
            upload(page, content)
            expect(toast).to_contain_text(sentence)
            if "exceed" not in sentence:  # That is not sent at all.
                expect(answer).to_have_count(0)
            page.reload()
            page.get_by_role("tab", name="Upload").click()


def upload(page, content: bytes) -> None:
    file = {"name": "a.png", "mimeType": "image/png", "buffer": content}
    page.locator("input[type=file]").first.set_input_files(file)


@pytest.mark.full
def test_the_endpoint_answers_as_keras_does(server, model, mnist):
    keras = pytest.importorskip("keras")
    from trainer.inference import segmentation

    digits = one_of_each(mnist)
    seen = np.stack([segmentation.find(digit)[0].pixels for digit in digits])
    expected = keras.models.load_model(model).predict(seen[..., None] / 255.0, verbose=0)
    assert (expected.argmax(axis=1) == range(10)).sum() >= 8
    for digit, probabilities in zip(digits, expected, strict=True):
        text = f"data:image/png;base64,{base64.b64encode(png(digit)).decode()}"
        status, path = server.upload(png(digit))
        assert status == 200
        for picture in (text, {"path": json.loads(path)[0]}):
            status, answer = server.predict(picture)
            assert status == 200
            (said,) = answer["data"]
            assert said["digit"] == probabilities.argmax()
            np.testing.assert_allclose(said["probabilities"], probabilities, atol=1e-5)


@pytest.mark.full
def test_gradios_client_gets_an_answer_or_the_sentence(server, mnist, tmp_path):
    program = """
import sys
from gradio_client import Client, handle_file
client = Client(sys.argv[1], verbose=False)
print(client.predict(handle_file("seven.png"), api_name="/predict")["digit"])
try:
    client.predict(handle_file("notes.txt"), api_name="/predict")
except Exception as error:
    print(error)
"""
    (tmp_path / "seven.png").write_bytes(png(one_of_each(mnist)[7]))
    (tmp_path / "notes.txt").write_text("no image")
    command = Command(tmp_path, tmp_path)
    command.program = ["-c", program]
    digit, sentence = command.run(server.url).stdout.splitlines()
    assert digit == "7"
    assert sentence.startswith("Expected an image at notes.txt. Received: a file that is none of")


@pytest.mark.full
def test_the_endpoint_refuses_in_a_sentence_and_lives_on(server, mnist, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    other = str(tmp_path / "secret.txt")
    marked = {"meta": {"_type": "gradio.FileData"}}  # What marks a file for Gradio.
    blank = base64.b64encode(png(np.full((50, 50), 255, np.uint8))).decode()
    for picture, code, sentence in (
        (None, 500, "Received: 'None'"),
        ("seven", 500, "Received: 'seven'"),
        ("data:image/png;base64,A", 500, "Expected a picture as"),
        ("data:image/png;base64,AAAA", 500, "a file that is none of PNG"),
        (f"data:image/png;base64,{blank}", 500, "a blank picture"),
        ({"path": other}, 403, f"Expected an uploaded picture. Received: {other}."),
        ({"path": other, **marked}, 403, f"Expected an uploaded picture. Received: {other}."),
        ([{"a": {"path": "/etc/passwd", **marked}}], 403, "/etc/passwd"),
        ({"path": f"{server.temporary}/../secret"}, 403, "secret"),
        ({"path": "http://192.0.2.1/seven.png", **marked}, 403, "http://192.0.2.1/seven.png"),
        ({"path": ""}, 403, "Expected an uploaded picture."),
        ({"path": "a\0b"}, 400, "Expected JSON."),
    ):
        status, answer = server.predict(picture)
        assert (status, answer["error"].count("\n")) == (code, 0)
        assert sentence in answer["error"]
    for path, body, headers, code in (
        (f"/gradio_api/file={other}", None, {}, 403),
        ("/gradio_api/file=/etc/passwd", None, {}, 403),
        ("/gradio_api/file=../../../../../../etc/passwd", None, {}, 403),
        ("/gradio_api/file=http://192.0.2.1/", None, {}, 404),
        ("/gradio_api/%66ile=http:%2F/192.0.2.1/", None, {}, 404),
        ("/gradio_api/file/http://192.0.2.1/", None, {}, 404),
        ("//gradio_api/file=http://192.0.2.1/", None, {}, 404),
        ("/gradio_api/proxy=http://192.0.2.1/", None, {}, 404),
        ("/gradio_api/process_recording", b"{}", {}, 404),
        ("/gradio_api/run/other", b'{"data": []}', {}, 404),
        ("/gradio_api/run/predict", b"no JSON", {}, 400),
        ("/gradio_api/run/predict", b"[" * 100_000, {}, 400),
        ("/gradio_api/run/predict", b'"' + bytes(20 * 2**20), {}, 413),
        ("/gradio_api/run/predict", iter([b"{}"]), {"Transfer-Encoding": "chunked"}, 411),
    ):
        status, answer = server.ask(path, body, **headers)
        assert status == code, path
        assert "secret" not in answer.replace(other, "")
    assert server.upload(bytes(20 * 2**20))[0] == 413
    assert server.upload(bytes(11 * 2**20))[0] == 413
    seven = base64.b64encode(png(one_of_each(mnist)[7])).decode()
    assert server.predict(f"data:image/png;base64,{seven}")[1]["data"][0]["digit"] == 7


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_though_a_page_is_open(model, tmp_path, number):
    server = Server(tmp_path, model)
    try:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=TIMEOUT)
        with contextlib.closing(connection):
            connection.request("GET", "/gradio_api/heartbeat/x")  # as an open page does
            assert connection.getresponse().readline()
            assert server.end(number) == (0, "")
    finally:
        server.process.kill()
    assert not list(server.temporary.glob("digits-*"))


@pytest.mark.full
def test_a_model_of_other_images_is_asked_by_upload(colour_run, tmp_path):
    server = Server(tmp_path, colour_run / "run" / "model.keras")
    red = (colour_run / "test" / "red" / "0.png").read_bytes()
    try:
        with browser(server) as (page, expect):
            assert page.locator("canvas").count() == 0
            answer = page.get_by_test_id("label-output-value")
            upload(page, red)
            expect(answer).to_have_text("red")
            expect(page.get_by_test_id("label").locator("dt")).to_have_count(3)
            expect(page.locator("#pixels img")).to_have_js_property("naturalHeight", 20)
        text = f"data:image/png;base64,{base64.b64encode(red).decode()}"
        status, answer = server.predict(text)
        assert status == 200
        (said,) = answer["data"]
        assert said["class"] == "red"
        assert list(said["probabilities"]) == list(COLOURS)
        assert server.predict("data:image/png;base64,AAAA")[0] == 500
    finally:
        assert server.end(signal.SIGTERM) == (0, "")


def test_a_network_is_for_other_images():
    with pytest.raises(UsageError, match=r"network is for a model\.keras"):
        serve.ServeConfig(network="a:b")
