"""Messages between the processes of a run, over sockets.

    connection = await call("digits-0.digits:2222", index=1, workers=workers, secret=secret)
    connection.send(ready=settings)
    message = await connection.receive()

A message is a JSON object on one line; between the parents of two workers, a MAC and a space come
before it (``authentication``). Nothing that is received is used before its size, its types and
their ranges have been checked:

    between parents       {"hello": 1, "workers": [address, ...], "nonce": hex, "secret": true}
                          {"challenge": hex, "secret": true}
    to worker 0           {"ready": settings}, {"hang": text}, {"ended": [code, text, kind]}
    from worker 0         {"welcome": 1}, {"busy": text}, {"waiting": text}, {"go": 1},
                          {"verdict": [code, text, about]}
    both                  {"heartbeat": 1}
    from the worker's     {"ready": settings}, {"connected": 1}, {"idle": 1}, {"training": 1},
    process               {"step": [epoch, step]}, {"trained": 1}, {"traceback": text},
                          {"ended": [code, text, kind]}
    to it                 {"go": 1}
"""

import asyncio
import contextlib
import errno
import ipaddress
import json
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from trainer.cli import INTERRUPTED
from trainer.distributed.authentication import MAC_SIZE, NONCE_SIZE, Secret, Session, nonce
from trainer.distributed.cluster import split_address
from trainer.errors import ConfigurationError, TrainerError

CONNECT_TIMEOUT = 5.0  # Seconds to reach an address.
CALLERS = 100  # Connections at a time whose other end has not proved to be a worker.
PORT_TIMEOUT = 10.0  # Seconds until the port of a worker that was killed is free again.

TEXT_LIMIT = 4000  # Characters of a sentence.
TRACEBACK_LIMIT = 20_000  # The same, of a traceback.
_DEPTH_LIMIT = 10  # Of nested settings.
_MAC_DIGITS = 2 * MAC_SIZE

EXIT_CODES = {0, 1, INTERRUPTED, *(kind.exit_code for kind in TrainerError.__subclasses__())}


class Outcome(NamedTuple):
    """How a worker process ended.

    Attributes:
        code: Its exit code, as a shell reports it.
        text: Why, in a sentence or the end of one.
        kind: ``named``: successfully, or with an error whose cause is known; ``lost``: killed or
            stopped from outside; ``crashed``: it died; ``unclear``: it raised an error. The last
            two can be consequences of the loss of another worker.
    """

    code: int
    text: str
    kind: Literal["named", "lost", "crashed", "unclear"]


class Verdict(NamedTuple):
    """How a run ends.

    Attributes:
        code: Exit code.
        text: Why.
        about: Number of the worker that caused it; None: no single one.
    """

    code: int
    text: str
    about: int | None = None


class SecretError(ConnectionError):
    """The other end of a connection does not know the secret of this one."""


class Connection:
    """One end of a connection between two processes.

    Attributes:
        session: What authenticates the messages; None: they carry no MAC.
        forged: Whether a message with a wrong MAC was received.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.session: Session | None = None
        self.forged = False

    @property
    def host(self) -> str:
        """The address of the other end's machine."""
        name = self.writer.get_extra_info("peername")  # None where it is gone already.
        return name[0].removeprefix("::ffff:") if isinstance(name, tuple) else "unknown"

    def send(self, **message: object) -> None:
        """Sends a message, unless the connection is closed."""
        self.send_bytes(encode(message))

    def send_bytes(self, content: bytes) -> None:
        """Sends an encoded message, unless the connection is closed."""
        if self.session:
            content = self.session.sign(content).hex().encode() + b" " + content
        if not self.is_closing():
            self.writer.write(content)

    async def receive(self) -> dict | None:
        """Returns the next message; None at the end of the stream, and for what is not a message or
        does not come from the other end.
        """
        return decode(await self.receive_bytes())

    async def receive_bytes(self) -> bytes:
        """Returns the next message, undecoded; nothing where ``receive`` returns None."""
        try:
            line = await self.reader.readline()
        except (OSError, ValueError):  # ValueError: longer than asyncio's 64 KiB.
            return b""
        if self.session is None:
            return line
        mac, content = _split_mac(line)
        if self.session.verify(mac, content):
            return content
        self.forged = bool(line)
        return b""

    def is_closing(self) -> bool:
        """Tells whether the connection is closed, as far as this end knows."""
        return self.writer.is_closing()

    def close(self) -> None:
        """Closes the connection."""
        self.writer.close()


