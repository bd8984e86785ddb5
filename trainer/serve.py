"""The command: serves a page to draw or upload a digit on, and the same as an HTTP API.

    python -m trainer.serve mnist.h5        # http://127.0.0.1:7860
    python -m trainer.serve model.keras     # for pictures of other things, which are uploaded

``trainer.inference.web`` has the page, the API and the filter of requests. Nothing is loaded from
the network.
"""

import contextlib
import dataclasses
import errno
import importlib.util
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

from trainer import cli
from trainer.config import local_path
from trainer.errors import ConfigurationError, UsageError
from trainer.signals import Signals

if TYPE_CHECKING:  # --help loads none of these.
    from trainer.inference.classifier import Classifier

PROG = "python -m trainer.serve"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Serves a page to draw or upload a digit on, and the same as an API.

    Raises:
        UsageError: A value is outside its range.
    """

    model: Positional[Path] = Path("mnist.h5")
    """An mnist.h5, as python -m trainer.task writes it; or
    a model.keras with its model.json beside it."""

    network: str | None = None
    """The package.module:function that has made the
    network of a model.keras, which is run to make it
    again. Not for the built-in ones."""

    host: str = "127.0.0.1"
    """The address to listen at. 127.0.0.1: this machine
    alone can reach it; 0.0.0.0: every machine that
    reaches this one, and nobody is asked for a password."""

    port: int = 7860
    """The port to listen at; 0: a free one."""

    max_upload_mb: int = 10
    """The largest picture, in megabytes of its file."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", local_path("model", self.model))
        if self.network is not None and self.model.suffix != ".keras":
            raise UsageError(
                f"network is for a model.keras. Received: network={self.network!r} and "
                f"{self.model.name}. Leave it out."
            )
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
        DataError: It is a model of another network, or damaged.
    """
    if not importlib.util.find_spec("gradio"):
        raise ConfigurationError(
            "Expected Gradio. Received: a Python without it. "
            "Install it: pip install 'digits-trainer[web]'"
        )
    from trainer.inference.web import page, server

    with (
        Signals(),
        contextlib.suppress(KeyboardInterrupt),  # Ctrl-C is the normal way to end it.
        _listen(config) as listener,
        server.temporary_folder() as folder,
        _start(config) as (started, classes),
    ):
        started.load()  # Before the first request.
        app = server.assemble(
            page.build(
                lambda picture: next(started.classify([picture])), config.model.name, classes
            ),
            uploads=folder,
            max_bytes=config.max_upload_mb * 2**20,
        )
        print(f"{config.model} answers at {_url(listener)}  (Ctrl-C ends it)", flush=True)
        server.run(app, listener)


@contextlib.contextmanager
def _start(config: ServeConfig) -> "Iterator[tuple[Classifier, Sequence[str] | None]]":
    """Starts what classifies; yields the names of the classes, too, of other images than digits."""
    from trainer.inference import classifier

    load, shape, classes = classifier.load_digits(config.model), None, None
    if config.model.suffix == ".keras":
        from trainer.training import saved_model

        predictor, spec = saved_model.load_predictor(config.model, config.network)
        load, shape, classes = (lambda: predictor), spec.shape, spec.classes
    with classifier.start(load, processes=1, shape=shape) as started:
        yield started, classes


@contextlib.contextmanager
def _listen(config: ServeConfig) -> Iterator[socket.socket]:
    """Opens the port first, before anything slow."""
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


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104  (every address of this machine, this one too)
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


if __name__ == "__main__":
    sys.exit(main())
