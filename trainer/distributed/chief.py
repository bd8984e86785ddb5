"""Worker 0's parent process: the parents of the other workers connect to it, and it decides how the
run ends (``supervisor`` describes their messages).
"""

import asyncio
import signal
from typing import Any, cast

from trainer.cli import INTERRUPTED
from trainer.distributed.authentication import TOKEN_FILE
from trainer.distributed.messages import (
    CALLERS,
    Connection,
    Outcome,
    Verdict,
    admit,
    connect,
    listen_when_free,
    printable,
)
from trainer.distributed.parent import (
    HEARTBEAT_INTERVAL,
    HEARTBEAT_TIMEOUT,
    LEAVE_TIMEOUT,
    LOSS_TIMEOUT,
    RESUME_HINT,
    STOP_TIMEOUT,
    STOPPED,
    TELL_TIMEOUT,
    End,
    Parent,
    loss,
    missing,
    secret_mismatch,
    unreachable,
)
from trainer.errors import ConfigurationError

NOTICE_INTERVAL = 60.0  # Seconds between two notices about callers that were turned away.
_NAMED = 8  # Missing workers that a notice names.


class _Peer:
    """What worker 0's parent knows of another worker."""

    def __init__(self, index: int, connection: Connection) -> None:
        self.index = index
        self.connection = connection
        self.settings: dict | None = None
        self.ended = False  # its process