async def call(address: str, *, index: int, workers: Sequence[str], secret: Secret) -> Connection:
    """Connects to worker 0's parent, and authenticates it.

    Args:
        address: Worker 0's.
        index: Number of the worker that calls.
        workers: All workers, as that one knows them.
        secret: What the other end must know.

    Raises:
        SecretError: The other end does not know the secret.
        ConnectionError: It is no worker 0, or has closed the connection.
        OSError: The address cannot be resolved or reached.
    """
    hello = encode(
        {
            "hello": index,
            "workers": list(workers),
            "nonce": nonce().hex(),
            "secret": bool(secret.key),
        }
    )
    connection = Connection(*await connect(address))
    try:
        connection.writer.write(hello)
        mac, content = _split_mac(await connection.receive_bytes())
        challenge = decode(content)
        if challenge is None or "challenge" not in challenge:
            raise ConnectionError("something else answers there")
        session = Session(secret.key, hello, content, caller=True)
        if not session.verify(mac, content):
            if not secret.key and not challenge["secret"]:
                raise ConnectionError("something else answers there")
            connection.send(heartbeat=1)  # Without a MAC: so the other end learns of it, too.
            raise SecretError("another secret" if challenge["secret"] else "no secret")
    except BaseException:
        connection.close()
        raise
    connection.session = session
    connection.send(heartbeat=1)  # It proves that this end knows the secret.
    return connection


async def admit(connection: Connection, secret: Secret) -> dict | None:
    """Receives the greeting of a caller, and challenges it; its next message is the proof.

    Returns:
        Its ``hello``; None where it is no worker.
    """
    content = await connection.receive_bytes()
    hello = decode(content)
    if hello is None or "hello" not in hello or not 0 < hello["hello"] < len(hello["workers"]):
        return None
    challenge = encode({"challenge": nonce().hex(), "secret": bool(secret.key)})
    connection.session = Session(secret.key, content, challenge, caller=False)
    connection.send_bytes(challenge)
    return hello


def _split_mac(line: bytes) -> tuple[bytes, bytes]:
    """Splits a line into its MAC and the message; both are empty where it has none."""
    try:
        return bytes.fromhex(line[:_MAC_DIGITS].decode("ascii")), line[_MAC_DIGITS + 1 :]
    except ValueError:
        return b"", b""


def encode(message: dict) -> bytes:
    """Encodes a message as a line of JSON."""
    return json.dumps(message).encode() + b"\n"


def decode(line: bytes) -> dict | None:
    """Decodes a line of JSON into a message whose values have been checked; None: it is none.

    >>> decode(b'{"hello": 1}'), decode(b"[" * 60_000), decode(b'{"step": [1, 2]}')
    (None, None, {'step': (1, 2)})
    """
    try:
        message = json.loads(line)
        values = next(kind for kind in _KINDS if kind.keys() == message.keys())
        return {key: values[key](value) for key, value in message.items()}
    # RecursionError: nested too deeply. AttributeError, StopIteration: no object, or of no kind.
    except (ValueError, RecursionError, AttributeError, StopIteration):
        return None


def printable(text: str, limit: int = TEXT_LIMIT) -> str:
    r"""Returns a text in one line of limited length, without what a terminal would obey.

    >>> printable("the\ndisk \x1b[2Jis full"), printable("for ever", limit=3)
    ('the disk \\x1b[2Jis full', 'for…')
    """
    if len(text) > limit:
        text = text[:limit] + "…"
    line = " ".join(text.split())
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in line
    )


# Each of these returns the value, which is safe to use then.


def _one(value: object) -> int:
    if value != 1:
        raise ValueError
    return 1


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    return printable(value)


