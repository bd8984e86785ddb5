"""Metrics of a run for Prometheus, and whether it is alive, over HTTP.

    metrics = Metrics("127.0.0.1", 9090, deadline=step_deadline)
    with metrics.serve():
        metrics.step(position, {"loss": 0.3})   # curl http://127.0.0.1:9090/metrics

``/metrics`` has Prometheus' text format, ``/healthz`` 200 while the steps go on and 503 once none
has ended for too long, for a livenessProbe. ``trainer.reporting.exporter`` fills it.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from trainer.errors import ConfigurationError

CONNECTIONS = 16  # at the same time; a Prometheus server and a kubelet have one each
CLIENT_SECONDS = 10.0  # for a client to send its request and take the answer
NAMESPACE = "trainer"


class Metrics:
    """What is served about one run.

    Args:
        host: Address to listen at; ``*``: all.
        port: Port; 0: one that is free, which ``port`` names while it is served.
        deadline: Returns the seconds within which a step must end, from those of the longest
            interval between two so far, or from None before the second.
        clock: Monotonic time in seconds.

    Raises:
        ConfigurationError: prometheus_client is not installed.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        deadline: Callable[[float | None], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise ConfigurationError(
                f"Expected the extra of metrics_port. Received: {error}. "
                "pip install 'digits-trainer[metrics]'."
            ) from None
        self.host, self.port = host, port
        self.deadline = deadline
        self.clock = clock
        self.registry = prometheus_client.CollectorRegistry()
        self.page = prometheus_client.make_wsgi_app(self.registry)
        self.watched = False
        self.last: float | None = None
        self.longest: float | None = None

        def gauge(name: str, text: str, *labels: str) -> Any:
            return prometheus_client.Gauge(
                name, text, labels, namespace=NAMESPACE, registry=self.registry
            )

        def counter(name: str, text: str) -> Any:
            return prometheus_client.Counter(
                name, text, namespace=NAMESPACE, registry=self.registry
            )

        self.epoch = gauge("epoch", "Epoch that is being trained, counted from 1.")
        self.epochs = gauge("epochs", "Number of epochs of the run.")
        self.step_of_epoch = gauge("step", "Last step of the epoch that has ended.")
        self.steps_of_epoch = gauge("epoch_steps", "Number of steps of an epoch.")
        self.steps = counter("steps", "Steps that this process has trained.")
        self.examples = counter("examples", "Examples that all replicas have trained in them.")
        self.rate = gauge("examples_per_second", "Examples trained per second in this epoch.")
        self.left = gauge("remaining_seconds", "Estimated seconds to the end of the run.")
        self.value = gauge(
            "metric", "Keras' losses and metrics, means over an epoch so far.", "name", "data"
        )
        self.checkpoint_age = gauge(
            "checkpoint_age_seconds", "Seconds since a checkpoint was saved."
        )
        self.checkpoint_age.set(float("nan"))
        self.resumed = gauge("resumed", "1 if this process goes on from a checkpoint.")
        self.done = gauge("done", "1 once the run has ended and its model is written.")

    def step(self, position: Mapping, values: Mapping[str, float]) -> None:
        """Records where the run is.

        Args:
            position: As ``Watcher.on_step`` has it.
            values: Keras' metrics by name, means over the epoch so far.
        """
        self.epoch.set(position["epoch"])
        self.epochs.set(position["epochs"])
        self.step_of_epoch.set(position["step"])
        self.steps_of_epoch.set(position["steps"])
        self.rate.set(position["images_per_second"])
        self.left.set(position["seconds_left"])
        self.values(values)

    def values(self, values: Mapping[str, float]) -> None:
        """Records Keras' metrics; those of ``val_`` are of the validation data."""
        for name, value in values.items():
            data = "validation" if name.startswith("val_") else "training"
            self.value.labels(name.removeprefix("val_"), data).set(value)

    def progress(self) -> None:
        """Notes that the run goes on; from the first time on it is watched."""
        now = self.clock()
        if self.last is not None:
            self.longest = max(self.longest or 0.0, now - self.last)
        self.last, self.watched = now, True

    def unwatch(self) -> None:
        """Ends the watch: what follows the training has no steps."""
        self.watched = False

    def is_alive(self) -> bool:
        """Tells whether the last step has ended within its deadline."""
        if not self.watched or self.last is None:
            return True
        return self.clock() - self.last <= self.deadline(self.longest)

    @contextlib.contextmanager
    def serve(self) -> Iterator[None]:
        """Answers requests until the end of the block.

        Raises:
            ConfigurationError: The address cannot be listened at.
        """
        try:
            host = self.host
            if host == "*":
                host = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104
            kind = _Server6 if ":" in host else _Server
            server = make_server(host, self.port, self._answer, kind, _Handler)
        except OSError as error:
            raise ConfigurationError(
                f"Expected an address to serve metrics at. Received: metrics_port={self.port} of "
                f"{self.host}, {error.strerror or error}. Use another port."
            ) from None
        self.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()

    def _answer(self, environ: dict, start_response: Callable) -> list[bytes]:
        path, method = environ.get("PATH_INFO"), environ["REQUEST_METHOD"]
        status, text = HTTPStatus.NOT_FOUND, "There are /metrics and /healthz."
        if method not in ("GET", "HEAD"):
            status, text = HTTPStatus.METHOD_NOT_ALLOWED, "GET and HEAD are answered."
        elif path == "/metrics":
            return self.page(environ, start_response)
        elif path == "/healthz":
            status, text = HTTPStatus.OK, "ok"
            if not self.is_alive():
                status, text = HTTPStatus.SERVICE_UNAVAILABLE, "no step has ended for too long"
        headers = [("Content-Type", "text/plain; charset=utf-8")]
        start_response(f"{status.value} {status.phrase}", headers)
        return [f"{text}\n".encode()]


class _Server(ThreadingMixIn, WSGIServer):
    """Answers each connection in a thread, a bounded number at a time."""

    daemon_threads = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.free = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(*arguments, **options)

    def server_bind(self) -> None:
        super(WSGIServer, self).server_bind()  # WSGIServer's own asks the DNS for a name.
        self.server_name, self.server_port = "localhost", self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing about clients that go away."""


class _Server6(_Server):
    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        if self.server_address[0] == "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_SECONDS

    def log_message(self, format: str, *arguments: object) -> None:
        """Writes no line for each request."""
