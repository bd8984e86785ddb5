"""A network for the workers of one machine that nobody else can reach, not even on that machine.

    network = open_private_network()     # OSError: this system has none for this user
    subprocess.Popen(command, preexec_fn=network.enter)

TensorFlow's gRPC server authenticates nobody, and listens on all network interfaces. In a network
namespace of Linux there is only one, the loopback interface of that namespace
(https://man7.org/linux/man-pages/man7/network_namespaces.7.html). It ends with the last process in
it. Whoever may not make one can, on most systems, in a user namespace, in which that user and group
are the only ones (user_namespaces(7)): what they may do with files stays as it was.

A process of its own makes the namespaces, and sends their file descriptors: the process that wants
them may have threads, which must not change their user namespace.
"""

import contextlib
import ctypes
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

from trainer.cli import module_command

# From linux/sched.h, linux/sockios.h and linux/if.h.
_CLONE_NEWUSER, _CLONE_NEWNET = 0x1000_0000, 0x4000_0000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_IFREQ = "16sh22x"  # Name of the interface, its flags.


class PrivateNetwork:
    """A network namespace, and the user namespace that it belongs to, if it has one of its own.

    Args:
        namespaces: Their file descriptors, in the order in which they are entered.
    """

    def __init__(self, namespaces: list[int]) -> None:
        self._namespaces = namespaces
        self._libc = ctypes.CDLL(None, use_errno=True)  # Not in ``enter``, after a fork.

    def enter(self) -> None:
        """Moves this process into the network. It must have one thread only.

        Raises:
            OSError: The system refuses.
        """
        for namespace in self._namespaces:
            _check(self._libc.setns(namespace, 0))

    def close(self) -> None:
        """Closes the file descriptors; processes in the network keep it."""
        for namespace in self._namespaces:
            os.close(namespace)


def open_private_network() -> PrivateNetwork:
    """Makes a network with a loopback interface.

    Raises:
        OSError: The system has no network namespaces, or does not let this user make one.
    """
    if sys.platform != "linux":
        raise OSError("only Linux has network namespaces")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        made = subprocess.run(
            [*module_command(__name__), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if made.returncode:
            raise OSError(made.stderr.strip().splitlines()[-1] if made.stderr else "it was killed")
        _, namespaces, _, _ = socket.recv_fds(ours, 1, 2)
    for namespace in namespaces:
        os.set_inheritable(namespace, False)
    return PrivateNetwork(list(namespaces))


def _make_namespaces() -> list[int]:
    """Moves this process into new namespaces; returns their file descriptors."""
    import fcntl  # Here: Windows has none.

    libc = ctypes.CDLL(None, use_errno=True)
    kinds = ["net"]
    try:
        _check(libc.unshare(_CLONE_NEWNET))
    except PermissionError:
        uid, gid = os.geteuid(), os.getegid()
        if not uid:  # In a user namespace root could not read the files of others any more.
            raise
        _check(libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET))
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
        kinds = ["user", "net"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack(_IFREQ, b"lo", 0)
        _, flags = struct.unpack(_IFREQ, fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))
        request = struct.pack(_IFREQ, b"lo", flags | _IFF_UP)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, request)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        contextlib.closing(socket.create_connection(server.getsockname(), timeout=5)),
    ):
        pass  # It works.
    return [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in kinds]


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    try:
        with socket.socket(fileno=int(sys.argv[1])) as connection:
            socket.send_fds(connection, [b"."], _make_namespaces())
    except OSError as error:
        sys.exit(str(error.strerror or error))