def _traceback(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value[-TRACEBACK_LIMIT:]


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError
    return value


def _nonce(value: object) -> bytes:
    if not isinstance(value, str) or len(value) != 2 * NONCE_SIZE:
        raise ValueError
    return bytes.fromhex(value)


def _addresses(value: object) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError
    if not all(isinstance(address, str) for address in value):
        raise ValueError
    return value


def _position(value: object) -> tuple[int, int]:
    match value:
        case [epoch, step]:
            return _whole(epoch), _whole(step)
    raise ValueError


def _settings(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError
    _limit_depth(value, _DEPTH_LIMIT)
    return value


def _limit_depth(value: object, limit: int) -> None:
    if isinstance(value, dict | list):
        if not limit:
            raise ValueError
        for part in value.values() if isinstance(value, dict) else value:
            _limit_depth(part, limit - 1)


def _outcome(value: object) -> Outcome:
    match value:
        case [int(code), text, "named" | "unclear" as kind] if code in EXIT_CODES:
            return Outcome(code, _text(text), kind)
        case [int(code), text, "lost" | "crashed" as kind] if 0 < code < 256:
            return Outcome(code, _text(text), kind)
    raise ValueError


def _verdict(value: object) -> Verdict:
    match value:
        case [int(code), text, about] if code in EXIT_CODES:
            return Verdict(code, _text(text), None if about is None else _whole(about))
    raise ValueError


_KINDS: Sequence[dict[str, Callable[[Any], object]]] = (
    {"hello": _whole, "workers": _addresses, "nonce": _nonce, "secret": _flag},
    {"challenge": _nonce, "secret": _flag},
    {"welcome": _one},
    {"busy": _text},
    {"waiting": _text},
    {"heartbeat": _one},
    {"ready": _settings},
    {"go": _one},
    {"connected": _one},
    {"idle": _one},
    {"training": _one},
    {"step": _position},
    {"trained": _one},
    {"hang": _text},
    {"traceback": _traceback},
    {"ended": _outcome},
    {"verdict": _verdict},
)


def listen(address: str) -> socket.socket:
    """Listens on the port of an address: on all network interfaces, unless it is one of this
    machine's own (127.0.0.1, ::1).

    Raises:
        ConfigurationError: The port is in use.
    """
    host, port = split_address(address)
    try:
        return _listen_on(host, port)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise ConfigurationError(
            f"Expected to listen on port {port}, for the address {address}. Received: "
            f"{reason}. Use a free port, or end the process that has this one."
        ) from error


async def listen_when_free(address: str) -> socket.socket:
    """Listens like ``listen``, but waits for a port that a worker that was just killed still holds.

    Raises:
        ConfigurationError: The port stays in use.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + PORT_TIMEOUT
    while True:
        try:
            return listen(address)
        except ConfigurationError as error:
            in_use = getattr(error.__cause__, "errno", None) == errno.EADDRINUSE
            if loop.time() > end or not in_use:
                raise
        await asyncio.sleep(PORT_TIMEOUT / 40)


def _listen_on(host: str, port: int) -> socket.socket:
    with contextlib.suppress(ValueError):  # A name.
        address = ipaddress.ip_address(host)
        if address.is_loopback:
            family = socket.AF_INET if address.version == 4 else socket.AF_INET6
            return socket.create_server((host, port), family=family)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # IPv6 is switched off.
                raise
    return socket.create_server(("", port))


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connects to an address.

    Raises:
        OSError: The address cannot be resolved or reached.
    """
    return await asyncio.open_connection(sock=await connect_socket(address))


async def connect_socket(address: str) -> socket.socket:
    """Connects to an address; the socket does not block.

    It does so in a daemon thread: a name server that does not answer would keep the process from
    exiting if it were asked in asyncio's own executor.

    Raises:
        OSError: The address cannot be resolved or reached.
    """
    loop = asyncio.get_running_loop()
    connected = loop.create_future()

    def settle(result: socket.socket | OSError) -> None:
        if isinstance(result, OSError):
            if not connected.done():
                connected.set_exception(result)
        elif connected.done():  # Cancelled meanwhile.
            result.close()
        else:
            connected.set_result(result)

    def connect_blocking() -> None:
        result: socket.socket | OSError
        try:
            result = socket.create_connection(split_address(address), CONNECT_TIMEOUT)
            result.setblocking(False)
        except OSError as error:
            result = error
        except UnicodeError as error:  # No name that a name server could be asked for.
            result = socket.gaierror(socket.EAI_NONAME, str(error))
        with contextlib.suppress(RuntimeError):  # The loop is closed.
            loop.call_soon_threadsafe(settle, result)

    threading.Thread(target=connect_blocking, daemon=True).start()
    return await connected
