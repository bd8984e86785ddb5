"""Messages between the processes of a run: JSON objects, one a line, over sockets.

reader, writer = await connect("digits-0.digits:2222")
send(writer, hello=1)
answer = await receive(reader)
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

CONNECT = 5.0  # Seconds to reach an address.
FREED = 10.0  # Seconds in which the port of a worker that was killed is free again.


def encode(message: dict) -> bytes:
    """Writes a message as its line."""
    return json.dumps(message).encode() + b"\n"


def send(writer: asyncio.StreamWriter, **message: object) -> None:
    """Sends a message, unless the connection is closed."""
    if not writer.is_closing():
        writer.write(encode(message))


async def receive(reader: asyncio.StreamReader) -> dict | None:
    """Returns the next message; None at the end, and for what is no message."""
    try:
        message = json.loads(await reader.readline())
    except (OSError, ValueError):  # ValueError: not JSON, or longer than asyncio's 64 KiB.
        return None
    return message if isinstance(message, dict) else None


def listen(address: str) -> socket.socket:
    """Listens at the port of an address, on all of this machine's interfaces.

    Raises:
        ConfigurationError: The port is in use.
    """
    _, port = split_address(address)
    try:
        return _listen_at(port)
    except OSError as error:
        raise ConfigurationError(
            f"Expected to listen at port {port}, for the address {address}. Received: "
            f"{os.strerror(error.errno)}. Name a free port, or end what uses it."
        ) from error


async def listener(address: str) -> socket.socket:
    """The same, where the port may be that of a worker that has just been killed.

    Raises:
        ConfigurationError: The port is in use, and stays so.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + FREED
    while True:
        try:
            return listen(address)
        except ConfigurationError as refused:
            if loop.time() > end or refused.__cause__.errno != errno.EADDRINUSE:
                raise
        await asyncio.sleep(FREED / 40)


def _listen_at(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # IPv6 is switched off.
                raise
    return socket.create_server(("", port))


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connects to an address; raises ``OSError`` where that fails.

    In a thread that nothing waits for: a name server that does not answer must not hold up the end
    of the process, as it would in a thread of asyncio's own.
    """
    loop = asyncio.get_running_loop()
    connected = loop.create_future()

    def settle(result: socket.socket | OSError) -> None:
        if isinstance(result, OSError):
            if not connected.done():
                connected.set_exception(result)
        elif connected.done():  # Nobody waits any more.
            result.close()
        else:
            connected.set_result(result)

    def call() -> None:
        try:
            result = socket.create_connection(split_address(address), CONNECT)
            result.setblocking(False)
        except OSError as error:
            result = error
        with contextlib.suppress(RuntimeError):  # The loop is closed.
            loop.call_soon_threadsafe(settle, result)

    threading.Thread(target=call, daemon=True).start()
    return await asyncio.open_connection(sock=await connected)
