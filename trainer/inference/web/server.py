"""The server of the page and its endpoint.

    with server.temporary_folder() as folder:
        blocks = page.build(classify, "mnist.h5")
        app = server.assemble(blocks, uploads=folder, max_bytes=10 * 2**20)
        server.run(app, listener)

It is Gradio in a FastAPI application behind ``RequestFilter``, run by uvicorn.
"""

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.inference.web.page import PAGE_CSS
from trainer.inference.web.request_filter import RequestFilter

if TYPE_CHECKING:  # Loading it takes seconds.
    import gradio as gr
    from starlette.types import ASGIApp


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for everything that Gradio writes: for this run alone, and removed with it. Gradio
    reads where it is from the environment.
    """
    with tempfile.TemporaryDirectory(prefix="digits-", ignore_cleanup_errors=True) as folder:
        os.environ |= {
            "GRADIO_TEMP_DIR": folder,
            "GRADIO_EXAMPLES_CACHE": folder,
            # Otherwise Gradio sends telemetry, and looks up its newest version.
            "GRADIO_ANALYTICS_ENABLED": "False",
        }
        yield Path(folder).resolve()


def assemble(page: "gr.Blocks", *, uploads: Path, max_bytes: int) -> "ASGIApp":
    """Returns the page as an ASGI application, behind the request filter.

    Args:
        page: As ``page.build`` returns it.
        uploads: The folder of the uploaded files.
        max_bytes: Size of the largest picture.
    """
    import gradio as gr
    from fastapi import FastAPI

    # The system's fonts, so that none is fetched.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        theme=theme,
        css=PAGE_CSS,
        max_file_size=max_bytes,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
    )
    return RequestFilter(app, uploads=uploads, max_bytes=max_bytes)


def run(app: "ASGIApp", listener: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM, which uvicorn raises once more at the end."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # An open page keeps a connection for ever. Closing it is not an error to log.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            await super().shutdown(sockets)

    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
    Server(config).run(sockets=[listener])
