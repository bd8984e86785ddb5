"""ASGI middleware that decides which requests reach Gradio.

    app = RequestFilter(app, uploads=folder, max_bytes=10 * 2**20)

It rejects requests that would make Gradio read other files, fetch URLs, or fill the memory.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # --help loads none of them.
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class RequestFilter:
    """Checks every request before Gradio gets it, which (6.31) reads bodies of any size into
    memory, downloads what a URL names, and, mounted in an app, copies the file that any path names.

    Args:
        app: The application to protect.
        uploads: The folder of the uploaded files; a request may name no file elsewhere.
        max_bytes: Size of the largest picture.
    """

    def __init__(self, app: "ASGIApp", *, uploads: Path, max_bytes: int) -> None:
        self.app = app
        self.uploads = uploads
        self.max_bytes = max_bytes

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Rejects a request, or passes it on; the signature is ASGI's."""
        if scope["type"] == "http":
            from starlette.requests import ClientDisconnect, Request
            from starlette.responses import JSONResponse

            try:
                receive = await self._check(Request(scope, receive), receive)
            except ClientDisconnect:
                return
            except _RejectedError as rejected:
                status, sentence = rejected.args
                await JSONResponse({"error": sentence}, status)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def _check(self, request: "Request", receive: "Receive") -> "Receive":
        """Reads the body, where it is JSON; returns what delivers it once more."""
        path = request.scope["path"]
        posted = request.method == "POST"
        if path not in _POST_PATHS if posted else path.startswith(_PROXY_PREFIXES):
            raise _RejectedError(404, f"Expected an address of the page. Received: {path[:200]}.")
        if not posted:
            return receive
        size = request.headers.get("Content-Length", "")
        if not size.isdecimal():
            raise _RejectedError(411, "Expected a Content-Length. Received: a request without it.")
        if int(size) > self.max_bytes * 4 // 3 + 100_000:  # A drawing comes in base64.
            raise _RejectedError(
                413,
                f"Expected a picture of at most {self.max_bytes / 2**20:g} MB. Received: "
                f"{int(size) / 2**20:.1f} MB. Make it smaller.",
            )
        if path == _UPLOAD:  # Gradio writes it to the folder as it comes.
            return receive
        body = await request.body()
        try:
            files = list(_files(json.loads(body)))
            elsewhere = [name for name in files if not self._is_upload(name)]
        except (ValueError, RecursionError):
            raise _RejectedError(400, "Expected JSON. Received: something else.") from None
        if elsewhere:
            raise _RejectedError(
                403,
                f"Expected an uploaded picture. Received: {elsewhere[0][:200]}. Upload it first.",
            )
        return _replay(body, receive)

    def _is_upload(self, name: str) -> bool:
        return Path(name).resolve().is_relative_to(self.uploads)


_UPLOAD = "/gradio_api/upload"

# What the page and gradio_client post to. Gradio has more, to convert videos for example.
_POST_PATHS = (
    _UPLOAD,
    "/gradio_api/queue/join",
    "/gradio_api/run/predict",
    "/gradio_api/call/predict",
)
# Gradio would fetch what follows from elsewhere.
_PROXY_PREFIXES = ("/gradio_api/file=http", "/gradio_api/file/", "/gradio_api/proxy=")


class _RejectedError(Exception):
    """A request that goes no further: HTTP status, sentence."""


def _replay(body: bytes, receive: "Receive") -> "Receive":
    """Returns what delivers a body that was read, and then what ``receive`` does."""
    messages: list[Message] = [{"type": "http.request", "body": body}]

    async def replay() -> "Message":
        return messages.pop() if messages else await receive()

    return replay


def _files(value: object) -> Iterator[str]:
    """Finds the files that a request names.

    >>> list(_files({"data": [{"path": "a"}, [{"image": {"path": "b", "url": "c"}}]]}))
    ['a', 'b']
    """
    if isinstance(value, dict):
        if isinstance(name := value.get("path"), str):
            yield name
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _files(part)
