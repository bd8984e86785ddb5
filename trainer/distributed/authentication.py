"""The shared secret of a run, and how both ends of a connection prove that they know it.

    secret = read_secret(os.environ)                       # TRAINER_TOKEN_FILE names its file
    session = Session(secret.key, hello, challenge, caller=True)
    connection.send(session.sign(content) + content)
    session.verify(mac, content)                           # what came from the other end

The process that connects is the caller, the one that listens the callee. Each connection begins
with two messages, each with a random number (nonce) of 16 bytes:

    caller → callee    hello: who calls, for what, and the caller's nonce
    callee → caller    challenge: the callee's nonce; and MAC(callee's key, 1, challenge)
    caller → callee    MAC(caller's key, 1, message), message

    caller's key = HMAC(secret, "digits-trainer caller" | SHA-256(hello) | SHA-256(challenge))
    callee's key = HMAC(secret, "digits-trainer callee" | SHA-256(hello) | SHA-256(challenge))
    MAC(key, n, message) = HMAC(key, n | message)        for the n-th message of that end, from 1

All with SHA-256 (RFC 2104). Each end has contributed a nonce to both keys, so that no message of
another connection is valid on this one; each direction has a key of its own, so that none can be
sent back to where it came from; the number keeps messages from being repeated, dropped or
reordered. An end that receives a wrong MAC takes the connection for closed.

The messages of the parent processes are all authenticated this way, heartbeats too. Connections of
the ring are authenticated when they are made; the gradients that follow carry no MAC, which would
cost more time than the ring saves. Nothing is encrypted, and TensorFlow's own connections are not
authenticated either: SECURITY.md says what follows from that.

Without a secret the key is empty: the same messages, which anybody can make.
"""

import dataclasses
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping

from trainer.errors import ConfigurationError

TOKEN = "TRAINER_TOKEN"  # noqa: S105
TOKEN_FILE = "TRAINER_TOKEN_FILE"  # noqa: S105
NONCE_SIZE = 16  # Bytes.
MAC_SIZE = hashlib.sha256().digest_size

_LEAST, _MOST = 16, 4096  # Bytes of a secret.

_NONE = (
    "The workers have no shared secret: whoever reaches their ports can join this run, end it or "
    f"set its outcome. {TOKEN_FILE} names a file with one (SECURITY.md)."
)


@dataclasses.dataclass(frozen=True)
class Secret:
    """The shared secret of a run.

    Attributes:
        key: Its bytes; empty: there is none.
        notice: What the user is to know about it; may be empty.
    """

    key: bytes = dataclasses.field(default=b"", repr=False)
    notice: str = _NONE


NO_SECRET = Secret()


def read_secret(environ: Mapping[str, str]) -> Secret:
    """Returns the secret in ``TRAINER_TOKEN``, which ``trainer.launch`` sets for its workers, or in
    the file that ``TRAINER_TOKEN_FILE`` names. White space around it does not count. With a "-"
    before the name, as in systemd's units, the file may be missing.

    Raises:
        ConfigurationError: One of them is set, but there is no such file, or no secret in it.
    """
    if TOKEN in environ:
        return Secret(_checked(os.fsencode(environ[TOKEN]), TOKEN), notice="")
    if TOKEN_FILE not in environ:
        return NO_SECRET
    path = environ[TOKEN_FILE].removeprefix("-")
    try:
        # A FIFO would be waited for.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise _unusable(f"{path!r}: no regular file")
            key = file.read(_MOST + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and environ[TOKEN_FILE].startswith("-"):
            return NO_SECRET
        reason = getattr(error, "strerror", None) or str(error)
        raise _unusable(f"{path!r}: {reason}") from None
    key = _checked(key, repr(path))
    exposed = mode & (stat.S_IROTH | stat.S_IWOTH)
    return Secret(key, f"Other users can read the secret in {path}: chmod 600." if exposed else "")


def make_secret() -> str:
    """Returns a new secret, as ``TRAINER_TOKEN`` holds it."""
    return secrets.token_hex(32)


def nonce() -> bytes:
    """Returns a random number that was never used before."""
    return secrets.token_bytes(NONCE_SIZE)


class Session:
    """One end of a connection: it signs what that end sends, and verifies what it receives.

    Args:
        key: The secret.
        hello: The first message, with the caller's nonce.
        challenge: The second message, with the callee's nonce.
        caller: Whether this is the end that connected.
    """

    def __init__(self, key: bytes, hello: bytes, challenge: bytes, *, caller: bool) -> None:
        transcript = hashlib.sha256(hello).digest() + hashlib.sha256(challenge).digest()
        callers, callees = (
            _mac(key, b"digits-trainer " + end + transcript) for end in (b"caller", b"callee")
        )
        self._own, self._other = (callers, callees) if caller else (callees, callers)
        self._sent = self._received = 0

    def sign(self, content: bytes) -> bytes:
        """Returns the MAC of the next message to be sent."""
        self._sent += 1
        return _mac(self._own, self._sent.to_bytes(8, "big") + content)

    def verify(self, mac: bytes, content: bytes) -> bool:
        """Tells whether the MAC is that of the next message of the other end."""
        self._received += 1
        expected = _mac(self._other, self._received.to_bytes(8, "big") + content)
        return hmac.compare_digest(mac, expected)


def _mac(key: bytes, content: bytes) -> bytes:
    return hmac.digest(key, content, "sha256")


def _checked(key: bytes, where: str) -> bytes:
    key = key.strip()
    if _LEAST <= len(key) <= _MOST:
        return key
    raise _unusable(f"{len(key) if len(key) <= _MOST else f'more than {_MOST}'} in {where}")


def _unusable(received: str) -> ConfigurationError:
    return ConfigurationError(
        f"Expected {TOKEN_FILE} to name a file with the secret that all workers share, of at least "
        f"{_LEAST} characters. Received: {received}. `openssl rand -hex 32` makes a secret; every "
        "worker needs the same."
    )