class Chief(Parent):
    """Worker 0's parent: the others connect to it, and it decides how the run ends."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.others = range(1, len(self.cluster.workers))
        self.peers: dict[int, _Peer] = {}
        self.callers: list[Connection] = []  # not authenticated yet, the oldest first
        self.next_notice = 0.0  # time, of the next notice about a caller
        self.running = False
        self.verdict: Verdict | None = None
        self.failures: list[tuple[int, Outcome]] = []  # those whose cause is not known yet
        self.told: set[int] = set()  # the workers that know the verdict
        self.server: asyncio.Server | None = None

    async def run(self) -> End:
        """Returns how worker 0 ends, when it does."""
        try:
            return await super().run()
        finally:
            if self.server:
                self.server.close()

    # -- meeting

    async def meet(self) -> None:
        """Lets the others join."""
        self.set_deadline("meeting", self.startup_timeout, self._absent)
        self.announce_waiting()
        await self._open()

    async def _open(self) -> None:
        self.server = await asyncio.start_server(
            lambda reader, writer: self.spawn(self._serve(Connection(reader, writer))),
            sock=await listen_when_free(self.cluster.workers[0]),
        )

    async def _serve(self, connection: Connection) -> None:
        """Serves whoever connects."""
        try:
            index = await self._authenticate(connection)
            if index is not None and (peer := self._join(index, connection)):
                await self._follow(peer)
        finally:
            connection.close()
        self._try_to_conclude()

    async def _authenticate(self, connection: Connection) -> int | None:
        """Returns the number of the worker that calls; None: it is none of this run."""
        self.callers.append(connection)
        if len(self.callers) > CALLERS:
            self.callers.pop(0).close()
        try:
            async with asyncio.timeout(HEARTBEAT_TIMEOUT):
                hello = await admit(connection, self.cluster.secret)
                if hello is None:
                    return None
                if await connection.receive() is None:  # The first message that proves who it is.
                    if connection.forged:
                        self._turn_away(hello, connection)
                    return None
        except TimeoutError:
            return None
        finally:
            if connection in self.callers:
                self.callers.remove(connection)
        if hello["workers"] != list(self.cluster.workers):
            self._decide(
                ConfigurationError.exit_code,
                "Expected one list of workers everywhere. Received: "
                f"{hello['workers']} on worker {hello['hello']}, and "
                f"{list(self.cluster.workers)} on worker 0. Give all of them the same TF_CONFIG, "
                "its task aside.",
                hello["hello"],
            )
        return hello["hello"]

    def _turn_away(self, hello: dict, connection: Connection) -> None:
        """Handles a caller that greets as a worker, but does not know the secret of this one."""
        if not self.cluster.secret.key:
            if hello["secret"]:
                self.told.add(hello["hello"])  # It knows already, and believes nothing else.
                self._decide(
                    ConfigurationError.exit_code,
                    secret_mismatch(f"one on worker {hello['hello']}, none on worker 0"),
                    hello["hello"],
                )
        elif self.loop.time() >= self.next_notice:
            self.next_notice = self.loop.time() + NOTICE_INTERVAL
            self.notify(
                f"A caller from {connection.host} that greets as worker {hello['hello']} was "
                f"turned away: it has {'another' if hello['secret'] else 'no'} secret. If it is "
                f"that worker, start it again with the file that {TOKEN_FILE} names here."
            )

    def _join(self, index: int, connection: Connection) -> _Peer | None:
        """Lets a worker join; returns None when it has been told why it may not."""
        if self.verdict is not None:
            connection.send(verdict=self.verdict)
            self.told.add(index)
            return None
        if index in self.peers:
            text = f"another process has joined as worker {index}, seen by {connection.host}"
            connection.send(busy=text)
            return None
        connection.send(welcome=1)
        self.peers[index] = _Peer(index, connection)
        return self.peers[index]

    async def _follow(self, peer: _Peer) -> None:
        """Handles what a worker that has joined reports, until its connection ends."""
        how = "its connection closed"
        self.spawn(self.send_heartbeats(peer.connection))
        try:
            while message := await self._next(peer.connection):
                if "ready" in message:
                    peer.settings = message["ready"]
                    self._compare()
                elif "hang" in message:
                    self.on_hang(message["hang"])
                elif "ended" in message:
                    peer.ended = True
                    self._ended(peer.index, message["ended"])
        except TimeoutError:
            how = f"no heartbeat for {HEARTBEAT_TIMEOUT:g} s"
        finally:
            del self.peers[peer.index]
        if not peer.ended:
            self._lost(peer.index, how)

    async def _next(self, connection: Connection) -> dict | None:
        async with asyncio.timeout(HEARTBEAT_TIMEOUT):
            return await connection.receive()

    async def waits_for(self) -> str:
        """Returns which workers have not joined, and why; tells the others, too."""
        absent = [index for index in self.others if index not in self.peers]
        if not absent or self.verdict is not None:
            return ""
        named = absent[:_NAMED]
        reasons = await asyncio.gather(*(self._reason(index) for index in named))
        workers = [
            f"{self.cluster.name(index)}: {reason}"
            for index, reason in zip(named, reasons, strict=True)
        ]
        if len(absent) > _NAMED:
            workers.append(f"and {len(absent) - _NAMED} others")
        text = (
            f"Waiting for {'; '.join(workers)}. They have not started yet, or cannot reach "
            f"{self.cluster.name(0)}."
        )
        for peer in self.peers.values():
            peer.connection.send(waiting=text)
        return text

    async def _reason(self, index: int) -> str:
        """Returns what is known of a worker that has not joined: a worker that waits for this one
        listens at no port, but its machine refuses the connection.
        """
        try:
            _, writer = await connect(self.cluster.workers[index])
        except OSError as error:
            return unreachable(error)
        writer.close()
        return "something else answers there"

    def on_ready(self) -> None:
        """Compares the settings, which are known now."""
        self._compare()

    def _compare(self) -> None:
        """Starts the run when all workers are there and their settings are equal."""
        if self.settings is None or self.running or self.verdict is not None:
            return
        peers = self.peers.values()
        ready = [(peer, peer.settings) for peer in peers if peer.settings is not None]
        for peer, settings in ready:
            differences = [
                f"{name}={settings.get(name)!r} where worker 0 has {name}={value!r}"
                for name, value in self.settings.items()
                if settings.get(name) != value
            ]
            if differences:
                self._decide(
                    ConfigurationError.exit_code,
                    f"Expected all workers to train the same. Received: {', '.join(differences)}, "
                    f"on {self.cluster.name(peer.index)}. Give all of them the same flags, data "
                    "and packages.",
                    peer.index,
                )
                return
        if len(ready) == len(self.others):
            self.running = True
            if self.server:
                self.server.close()  # TensorFlow's server takes over the port.
            for peer, _ in ready:
                peer.connection.send(go=1)
            self.go()

    def _absent(self) -> None:
        absent = [
            self.cluster.name(index)
            for index in self.others
            if index not in self.peers or self.peers[index].settings is None
        ]
        if self.settings is None:
            absent.insert(0, self.cluster.name(0))
        self._decide(*missing(absent, self.startup_timeout))

    # -- the end

    def on_outcome(self, outcome: Outcome) -> None:
        """Ends the run, when the others have ended or because of an error."""
        if self.verdict is not None:  # It was killed because of that.
            return
        if outcome.code == 0 or self._agreed_to_stop(outcome):
            # All workers end this way; this one may be the first.
            wait = LEAVE_TIMEOUT if outcome.code == 0 else HEARTBEAT_INTERVAL
            self.set_deadline("last", wait, self._conclude)
            self._try_to_conclude()
        else:
            self._fail(0, outcome)

    def _ended(self, index: int, outcome: Outcome) -> None:
        """Handles the outcome of another worker's process."""
        self._try_to_conclude()
        if outcome.code == 0 or self.trained or self.verdict is not None:
            return
        if self._agreed_to_stop(outcome) and self.worker.outcome is None:
            # Worker 0 is still saving its checkpoint.
            self.set_deadline("stopping", STOP_TIMEOUT, lambda: self._decide(*outcome[:2], index))
        else:
            self._fail(index, outcome)

    def _agreed_to_stop(self, outcome: Outcome) -> bool:
        return self.running and outcome.kind == "named" and outcome.code == STOPPED

    def _fail(self, index: int, outcome: Outcome) -> None:
        """Ends the run because of the outcome of a worker's process: at once, unless it can be the
        consequence of the loss of another worker, which will then be noticed within LOSS_TIMEOUT.
        """
        if self.running and outcome.kind in ("crashed", "unclear"):
            self.failures.append((index, outcome))
            self.set_deadline("loss", LOSS_TIMEOUT, self._decide_by_failures)
        else:
            self._decide(*self._failure(index, outcome))

    def _decide_by_failures(self) -> None:
        """Ends the run because of the first process that died; else because of the first error."""
        died = [failure for failure in self.failures if failure[1].kind == "crashed"]
        index, outcome = (died or self.failures)[0]
        if index == 0 or not self.trained:
            self._decide(*self._failure(index, outcome))

    def _failure(self, index: int, outcome: Outcome) -> Verdict:
        code, text, kind = outcome
        if kind in ("lost", "crashed") or code == INTERRUPTED:
            return loss(self.cluster, index, text)
        if kind == "unclear":
            text = f"{text}. {RESUME_HINT}" if self.running else text
        return Verdict(code, f"{self.cluster.name(index)}: {text}", index)

    def on_hang(self, text: str) -> None:
        """Ends the run."""
        if self.running and not self.trained:
            self._decide(STOPPED, text)

    def _try_to_conclude(self) -> None:
        """Ends the run with the outcome of worker 0's process, when the others have ended too."""
        if "last" in self.deadlines and all(peer.ended for peer in self.peers.values()):
            self._conclude()

    def _conclude(self) -> None:
        code, text, _ = cast("Outcome", self.worker.outcome)  # on_outcome has been called.
        self._decide(code, text and f"{self.cluster.name(0)}: {text}", 0)

    def _lost(self, index: int, how: str) -> None:
        """Ends the run because a worker is lost, if it is still needed."""
        if self.running and not self.trained:
            self._decide(*loss(self.cluster, index, how))

    def on_signal(self, number: signal.Signals) -> None:
        """Forwards a signal; ends worker 0 where it only waits for the others."""
        super().on_signal(number)
        if self.verdict is not None:
            self.finish(*self.own_end(self.verdict))

    def _decide(self, code: int, text: str, about: int | None = None) -> None:
        """Tells all workers how the run ends."""
        if self.verdict is not None:
            return
        self.verdict = Verdict(code, printable(text), about)
        self.cancel_deadlines(*list(self.deadlines))
        self.worker.kill(Outcome(code, text, "unclear"))
        for peer in self.peers.values():
            peer.connection.send(verdict=self.verdict)
        self.told |= set(self.peers)
        self.spawn(self._leave(self.verdict))

    async def _leave(self, verdict: Verdict) -> None:
        """Ends when the others have left, or the time for that is up."""
        seconds = LEAVE_TIMEOUT
        if self.signals:
            seconds = HEARTBEAT_INTERVAL
        elif set(self.others) - self.told:
            # Workers that were lost at the very end may come back, and those of a run that cannot
            # start may be on their way: they are told, so that they do not wait in vain.
            done = verdict.code == 0
            seconds = self.startup_timeout if done else 0 if self.running else TELL_TIMEOUT
            if done:
                self._notify_of_waiting(seconds)
                if self.running:  # Else it still is.
                    await self._open()
        until = self.loop.time() + seconds
        while (self.peers or set(self.others) - self.told) and self.loop.time() < until:
            await asyncio.sleep(HEARTBEAT_INTERVAL / 10)
        self.finish(*self.own_end(verdict))

    def _notify_of_waiting(self, seconds: float) -> None:
        lost = [self.cluster.name(index) for index in self.others if index not in self.told]
        self.notify(
            f"Worker 0 is done. Waiting up to {seconds:g} s to tell {', '.join(lost)}, lost at "
            "the very end; Ctrl-C ends that."
        )
