"""A client for one namespace of a Kubernetes cluster.

    server = Server(namespace="research")
    server.apply(manifest)
    for change in server.changes("Pod", label_selector=manifests.selector("digits")): ...

Every error of the API server is raised as a ``ConfigurationError`` with the server's message.
"""

import contextlib
import functools
import http.client
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from typing import Any, Literal, NamedTuple

from trainer.errors import ConfigurationError, TrainerError
from trainer.k8s.manifests import MISSING

Kind = Literal[
    "ConfigMap",
    "Event",
    "Job",
    "JobSet",
    "NetworkPolicy",
    "PersistentVolumeClaim",
    "Pod",
    "Secret",
    "Service",
    "TrainJob",
    "Workload",
]

# By kind: the API class of the client, and the noun in its methods' names.
_METHODS: dict[Kind, tuple[str, str]] = {
    "ConfigMap": ("CoreV1Api", "config_map"),
    "Event": ("CoreV1Api", "event"),
    "Job": ("BatchV1Api", "job"),
    "NetworkPolicy": ("NetworkingV1Api", "network_policy"),
    "PersistentVolumeClaim": ("CoreV1Api", "persistent_volume_claim"),
    "Pod": ("CoreV1Api", "pod"),
    "Secret": ("CoreV1Api", "secret"),
    "Service": ("CoreV1Api", "service"),
}

# Kinds of operators: API group, version and plural name.
_CUSTOM: dict[Kind, tuple[str, str, str]] = {
    "JobSet": ("jobset.x-k8s.io", "v1alpha2", "jobsets"),
    "TrainJob": ("trainer.kubeflow.org", "v1alpha1", "trainjobs"),
    "Workload": ("kueue.x-k8s.io", "v1beta2", "workloads"),
}
OPERATORS: dict[Kind, str] = {
    "JobSet": "JobSet",
    "TrainJob": "Kubeflow Trainer",
    "Workload": "Kueue",
}

FIELD_MANAGER = "digits-trainer"
_CUSTOM_VERBS = {"read": "get"}  # where the client names a method of custom objects otherwise
CONNECT_SECONDS = 10.0  # for a connection to be accepted
ANSWER_SECONDS = 30.0  # for the answer to a request
WATCH_SECONDS = 60  # after which a watch is renewed: a dead connection is noticed no other way
RETRY_SECONDS = 1.0  # between two attempts to reach the server
CLOSE_SECONDS = 3.0  # for the threads that read a watch to end


class Change(NamedTuple):
    """What a watch reports.

    Attributes:
        type: ``LISTED``: all objects that exist; ``ADDED``, ``MODIFIED`` or ``DELETED``: one
            object; ``LOST``: the connection was lost and is being re-established, after which a
            ``LISTED`` follows.
        objects: As the API server sends them.
        reason: For ``LOST``, why.
    """

    type: str
    objects: list[dict]
    reason: str = ""


class NotFoundError(ConfigurationError):
    """The object or the namespace does not exist (404)."""


class RefusedError(ConfigurationError):
    """The user is not authenticated, or not authorized (401, 403)."""


