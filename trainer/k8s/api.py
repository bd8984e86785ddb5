"""What the package asks of a Kubernetes API server, in one namespace.

    server = Server(namespace="research")
    server.apply(manifest)
    for change in server.changes("Pod", label_selector=manifests.selector("digits")): ...

A refusal is a ``ConfigurationError`` in the server's own words.
"""

import contextlib
import functools
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from trainer.errors import ConfigurationError, TrainerError
from trainer.k8s.manifests import MISSING

Kind = Literal["Event", "Job", "NetworkPolicy", "PersistentVolumeClaim", "Pod", "Service"]

# Each kind's class of the client, and its noun in the client's methods.
_METHODS: dict[Kind, tuple[str, str]] = {
    "Event": ("CoreV1Api", "event"),
    "Job": ("BatchV1Api", "job"),
    "NetworkPolicy": ("NetworkingV1Api", "network_policy"),
    "PersistentVolumeClaim": ("CoreV1Api", "persistent_volume_claim"),
    "Pod": ("CoreV1Api", "pod"),
    "Service": ("CoreV1Api", "service"),
}

FIELD_MANAGER = "digits-trainer"
CONNECT = 10.0  # Seconds in which a server answers.
WATCH = 60  # Seconds after which a watch is begun anew: a dead connection is not noticed else.
RETRY = 1.0  # Seconds between two tries of what goes on for ever.
LEAVE = 3.0  # Seconds in which what goes on in other threads ends.


class Change(NamedTuple):
    """A change in the cluster.

    Attributes:
        type: ``LISTED``: these are all there are; ``ADDED``, ``MODIFIED``, ``DELETED``: this one
            was; ``LOST``: the connection was lost, and is tried again; nothing of it is missed.
        objects: As the API server sends them.
        reason: Why the connection was lost.
    """

    type: str
    objects: list[dict]
    reason: str = ""


class NotFoundError(ConfigurationError):
    """There is no such object in the namespace, or no such namespace."""


class RefusedError(ConfigurationError):
    """The server knows the user no more, or does not let them (401, 403)."""


