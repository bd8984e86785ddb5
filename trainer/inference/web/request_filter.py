"""What may reach Gradio: every request is looked at before.

    app = Gate(app, uploads=folder, most=10 * 2**20)

Both are ASGI applications.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # --help loads none of them.
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Gate:
    """Looks at every request before Gradio does, which (6.31) reads bodies of any size into memory,
    downloads what a URL names, and, mounted in an app, copies the file that any path names.

    Args:
        app: What to guard.
        uploads: The folder of the uploaded files; a request may name no file elsewhere.
        most: Bytes of the largest picture.
    """

    def __init__(self, app: "ASGIApp", *, uploads: Path, most: int) -> None:
        self.app = app
        self.uploads = uploads
        self.most = most

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answers a request, as ASGI has it."""
        if scope["type"] == "http":
            from starlette.requests import ClientDisconnect, Request
            from starlette.responses import JSONResponse

            try:
                receive = await self._look(Request(scope, receive), receive)
            except ClientDisconnect:
                return
            except _RefusedError as refused:
                status, sentence = refused.args
                await JSONResponse({"error": sentence}, status)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def _look(self, request: "Request", receive: "Receive") -> "Receive":
        """Returns where the body, which is read here, can be had from once more."""
        path = request.scope["path"]
        posted = request.method == "POST"
        if path not in _POSTS if posted else path.startswith(_CLOSED):
            raise _RefusedError(404, f"Expected an address of the page. Received: {path[:200]}.")
        if not posted:
            return receive
        size = request.headers.get("Content-Length", "")
        if not size.isdecimal():
            raise _RefusedError(411, "Expected a Content-Length. Received: a request without it.")
        if int(size) > self.most * 4 // 3 + 100_000:  # A drawing comes in base64.
            raise _RefusedError(
                413,
                f"Expected a picture of at most {self.most / 2**20:g} MB. Received: "
                f"{int(size) / 2**20:.1f} MB. Make it smaller.",
            )
        if path == _UPLOAD:  # Gradio writes it to the folder as it comes.
            return receive
        body = await request.body()
        try:
            files = list(_files(json.loads(body)))
            elsewhere = [name for name in files if not self._is_upload(name)]
        except (ValueError, RecursionError):
            raise _RefusedError(400, "Expected JSON. Received: something else.") from None
        if elsewhere:
            raise _RefusedError(
                403,
                f"Expected an uploaded picture. Received: {elsewhere[0][:200]}. Upload it first.",
            )

        async def again() -> "Message":
            nonlocal body
            if body is None:
                return await receive()
            message, body = {"type": "http.request", "body": body}, None
            return message

        return again

    def _is_upload(self, name: str) -> bool:
        return Path(name).resolve().is_relative_to(self.uploads)


_UPLOAD = "/gradio_api/upload"

# What the page and gradio_client post to. Gradio has more, to convert videos for example.
_POSTS = (
    _UPLOAD,
    "/gradio_api/queue/join",
    "/gradio_api/run/predict",
    "/gradio_api/call/predict",
)
# It would fetch these from elsewhere.
_CLOSED = ("/gradio_api/file=http", "/gradio_api/file/", "/gradio_api/proxy=")


class _RefusedError(Exception):
    """A request that goes no further: HTTP status, sentence."""


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