class Server:
    """A namespace of the cluster that a kubeconfig file describes.

    Args:
        context: A context of the kubeconfig file; None: the current one.
        namespace: None: that of the context.

    Attributes:
        namespace: The namespace in use.
        flags: ``--namespace`` and ``--context`` for kubectl to address the same namespace.

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
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # Changes report retries.
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
        # A malformed file raises whatever its reader stumbles over.
        except (
            *(kubernetes.config.ConfigException, OSError, yaml.YAMLError),
            *(AttributeError, KeyError, TypeError, ValueError),
        ) as error:
            raise ConfigurationError(
                f"Expected a cluster to be named by a kubeconfig file. Received: "
                f"{' '.join(str(error).split())} Set KUBECONFIG, or use context=NAME: "
                "kubectl config get-contexts lists them."
            ) from None
        self.namespace = namespace or found.get("namespace") or "default"
        self.flags = f"--namespace {self.namespace}" + (f" --context {context}" if context else "")
        self.client = kubernetes.client.ApiClient(self.configuration)
        self.closed = threading.Event()
        self.watches: set[kubernetes.watch.Watch] = set()

    def apply(self, manifest: dict) -> None:
        """Creates or updates an object by server-side apply."""
        self._call(
            "patch",
            manifest["kind"],
            name=manifest["metadata"]["name"],
            body=manifest,
            field_manager=FIELD_MANAGER,
            _content_type="application/apply-patch+yaml",
        )

    def get(self, kind: Kind, name: str) -> dict | None:
        """Returns an object; None if there is none of this name."""
        try:
            return self._plain(self._call("read", kind, name=name))
        except NotFoundError:
            return None

    def serves(self, kind: Kind) -> bool:
        """Tells whether the API server knows an operator's kind, as far as this user can see."""
        try:
            self._call("list", kind, limit=1)
        except NotFoundError:
            return False
        except RefusedError:
            pass
        return True

    def list(self, kind: Kind, selector: str) -> list[dict]:
        """Returns the objects that a label selector matches."""
        return self._plain(self._call("list", kind, label_selector=selector))["items"]

    def delete(self, kind: Kind, name: str) -> None:
        """Deletes an object, if it exists, and in the background what it owns."""
        with contextlib.suppress(NotFoundError):
            self._call("delete", kind, name=name, propagation_policy="Background")

    def changes(self, kind: Kind, **selectors: str) -> Iterator[Change]:
        """Yields the objects that exist and then each change, until ``close``. A watch that ends or
        is cut off is renewed.

        Args:
            kind: The objects' kind.
            selectors: ``label_selector`` and ``field_selector``, as in the API.

        Raises:
            RefusedError: The user may not list or watch them.
        """
        while not self.closed.is_set():
            try:
                listed = self._plain(self._method("list", kind)(**selectors, **self._limits()))
                yield Change("LISTED", listed["items"])
                with self._watch() as watch:
                    for event in watch.stream(
                        self._method("list", kind),
                        **selectors,
                        resource_version=listed["metadata"]["resourceVersion"],
                        timeout_seconds=WATCH_SECONDS,
                        _request_timeout=(CONNECT_SECONDS, WATCH_SECONDS + CONNECT_SECONDS),
                    ):
                        if event:  # None: a line that was cut off
                            yield Change(event["type"], [event["raw_object"]])
            except self.failures as error:
                known = self._error(error)
                if isinstance(known, RefusedError):
                    raise known from error
                if getattr(error, "status", None) != 410:  # Gone: list again at once.
                    yield Change("LOST", [], str(known))
                    self.closed.wait(RETRY_SECONDS)

    def log_lines(self, pod: str) -> Iterator[str]:
        """Yields the lines of a pod's log, past and to come, each once, until the container has
        terminated, the pod is deleted, or ``close``.

        Raises:
            RefusedError: The user may not read it.
        """
        seen = 0
        while not self.closed.is_set():
            complete = False
            try:
                with self._watch() as watch:
                    lines = watch.stream(
                        self._method("read", "Pod", "log"),
                        name=pod,
                        _request_timeout=(CONNECT_SECONDS, WATCH_SECONDS + CONNECT_SECONDS),
                    )
                    for number, line in enumerate(lines):
                        if number >= seen:  # A new connection repeats the earlier ones.
                            seen += 1
                            yield line
                complete = True
            except self.failures as error:
                known = self._error(error)
                if isinstance(known, RefusedError):
                    raise known from error
            with contextlib.suppress(TrainerError):
                found = self.get("Pod", pod)
                terminated = found and found["status"]["phase"] in ("Succeeded", "Failed")
                if found is None or (complete and terminated):
                    return
            self.closed.wait(RETRY_SECONDS)

    def read_file(self, pod: str, path: str) -> bytes:
        """Returns the content of a file in a pod, by running ``cat`` in its container.

        Raises:
            ConfigurationError: The file cannot be read, or the server does not answer in time.
        """
        from kubernetes.stream.ws_client import ERROR_CHANNEL

        # A separate client: while it connects, exec replaces methods of the one it is given.
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
            connection.sock.settimeout(WATCH_SECONDS)
            parts = []
            until = time.monotonic() + WATCH_SECONDS
            while connection.is_open():
                connection.update(timeout=CONNECT_SECONDS)
                if connection.peek_stdout():
                    parts.append(connection.read_stdout())
                    until = time.monotonic() + WATCH_SECONDS
                elif connection.peek_channel(ERROR_CHANNEL):  # the exit status of cat
                    break
                elif time.monotonic() > until:
                    raise TimeoutError(f"no more of {path} for {WATCH_SECONDS} s")
            stderr = connection.read_stderr() if connection.peek_stderr() else b""
            connection.close()
        if stderr:
            reason = stderr.decode(errors="replace").strip()
            raise ConfigurationError(f"Expected {path} in the volume. Received: {reason}.")
        return b"".join(parts)

    def download(self, pod: str, port: int, path: str) -> bytes:
        """Returns a file that an HTTP server in a pod serves, through a port-forward.

        Args:
            pod: Name of the pod.
            port: Port on its loopback interface.
            path: Path of the file on the server, without the first slash.

        Raises:
            RefusedError: The user may not forward ports.
            ConfigurationError: There is no such file, or the server does not answer in time.
        """
        core = self.kubernetes.client.CoreV1Api(
            self.kubernetes.client.ApiClient(self.configuration)
        )
        with self._errors():
            forward = self.kubernetes.stream.portforward(
                core.connect_get_namespaced_pod_portforward,
                pod,
                self.namespace,
                ports=str(port),
            )
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.sock = forward.socket(port)
            connection.sock.settimeout(WATCH_SECONDS)
            with contextlib.closing(connection):
                try:
                    connection.request("GET", f"/{path}")
                    response = connection.getresponse()
                    content = response.read()
                except http.client.HTTPException as error:
                    raise ConnectionError(f"{type(error).__name__}: {error}") from None
        if response.status != HTTPStatus.OK:
            raise ConfigurationError(
                f"Expected {path} in the volume. Received: {response.status}, No such file."
            )
        return content

    def close(self, threads: Sequence[threading.Thread]) -> None:
        """Ends the iterators of ``changes`` and ``log_lines``, and joins the threads reading them.

        A thread that is inside the client when the interpreter exits aborts the process (SIGABRT):
        up to Python 3.13 the interpreter ends such a thread by unwinding its stack, which the
        client's validation of arguments (pydantic, in Rust) does not allow.

        Args:
            threads: After CLOSE_SECONDS those that wait for a dead connection are left behind.
        """
        self.closed.set()
        end = time.monotonic() + CLOSE_SECONDS
        while any(thread.is_alive() for thread in threads) and time.monotonic() < end:
            for watch in list(self.watches):
                watch.stop()  # It has no effect between two connections, so it is repeated.
            for thread in threads:
                thread.join(CLOSE_SECONDS / 100)

    @contextlib.contextmanager
    def _watch(self) -> Iterator:
        watch = self.kubernetes.watch.Watch()
        self.watches.add(watch)
        try:
            yield watch
        finally:
            self.watches.discard(watch)

    def _context(self, name: str | None) -> dict:
        """Returns a context of the kubeconfig file; None: the current one."""
        try:
            contexts, current = self.kubernetes.config.list_kube_config_contexts()
        except self.kubernetes.config.ConfigException:
            if name is None:
                raise
            return {}  # Without a current context the client lists none.
        if name is not None:
            current = next(one for one in contexts if one["name"] == name)
        return current["context"]

    def _call(self, verb: str, kind: Kind, **options: object) -> object:
        with self._errors():
            return self._method(verb, kind)(**options, **self._limits())

    def _method(self, verb: str, kind: Kind, *subresource: str) -> Callable[..., Any]:
        """Returns a method of the client with the namespace filled in."""
        if kind in _CUSTOM:
            group, version, plural = _CUSTOM[kind]
            api = self.kubernetes.client.CustomObjectsApi(self.client)
            name = f"{_CUSTOM_VERBS.get(verb, verb)}_namespaced_custom_object"
            place = {"group": group, "version": version, "plural": plural}
            return functools.partial(getattr(api, name), namespace=self.namespace, **place)
        group, noun = _METHODS[kind]
        api = getattr(self.kubernetes.client, group)(self.client)
        method = getattr(api, "_".join([verb, "namespaced", noun, *subresource]))
        return functools.partial(method, namespace=self.namespace)

    def _limits(self) -> dict:
        return {"_request_timeout": (CONNECT_SECONDS, ANSWER_SECONDS)}

    def _plain(self, answer: object) -> dict:
        return self.client.sanitize_for_serialization(answer)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self.failures as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> ConfigurationError:
        """Translates an error of the client into one line."""
        status, reason = getattr(error, "status", None), getattr(error, "reason", None) or error
        reason = " ".join(str(reason).split())
        # The message of a refused exec contains the whole answer with its headers.
        if refused := re.match(r"Handshake status (\d+) ([\w ]+)", reason):
            status, reason = int(refused[1]), refused[2].strip()
        if not status:
            return ConfigurationError(
                f"Expected a Kubernetes API server at {self.configuration.host}. Received: "
                f"{reason}. kubectl cluster-info should answer; context=NAME selects another."
            )
        with contextlib.suppress(TypeError, ValueError, KeyError, AttributeError):
            reason = json.loads(getattr(error, "body", ""))["message"]
        remedy = {
            401: " Log in to the cluster again.",
            403: f" Ask for the permission, or another quota, in the namespace {self.namespace}.",
            404: f" The namespace is {self.namespace}; namespace=NAME selects another.",
        }.get(status, "")
        kind = {401: RefusedError, 403: RefusedError, 404: NotFoundError}.get(
            status, ConfigurationError
        )
        if re.search(r"denied (the )?request", reason):  # By a webhook or a policy.
            remedy, kind = "", ConfigurationError
        return kind(
            f"Expected the API server to accept the request. Received: {status}, {reason}.{remedy}"
        )
