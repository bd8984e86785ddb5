"""What else of this process' environment a run depends on: Keras' configuration file, proxies.

findings = check_environment(config, os.environ)
"""

from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from trainer import keras_json
from trainer.config import TrainConfig
from trainer.data.sources import downloads
from trainer.diagnosis.connections import examine_address
from trainer.diagnosis.finding import Finding

_PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")


def check_environment(config: TrainConfig, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Looks at environment variables and at keras.json.

    Args:
        config: The configuration of the run.
        environ: The environment, which ``cli.run`` has prepared.
    """
    yield from check_keras_json(environ)
    yield from check_proxies(config, environ)


def check_keras_json(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Looks at what Keras' configuration file has."""
    path, settings, fault = keras_json.read(environ)
    remedy = f"Correct or remove {path}."
    if not path.exists():
        yield Finding("keras.json", "ok", f"none at {path}")
    elif fault:
        seen = f"{path} {fault}: Keras cannot be imported"
        yield Finding("keras.json", "error", seen, remedy)
    elif settings is None:
        yield Finding("keras.json", "warning", f"{path} is no JSON: Keras ignores it", remedy)
    elif (backend := settings.get("backend", "tensorflow")) != "tensorflow":
        yield Finding(
            "keras.json",
            "warning",
            f"{path} has backend={backend!r}: the commands use tensorflow nevertheless; "
            "trainer.train in another program fails",
            f"Set KERAS_BACKEND=tensorflow there. {remedy}",
        )
    else:
        yield Finding("keras.json", "ok", f"{path}; a run has its own float type and epsilon")


def check_proxies(config: TrainConfig, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Tries to reach the proxies that downloads go through."""
    named = {
        name: value
        for name, value in environ.items()
        if name.lower() in _PROXIES and value and name != "HTTP_PROXY"  # Of CGI: a header's value.
    }
    if not named:
        yield Finding("proxies", "ok", "none set")
    for name, value in named.items():
        use = "workers connect past it"
        if downloads(config.data):
            use = f"data={config.data!r} is downloaded through it, if it is not in the cache"
        place = name
        try:
            parts = urlsplit(value if "://" in value else f"http://{value}")
            host, port = parts.hostname, parts.port or 80
            if not host:
                raise ValueError("it names no host")
            place = f"{name}={parts.scheme}://{host}:{port}"  # Without a password in it.
            _, reason = examine_address(host, port)
        except ValueError as error:
            reason = str(error)
        if reason:
            yield Finding(
                "proxies",
                "warning",
                f"{place}: {reason}; {use}",
                f"Correct or unset {name}, or list the hosts to reach without it in no_proxy.",
            )
        else:
            yield Finding("proxies", "ok", f"{place} answers; {use}")
