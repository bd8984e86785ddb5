"""Messages between the processes of a run, over sockets.

    reader, writer = await connect("digits-0.digits:2222")
    send(writer, hello=1)
    answer = await receive(reader)

A message is a JSON object on one line.
"""

import asyncio
import contextlib
import errno
import json
import os
import socket
import threading

from trainer.distributed.cluster import split_address
from trainer.errors import ConfigurationError

CONNECT_TIMEOUT = 5.0  # Seconds to reach an address.
PORT_TIMEOUT = 10.0  # Seconds until the port of a worker that was killed is free again.


def encode(message: dict) -> bytes:
    """Encodes a message as a line of JSON."""
    return json.dumps(message).encode() + b"\n"


def send(writer: asyncio.StreamWriter, **message: object) -> None:
    """Sends a message, unless the connection is closed."""
    if not writer.is_closing():
        writer.write(encode(message))


async def receive(reader: asyncio.StreamReader) -> dict | None:
    """Returns the next message; None at the end of the stream, and for what is not a message."""
    try:
        message = json.loads(await reader.readline())
    except (OSError, ValueError):  # ValueError: not JSON, or longer than asyncio's 64 KiB.
        return None
    return message if isinstance(message, dict) else None


def listen(address: str) -> socket.socket:
    """Listens on the port of an address, on all network interfaces.

    Raises:
        ConfigurationError: The port is in use.
    """
    _, port = split_address(address)
    try:
        return _listen_on(port)
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


def _listen_on(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # IPv6 is switched off.
                raise
    return socket.create_server(("", port))


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connects to an address.

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

    def connect_socket() -> None:
        result: socket.socket | OSError
        try:
            result = socket.create_connection(split_address(address), CONNECT_TIMEOUT)
            result.setblocking(False)
        except OSError as error:
            result = error
        with contextlib.suppress(RuntimeError):  # The loop is closed.
            loop.call_soon_threadsafe(settle, result)

    threading.Thread(target=connect_socket, daemon=True).start()
    return await asyncio.open_connection(sock=await connected)
