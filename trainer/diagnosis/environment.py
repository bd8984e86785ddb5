"""What else of this process' environment a run depends on: Keras' configuration file, proxies.

findings = check_environment(config, os.environ)
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from trainer import inputs
from trainer.config import TrainConfig
from trainer.data.sources import downloads
from trainer.diagnosis.connections import examine_address
from trainer.diagnosis.finding import Finding

_FLOAT_TYPES = (
    "float16",
    "float32",
    "float64",
)  # Of Keras 3.15, which raises ValueError for others.
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
    """Reads Keras' configuration file as Keras does when it is imported."""
    path = keras_folder(environ) / "keras.json"
    if not path.exists():
        yield Finding("keras.json", "ok", f"none at {path}")
        return
    remedy = f"Correct or remove {path}."
    try:
        with inputs.open_file(path) as file:
            settings = json.load(file)
    except OSError as error:
        seen = f"{path} cannot be read: {error.strerror}"
        yield Finding("keras.json", "error", seen, remedy)
        return
    except (ValueError, RecursionError):
        yield Finding("keras.json", "warning", f"{path} is no JSON: Keras ignores it", remedy)
        return
    if not isinstance(settings, dict):
        yield Finding("keras.json", "error", f"{path} has no object: Keras cannot start", remedy)
        return
    float_type = settings.get("floatx", "float32")
    image_data_format = settings.get("image_data_format", "channels_last")
    epsilon = settings.get("epsilon", 1e-7)
    wrong = [
        f"{name}={value!r}"
        for name, value, right in (
            ("floatx", float_type, float_type in _FLOAT_TYPES),
            ("epsilon", epsilon, isinstance(epsilon, float)),
            (
                "image_data_format",
                image_data_format,
                image_data_format in ("channels_last", "channels_first"),
            ),
        )
        if not right
    ]
    if wrong:
        seen = f"{path} has {', '.join(wrong)}: Keras cannot start"
        yield Finding("keras.json", "error", seen, remedy)
    elif (backend := settings.get("backend", "tensorflow")) != "tensorflow":
        yield Finding(
            "keras.json",
            "warning",
            f"{path} has backend={backend!r}: the commands use tensorflow nevertheless; "
            "trainer.fit in another program fails",
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


def keras_folder(environ: Mapping[str, str]) -> Path:
    """Returns the folder of Keras' configuration and cache, as Keras finds it."""
    if "KERAS_HOME" in environ:
        return Path(environ["KERAS_HOME"]).expanduser()
    home = Path("~").expanduser()
    return (home if os.access(home, os.W_OK) else Path("/tmp")) / ".keras"  # noqa: S108