class Server:
    """A namespace of the cluster that a kubeconfig file names.

    Args:
        context: Of the kubeconfig file; None: its current one.
        namespace: None: the context's.

    Raises:
        ConfigurationError: There is no kubeconfig file, or no such context, or the package is
            installed without its extra ``k8s``.
    """

    def __init__(self, *, context: str | None = None, namespace: str | None = None) -> None:
        try:
            import kubernetes.client
            import kubernetes.config
            import kubernetes.stream
            import kubernetes.watch
            import urllib3
            import websocket
            import yaml
        except ImportError as error:
            raise ConfigurationError(MISSING.format(error=error)) from None
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # What it retries is said here.
        self.kubernetes = kubernetes
        self.failures = (
            kubernetes.client.ApiException,
            urllib3.exceptions.HTTPError,
            websocket.WebSocketException,
            OSError,
        )
        self.configuration = kubernetes.client.Configuration()
        self.configuration.retries = False
        try:
            kubernetes.config.load_kube_config(
                context=context, client_configuration=self.configuration
            )
            found = self._context(context)
        # A damaged file ends in whatever it breaks.
        except (
            *(kubernetes.config.ConfigException, OSError, yaml.YAMLError),
            *(AttributeError, KeyError, TypeError, ValueError),
        ) as error:
            raise ConfigurationError(
                f"Expected a cluster to be named by a kubeconfig file. Received: "
                f"{' '.join(str(error).split())} Set KUBECONFIG, or --context to one of kubectl "
                "config get-contexts."
            ) from None
        self.namespace = namespace or found.get("namespace") or "default"
        self.client = kubernetes.client.ApiClient(self.configuration)
        self.left = threading.Event()
        self.watches: set[kubernetes.watch.Watch] = set()

    def leave(self, threads: Sequence[threading.Thread]) -> None:
        """Ends what ``changes`` and ``log_lines`` yield, and waits for the threads that read it.

        A thread that is in the client while the interpreter ends aborts the process (SIGABRT): up
        to Python 3.13 the interpreter ends such a thread by unwinding its stack, and the client's
        checks of its arguments (pydantic) are in Rust, which does not let itself be unwound.

        Args:
            threads: One that waits for an answer of a dead connection is not waited for.
        """
        self.left.set()
        end = time.monotonic() + LEAVE
        while any(thread.is_alive() for thread in threads) and time.monotonic() < end:
            for watch in list(self.watches):
                watch.stop()  # Of no effect between two connections, hence again and again.
            for thread in threads:
                thread.join(LEAVE / 100)

    @contextlib.contextmanager
    def _watch(self) -> Iterator:
        watch = self.kubernetes.watch.Watch()
        self.watches.add(watch)
        try:
            yield watch
        finally:
            self.watches.discard(watch)

    def _context(self, name: str | None) -> dict:
        """Returns what the kubeconfig file says of a context; None: of the current one."""
        try:
            contexts, current = self.kubernetes.config.list_kube_config_contexts()
        except self.kubernetes.config.ConfigException:
            if name is None:
                raise
            return {}  # It has no current one, and cannot be asked for another then.
        if name is not None:
            current = next(one for one in contexts if one["name"] == name)
        return current["context"]

    def apply(self, manifest: dict) -> None:
        """Creates an object or changes it, by server-side apply."""
        self._call(
            "patch",
            manifest["kind"],
            manifest["metadata"]["name"],
            body=manifest,
            field_manager=FIELD_MANAGER,
            _content_type="application/apply-patch+yaml",
        )

    def get(self, kind: Kind, name: str) -> dict | None:
        """Returns an object; None where there is none of this name."""
        try:
            return self._plain(self._call("read", kind, name))
        except NotFoundError:
            return None

    def list(self, kind: Kind, selector: str) -> list[dict]:
        """Returns the objects with these labels."""
        return self._plain(self._call("list", kind, label_selector=selector))["items"]

    def delete(self, kind: Kind, name: str) -> None:
        """Deletes an object and what belongs to it, if it is there."""
        with contextlib.suppress(NotFoundError):
            self._call("delete", kind, name, propagation_policy="Background")

    def changes(self, kind: Kind, **selectors: str) -> Iterator[Change]:
        """Yields what there is, and then each change, until ``leave``: a watch that ends or drops
        is begun anew.

        Args:
            kind: Of which objects.
            selectors: ``label_selector`` and ``field_selector``, as the API has them.

        Raises:
            RefusedError: Trying again does not help.
        """
        while not self.left.is_set():
            try:
                listed = self._plain(self._method("list", kind)(**selectors, **self._limits()))
                yield Change("LISTED", listed["items"])
                with self._watch() as watch:
                    for event in watch.stream(
                        self._method("list", kind),
                        **selectors,
                        resource_version=listed["metadata"]["resourceVersion"],
                        timeout_seconds=WATCH,
                        _request_timeout=(CONNECT, WATCH + CONNECT),
                    ):
                        if event:  # None: a line that was cut
                            yield Change(event["type"], [event["raw_object"]])
            except self.failures as error:
                known = self._error(error)
                if isinstance(known, RefusedError):
                    raise known from error
                if getattr(error, "status", None) != 410:  # Gone: the list begins anew.
                    yield Change("LOST", [], str(known))
                    self.left.wait(RETRY)

    def log_lines(self, pod: str) -> Iterator[str]:
        """Yields what a pod's container has written and writes, until it has ended or is gone, or
        until ``leave``.

        Raises:
            RefusedError: This user may not read it.
        """
        seen = 0
        while not self.left.is_set():
            whole = False
            try:
                with self._watch() as watch:
                    lines = watch.stream(
                        self._method("read", "Pod", "log"),
                        name=pod,
                        _request_timeout=(CONNECT, WATCH + CONNECT),
                    )
                    for number, line in enumerate(lines):
                        if number >= seen:  # The others were there before the connection was lost.
                            seen += 1
                            yield line
                whole = True
            except self.failures as error:
                known = self._error(error)
                if isinstance(known, RefusedError):
                    raise known from error
            with contextlib.suppress(TrainerError):
                found = self.get("Pod", pod)
                if found is None or (whole and found["status"]["phase"] in ("Succeeded", "Failed")):
                    return
            self.left.wait(RETRY)

    def read_file(self, pod: str, path: str) -> bytes:
        """Reads a file in a pod's container, which has ``cat``."""
        from kubernetes.stream.ws_client import ERROR_CHANNEL

        # A client of its own: exec changes the one it is given for as long as it connects.
        core = self.kubernetes.client.CoreV1Api(
            self.kubernetes.client.ApiClient(self.configuration)
        )
        with self._errors():
            connection = self.kubernetes.stream.stream(
                core.connect_get_namespaced_pod_exec,
                pod,
                self.namespace,
                command=["cat", path],
                stdout=True,
                stderr=True,
                binary=True,
                _preload_content=False,
            )
            connection.sock.settimeout(WATCH)
            parts = []
            until = time.monotonic() + WATCH
            while connection.is_open():
                connection.update(timeout=CONNECT)
                if connection.peek_stdout():
                    parts.append(connection.read_stdout())
                    until = time.monotonic() + WATCH
                elif connection.peek_channel(ERROR_CHANNEL):  # how the command has ended
                    break
                elif time.monotonic() > until:
                    raise TimeoutError(f"no more of {path} for {WATCH} s")
            said = connection.read_stderr() if connection.peek_stderr() else b""
            connection.close()
        if said:
            raise ConfigurationError(
                f"Expected {path} in the volume. Received: {said.decode(errors='replace').strip()}."
            )
        return b"".join(parts)

    def _call(self, verb: str, kind: Kind, *names: str, **options: object) -> object:
        with self._errors():
            return self._method(verb, kind)(*names, **options, **self._limits())

    def _method(self, verb: str, kind: Kind, *subresource: str) -> Callable[..., Any]:
        """Returns a method of the client, bound to the namespace."""
        group, noun = _METHODS[kind]
        api = getattr(self.kubernetes.client, group)(self.client)
        method = getattr(api, "_".join([verb, "namespaced", noun, *subresource]))
        return functools.partial(method, namespace=self.namespace)

    def _limits(self) -> dict:
        return {"_request_timeout": (CONNECT, 3 * CONNECT)}

    def _plain(self, answer: object) -> dict:
        return self.client.sanitize_for_serialization(answer)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self.failures as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> ConfigurationError:
        """Says in one line why the server did not do it."""
        status, reason = getattr(error, "status", None), getattr(error, "reason", None) or error
        reason = " ".join(str(reason).split())
        # An exec that is refused says it in the midst of its headers.
        if refused := re.match(r"Handshake status (\d+) ([\w ]+)", reason):
            status, reason = int(refused[1]), refused[2].strip()
        if not status:
            return ConfigurationError(
                f"Expected a Kubernetes API server at {self.configuration.host}. Received: "
                f"{reason}. kubectl cluster-info should answer; --context names another."
            )
        with contextlib.suppress(TypeError, ValueError, KeyError, AttributeError):
            reason = json.loads(getattr(error, "body", ""))["message"]
        remedy = {
            401: " Log in to the cluster again.",
            403: f" Ask for the permission, or another quota, in the namespace {self.namespace}.",
            404: f" The namespace is {self.namespace}; --namespace names another.",
        }.get(status, "")
        kind = {401: RefusedError, 403: RefusedError, 404: NotFoundError}.get(
            status, ConfigurationError
        )
        return kind(f"Expected the API server to accept it. Received: {status}, {reason}.{remedy}")
