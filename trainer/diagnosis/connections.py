"""Whether the workers of a run can be reached: each by name, address and port.

findings = check_cluster(cluster, in_pod=False)
"""

import socket
import threading
from collections.abc import Callable, Iterator, Sequence

from trainer.diagnosis.finding import Finding
from trainer.distributed.cluster import Cluster, split_address
from trainer.distributed.messages import CONNECT_TIMEOUT, listen
from trainer.distributed.parent import unreachable
from trainer.distributed.private_network import open_private_network
from trainer.errors import ConfigurationError

RESOLVE_TIMEOUT = 10.0  # Seconds; resolvers give a name server 5 s, twice (man resolv.conf).


def check_cluster(cluster: Cluster | None, *, in_pod: bool) -> Iterator[Finding]:
    """Looks up each worker, tries to connect to the others, and to listen at this one's port.

    Args:
        cluster: The workers; None: this process trains alone.
        in_pod: Whether it runs in Kubernetes, where the name of a pod exists when the pod does.
    """
    if cluster is None:
        yield Finding("workers", "ok", "this process trains alone")
        yield _private_network()
        return
    yield Finding(
        "workers", "ok", f"this is {cluster.name(cluster.index)} of {len(cluster.workers)}"
    )
    notice = cluster.secret.notice
    if notice and (cluster.is_chief or cluster.secret.key):
        yield Finding("secret", "warning", notice)
    elif not notice:
        yield Finding("secret", "ok", "the workers share one")
    addresses = [split_address(worker) for worker in cluster.workers]
    found = _together(lambda address: examine_address(*address), addresses)
    for index, (address, reason) in enumerate(found):
        where = f"{cluster.name(index)}, {address}" if address else cluster.name(index)
        if index == cluster.index:
            yield _own(cluster, where, address, reason)
        elif not address:
            yield Finding(
                "workers",
                "warning" if in_pod else "error",
                f"{where}: {reason}",
                "It has no name before its pod is there; else correct the name."
                if in_pod
                else "Correct the name where the cluster is described, or in DNS.",
            )
        elif reason in ("", "connection refused"):
            state = "it listens" if not reason else "its machine answers; no worker listens yet"
            yield Finding("workers", "ok", f"{where}: {state}")
        else:
            yield Finding(
                "workers",
                "warning",
                f"{where}: {reason}",
                "Start its machine, and let its port through the firewall between the workers.",
            )


def examine_address(host: str, port: int) -> tuple[str, str]:
    """Resolves a host name and connects to a port.

    Returns:
        The host's address, empty where it has none; and why the port cannot be reached, empty
        where it can be.
    """
    addresses, reason = _resolve(host)
    for address in addresses:
        try:
            socket.create_connection((address, port), CONNECT_TIMEOUT).close()
        except OSError as error:
            reason = unreachable(error)
        else:
            return address, ""
    return addresses[0] if addresses else "", reason


def _own(cluster: Cluster, where: str, address: str, reason: str) -> Finding:
    try:
        listen(cluster.workers[cluster.index]).close()
    except ConfigurationError as error:
        return Finding("workers", "error", str(error))
    if not address:
        return Finding(
            "workers",
            "warning",
            f"{where}, which is this one: {reason}",
            "The other workers look it up by this name, too.",
        )
    return Finding("workers", "ok", f"{where}: this one, whose port is free")


def _private_network() -> Finding:
    try:
        open_private_network().close()
    except OSError as error:
        reason = error.strerror or error
        seen = f"none for the workers of trainer.launch ({reason}): others could reach their ports"
        return Finding("private network", "ok", seen)
    return Finding("private network", "ok", "the workers of trainer.launch have one")


def _together(
    examine: Callable[[tuple[str, int]], tuple[str, str]], addresses: Sequence[tuple[str, int]]
) -> list[tuple[str, str]]:
    """Examines all addresses at the same time."""
    results = [("", "no answer")] * len(addresses)

    def run(index: int) -> None:
        results[index] = examine(addresses[index])

    threads = [
        threading.Thread(target=run, args=[index], daemon=True) for index in range(len(addresses))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def _resolve(host: str) -> tuple[list[str], str]:
    """Returns the addresses of a host; why there are none, where there are none.

    In a daemon thread, because nothing limits how long a name server is waited for.
    """
    found: list[tuple[list[str], str]] = [([], "its name is not resolved: no answer")]

    def ask() -> None:
        try:
            infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            found.append(([str(info[4][0]) for info in infos], ""))
        except OSError as error:
            found.append(([], unreachable(error)))
        except UnicodeError as error:  # No name that a name server could be asked for.
            found.append(([], f"its name cannot be resolved ({error})"))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(RESOLVE_TIMEOUT)
    return found[-1]
