"""A page to draw or upload a digit on, and the same network for programs, over HTTP.

    python -m trainer.serve mnist.h5        # http://127.0.0.1:7860

The page is Gradio's; it needs no network but the way from the browser to this machine. Pictures
are read by ``inference.decoders``, after ``inference.web.request_filter`` has looked at what comes.
"""

import base64
import contextlib
import dataclasses
import errno
import html
import importlib.util
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from trainer import cli
from trainer.errors import ConfigurationError, DataError, TrainerError, UsageError
from trainer.inference.web.request_filter import Gate
from trainer.signals import Signals

if TYPE_CHECKING:  # --help loads none of them.
    import gradio as gr
    import numpy as np
    from starlette.types import ASGIApp

    from trainer.inference import decoders

PROG = "python -m trainer.serve"

Classify = Callable[["np.ndarray"], "np.ndarray"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serves a page to draw or upload a digit on, and the same as an API.

    Raises:
        UsageError: A value is outside its range.
    """

    model: Positional[Path] = Path("mnist.h5")
    """The model, as python -m trainer.task writes it."""

    host: str = "127.0.0.1"
    """The address to listen at. 127.0.0.1: this machine
    alone can reach it; 0.0.0.0: every machine that
    reaches this one, and nobody is asked for a password."""

    port: int = 7860
    """The port to listen at; 0: a free one."""

    max_upload_mb: int = 10
    """The largest picture, in megabytes of its file."""

    def __post_init__(self) -> None:
        for field, least, most in (("port", 0, 65535), ("max_upload_mb", 1, 64)):
            if not least <= (value := getattr(self, field)) <= most:
                raise UsageError(
                    f"{field} must be a whole number from {least} to {most}. Received: "
                    f"{field}={value}. Use {getattr(ServeConfig, field)}, the default."
                )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return cli.run(PROG, ServeConfig, serve, argv)


def serve(config: ServeConfig) -> None:
    """Serves the page until Ctrl-C or SIGTERM.

    Raises:
        ConfigurationError: There is no Gradio, or nothing can listen at this address.
        InputError: There is no model.
        DataError: It is another network's, or damaged.
    """
    if not importlib.util.find_spec("gradio"):
        raise ConfigurationError(
            "Expected Gradio. Received: a Python without it. "
            "Install it: pip install 'digits-trainer[web]'"
        )
    from trainer.inference import decoders

    with (
        Signals(),
        contextlib.suppress(KeyboardInterrupt),  # The usual end.
        _listen(config) as listener,
        _folder() as folder,
        decoders.start(1) as read,
    ):
        page = build(read, _compile(config.model), config.model.name)
        app = _mount(page, folder, config.max_upload_mb * 2**20)
        print(f"{config.model} answers at {_url(listener)}  (Ctrl-C ends it)", flush=True)
        _run(app, listener)


@contextlib.contextmanager
def _listen(config: ServeConfig) -> Iterator[socket.socket]:
    """Opens the port, before anything that takes its time."""
    where = f"{config.host}:{config.port}"
    try:
        family, *_, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[
            0
        ]
        listener = socket.create_server(address, family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"Expected a free port. Received: {where}, at which another program listens. "
                "Use --port 0 for a free one, or end that program."
            ) from error
        raise ConfigurationError(
            f"Expected an address of this machine to listen at. Received: {where} "
            f"({error.strerror}). Use --host 127.0.0.1 and a --port above 1023."
        ) from error
    with listener:
        yield listener


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder for all that Gradio writes: this run's alone, and gone with it."""
    with tempfile.TemporaryDirectory(prefix="digits-", ignore_cleanup_errors=True) as folder:
        os.environ |= {
            "GRADIO_TEMP_DIR": folder,
            "GRADIO_EXAMPLES_CACHE": folder,
            # Else it tells its makers that it was started, and asks them for its newest version.
            "GRADIO_ANALYTICS_ENABLED": "False",
        }
        yield Path(folder).resolve()


def _compile(path: Path) -> Classify:
    """Loads the model, and compiles it before the first picture comes."""
    from trainer.inference import model_file
    from trainer.runtime import tf

    cnn = model_file.load(path)

    @tf.function(input_signature=[tf.TensorSpec((28, 28), tf.uint8)])
    def probabilities(pixels: tf.Tensor) -> tf.Tensor:
        inputs = tf.cast(pixels[tf.newaxis, ..., tf.newaxis], tf.float32) / 255.0
        return cnn(inputs, training=False)[0]

    probabilities(tf.zeros((28, 28), tf.uint8))
    return lambda pixels: probabilities(pixels).numpy()


def build(read: "decoders.Decode", classify: Classify, name: str) -> "gr.Blocks":
    """Builds the page, and its endpoint ``predict``.

    Args:
        read: Has a picture read, one at a time, however many ask (``trainer.inference.decoders``).
        classify: Gives the ten probabilities of uint8 (28, 28), 0 for paper and 255 for ink.
        name: What the page calls the model.
    """
    import gradio as gr

    def see(picture: object) -> tuple["np.ndarray", "np.ndarray"]:
        _, [found] = read(*_source(picture), "one").result()
        return classify(found.pixels), found.pixels

    def show(picture: object) -> tuple:
        if not picture:  # Cleared.
            return None, None
        try:
            probabilities, pixels = see(picture)
        except TrainerError as error:
            # gr.Error would leave the answer to the picture before.
            gr.Warning(html.escape(str(error), quote=False))
            return None, None
        return {str(digit): float(p) for digit, p in enumerate(probabilities)}, pixels

    def predict(image: gr.FileData) -> dict:
        """Says which digit a picture shows, and the probabilities of 0 to 9, in this order."""
        try:
            probabilities, _ = see(image)
        except TrainerError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return {"digit": int(probabilities.argmax()), "probabilities": probabilities.tolist()}

    # What was uploaded goes after ten minutes.
    with gr.Blocks(title="Which digit is it?", delete_cache=(60, 600)) as page:
        gr.Markdown(f"# Which digit is it?\nDraw one or upload a picture, and `{name}` answers.")
        with gr.Row():
            with gr.Column(min_width=400):
                with gr.Tab("Draw"):
                    paper = gr.HTML(
                        html_template=_PAPER, css_template=_PAPER_CSS, js_on_load=_PAPER_JS
                    )
                with gr.Tab("Upload"):
                    picture = gr.Image(
                        sources=["upload", "clipboard"], buttons=[], show_label=False, height=400
                    )
            with gr.Column(min_width=240):
                seen = gr.Image(
                    label="What the network sees",
                    format="png",
                    buttons=[],
                    elem_id="seen",
                    height=300,
                )
            with gr.Column(min_width=240):
                answer = gr.Label(label="What it says")
        # As it comes: Gradio would read it first, with other limits and other words.
        options = {"preprocess": False, "api_visibility": "private", "show_progress": "hidden"}
        paper.input(show, paper, [answer, seen], **options)
        picture.change(show, picture, [answer, seen], **options)
        gr.api(predict, api_name="predict")
    return page.queue(max_size=32)


def _source(picture: object) -> tuple[Path | bytes, str]:
    """Returns a picture as it can be read, and what to call it.

    Args:
        picture: ``{"path": ...}``, an uploaded file, or a text ``data:...;base64,...``.

    >>> _source("data:text/plain;base64,c2V2ZW4=")
    (b'seven', 'data:text/plain;base64')
    """
    if isinstance(picture, dict) and isinstance(path := picture.get("path"), str):
        return Path(path), Path(path).name
    if isinstance(picture, str) and ";base64," in picture:
        kind, _, content = picture.partition(",")
        with contextlib.suppress(ValueError):
            return base64.b64decode(content), kind[:40]
    raise DataError(
        'Expected a picture as {"path": ...}, once it is uploaded, or as "data:image/png;base64,'
        f'...". Received: {str(picture)[:100]!r}.'
    )


# Not Gradio's Sketchpad, which needs WebGL, and a click on its brush before the first stroke.
_PAPER = """
<canvas width="400" height="400" aria-label="Paper to draw a digit on"></canvas>
<button type="button">Clear</button>
"""

_PAPER_CSS = """
canvas {
    display: block; width: 100%; max-width: 400px; aspect-ratio: 1; cursor: crosshair;
    touch-action: none; border: 1px solid var(--border-color-primary);
    border-radius: var(--block-radius);
}
button {
    margin-top: 8px; padding: 4px 12px; cursor: pointer; font-size: var(--button-small-text-size);
    font-weight: normal; border-radius: var(--button-small-radius);
    background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color);
}
"""

_PAPER_JS = """
const paper = element.querySelector("canvas"), pen = paper.getContext("2d");
const blank = () => { pen.fillStyle = "white"; pen.fillRect(0, 0, paper.width, paper.height); };
const handIn = picture => { props.value = picture; trigger("input"); };
const draw = event => {
    const edge = paper.getBoundingClientRect(), scale = paper.width / edge.width;
    pen.lineTo((event.clientX - edge.left) * scale, (event.clientY - edge.top) * scale);
    pen.stroke();
};
blank();
Object.assign(pen, { lineWidth: 28, lineCap: "round", lineJoin: "round", strokeStyle: "black" });
paper.onpointerdown = event => {
    paper.setPointerCapture(event.pointerId);
    pen.beginPath();
    draw(event);
    draw(event);  // A dot is a line to where it began.
};
paper.onpointermove = event => { if (paper.hasPointerCapture(event.pointerId)) draw(event); };
paper.onlostpointercapture = () => handIn(paper.toDataURL());
element.querySelector("button").onclick = () => { blank(); handIn(null); };
"""

# Eight pixels of the screen for one of the 28×28; important, because Gradio has rules for it too.
_PAGE_CSS = """
#seen img {
    width: 224px !important; height: 224px !important; object-fit: fill !important;
    image-rendering: pixelated;
}
"""


def _mount(page: "gr.Blocks", folder: Path, most: int) -> "ASGIApp":
    """Makes of the page what a server runs."""
    import gradio as gr
    from fastapi import FastAPI

    # The system's fonts, so that none is fetched.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        theme=theme,
        css=_PAGE_CSS,
        max_file_size=most,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
    )
    return Gate(app, uploads=folder, most=most)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104  (every address of this machine, this one too)
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _run(app: "ASGIApp", listener: socket.socket) -> None:
    """Serves until a signal comes, which is raised once more at the end."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # An open page keeps a connection for ever. That it is cut off is no error.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
    Server(config).run(sockets=[listener])


if __name__ == "__main__":
    sys.exit(main())
