"""How the parent processes of a run's workers agree on who is alive, and on how the run ends. They
do not load TensorFlow.

    run([sys.executable, "-m", "trainer.task", *flags], cluster, startup_timeout=300)

The process that trains is a child (``worker`` explains why); its parent (``parent``) is responsible
for what must never block: signals, deadlines, and the exit code.

The parents connect to worker 0's first, and compare the settings of their workers. Then TensorFlow
takes over the port of worker 0's address; the connections of the parents last as long as the run.
Through them every parent knows which workers are alive, and worker 0's decides for all how the run
ends. Each message is a line of JSON:

    to worker 0    {"hello": 1, "workers": [...]}, {"ready": settings}, {"hang": text},
                   {"ended": [code, text, kind]}
    from worker 0  {"welcome": 0}, {"busy": text}, {"go": 1}, {"verdict": [code, text, about]}
    both           {"heartbeat": 1}, every second

A run ends with exit code 75, which a scheduler need not count as a failure, only where a parent has
seen a worker lost: its connection closed, its heartbeats stopped, its process died or hung, or it
never joined. An error that a worker raises while all are alive ends the run with that error's code.

Worker 0 exits last. The loss of another worker after worker 0 has trained does not fail the run; if
that worker is restarted, it is told that the run is finished.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

from trainer import errors
from trainer.cli import INTERRUPTED
from trainer.distributed.cluster import Cluster
from trainer.distributed.messages import connect, listen_when_free, receive, send
from trainer.distributed.parent import (
    HEARTBEAT_INTERVAL,
    HEARTBEAT_TIMEOUT,
    RESUME_HINT,
    STOP_TIMEOUT,
    STOPPED,
    End,
    Parent,
    Verdict,
)
from trainer.distributed.worker import Outcome
from trainer.errors import ConfigurationError

LOSS_TIMEOUT = 12.0  # Seconds from an error until the lost peer that caused it is noticed, at most.
LEAVE_TIMEOUT = 5.0  # Seconds within which the others exit after the verdict.
TELL_TIMEOUT = 10.0  # Seconds within which workers that join late receive the verdict.


def run(
    command: Sequence[str],
    cluster: Cluster,
    *,
    startup_timeout: float,
    step_timeout: float | None = None,
    notify: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> None:
    """Runs one worker of a run in a child process, until all of them have ended.

    Args:
        command: The child process; it calls ``worker.Link.find`` for its end of the connection.
        cluster: All workers, and which this one is.
        startup_timeout: Seconds to wait for the other workers.
        step_timeout: Seconds without progress after which the run has hung; None: a multiple of the
            longest step (``parent.step_deadline``).
        notify: Called with what there is to tell beside the error: its traceback, and for whom
            worker 0 waits.

    Raises:
        StoppedError: A peer was lost or did not join, the run hung, or a signal stopped it.
        TrainerError: The error of this worker, or of the first one that had any.
        KeyboardInterrupt: A second signal was received, or one before the run had begun.
    """
    parent = _Chief if cluster.is_chief else _Other

    async def supervise() -> End:
        return await parent(command, cluster, startup_timeout, step_timeout, notify).run()

    code, text, details = asyncio.run(supervise())
    if details:
        notify(details)
    if code == INTERRUPTED:
        raise KeyboardInterrupt(text)
    if code:
        raise errors.from_exit_code(code, text)


class _Peer:
    """What worker 0's parent knows of another worker."""

    def __init__(self, index: int, writer: asyncio.StreamWriter) -> None:
        self.index = index
        self.writer = writer
        self.settings: dict | None = None
        self.ended = False  # its process


class _Chief(Parent):
    """Worker 0's parent: the others connect to it, and it decides how the run ends."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.others = range(1, len(self.cluster.workers))
        self.peers: dict[int, _Peer] = {}
        self.running = False
        self.verdict: Verdict | None = None
        self.failures: list[tuple[int, Outcome]] = []  # those whose cause is not known yet
        self.told: set[int] = set()  # the workers that know the verdict
        self.server: asyncio.Server | None = None

    async def run(self) -> End:
        try:
            return await super().run()
        finally:
            if self.server:
                self.server.close()

    # -- meeting

    async def meet(self) -> None:
        self.set_deadline("meeting", self.startup_timeout, self._absent)
        await self._open()

    async def _open(self) -> None:
        self.server = await asyncio.start_server(
            lambda reader, writer: self.spawn(self._serve_peer(reader, writer)),
            sock=await listen_when_free(self.cluster.workers[0]),
        )

    async def _serve_peer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves the connection of another worker's parent."""
        peer = None
        how = "its connection closed"
        try:
            async with asyncio.timeout(HEARTBEAT_TIMEOUT):
                hello = await receive(reader)
            if hello and "hello" in hello and (peer := self._greet(hello, writer)):
                self.spawn(self.send_heartbeats(writer))
                while message := await self._next(reader):
                    if "ready" in message:
                        peer.settings = message["ready"]
                        self._compare()
                    elif "hang" in message:
                        self.on_hang(message["hang"])
                    elif "ended" in message:
                        peer.ended = True
                        self._ended(peer.index, Outcome(*message["ended"]))
        except TimeoutError:
            how = f"no heartbeat for {HEARTBEAT_TIMEOUT:g} s"
        finally:
            writer.close()
            if peer:
                del self.peers[peer.index]
        if peer and not peer.ended:
            self._lost(peer.index, how)
        self._try_to_conclude()

    async def _next(self, reader: asyncio.StreamReader) -> dict | None:
        async with asyncio.timeout(HEARTBEAT_TIMEOUT):
            return await receive(reader)

    def _greet(self, hello: dict, writer: asyncio.StreamWriter) -> _Peer | None:
        """Lets a worker join; returns None when it has been told why it may not."""
        index, workers = hello["hello"], hello.get("workers")
        if self.verdict is None and (
            workers != list(self.cluster.workers) or index not in self.others
        ):
            self._decide(
                ConfigurationError.exit_code,
                f"Expected one list of workers everywhere. Received: {workers} on worker {index}, "
                f"and {list(self.cluster.workers)} on worker 0. Give all of them the same "
                "TF_CONFIG, its task aside.",
                index,
            )
        if self.verdict is not None:
            send(writer, verdict=self.verdict)
            self.told.add(index)
            return None
        if index in self.peers:
            seen = writer.get_extra_info("peername")[0]
            send(writer, busy=f"another process has joined as worker {index}, seen by {seen}")
            return None
        send(writer, welcome=0)
        self.peers[index] = _Peer(index, writer)
        return self.peers[index]

    def on_ready(self) -> None:
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
                send(peer.writer, go=1)
            self.go()

    def _absent(self) -> None:
        missing = [
            self.cluster.name(index)
            for index in self.others
            if index not in self.peers or self.peers[index].settings is None
        ]
        if self.settings is None:
            missing.insert(0, self.cluster.name(0))
        self._decide(*_missing(missing, self.startup_timeout))

    # -- the end

    def on_outcome(self, outcome: Outcome) -> None:
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
            return _loss(self.cluster, index, text)
        if kind == "unclear":
            text = f"{text}. {RESUME_HINT}" if self.running else text
        return Verdict(code, f"{self.cluster.name(index)}: {text}", index)

    def on_hang(self, text: str) -> None:
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
            self._decide(*_loss(self.cluster, index, how))

    def on_signal(self, number: signal.Signals) -> None:
        super().on_signal(number)
        if self.verdict is not None:
            self.finish(*self.own_end(self.verdict))

    def _decide(self, code: int, text: str, about: int | None = None) -> None:
        """Tells all workers how the run ends."""
        if self.verdict is not None:
            return
        self.verdict = Verdict(code, text, about)
        self.cancel_deadlines(*list(self.deadlines))
        self.worker.kill(Outcome(code, text, "unclear"))
        for peer in self.peers.values():
            send(peer.writer, verdict=self.verdict)
        self.told |= set(self.peers)
        self.spawn(self._leave(self.verdict))

    async def _leave(self, verdict: Verdict) -> None:
        """Ends when the others have left, or the time for that is up."""
        seconds = LEAVE_TIMEOUT
        if self.signals:
            seconds = HEARTBEAT_INTERVAL
        elif self.told != set(self.others):
            # Workers that were lost at the very end may come back, and those of a run that cannot
            # start may be on their way: they are told, so that they do not wait in vain.
            done = verdict.code == 0
            seconds = self.startup_timeout if done else 0 if self.running else TELL_TIMEOUT
            if done:
                self._notify_of_waiting(seconds)
                if self.running:  # Else it still is.
                    await self._open()
        until = self.loop.time() + seconds
        while (self.peers or self.told != set(self.others)) and self.loop.time() < until:
            await asyncio.sleep(HEARTBEAT_INTERVAL / 10)
        self.finish(*self.own_end(verdict))

    def _notify_of_waiting(self, seconds: float) -> None:
        lost = [self.cluster.name(index) for index in self.others if index not in self.told]
        self.notify(
            f"The model is saved. Waiting up to {seconds:g} s to tell {', '.join(lost)}, lost at "
            "the very end; Ctrl-C ends that."
        )


class _Other(Parent):
    """The parent of any other worker."""

    chief: asyncio.StreamWriter | None = None
    going = False
    busy = ""

    async def meet(self) -> None:
        self.set_deadline("meeting", self.startup_timeout, self._absent)
        (await listen_when_free(self.cluster.workers[self.cluster.index])).close()
        while True:
            reader, self.chief = await self._join()
            how = await self._listen(reader)
            self.chief.close()
            self.chief = None
            if self.going or self.worker.outcome:
                self._end(_loss(self.cluster, 0, how))

    async def _join(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connects to worker 0's parent until that lets this worker join."""
        hello = {"hello": self.cluster.index, "workers": self.cluster.workers}
        while True:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(HEARTBEAT_TIMEOUT / 2):
                    reader, writer = await connect(self.cluster.workers[0])
                    send(writer, **hello)
                    answer = await receive(reader) or {}
                if "welcome" in answer:
                    self._report_state(writer)
                    return reader, writer
                if "verdict" in answer:
                    self._end(Verdict(*answer["verdict"]))
                self.busy = answer.get("busy", self.busy)
                writer.close()
            await asyncio.sleep(HEARTBEAT_INTERVAL / 2)

    def _report_state(self, writer: asyncio.StreamWriter) -> None:
        """Sends what this worker has reached: its settings, or how its process ended."""
        if self.worker.outcome:
            send(writer, ended=self.worker.outcome)
            if self.worker.outcome.code:
                self._end(Verdict(*self.worker.outcome[:2], self.cluster.index))
        elif self.settings is not None:
            send(writer, ready=self.settings)
        self.spawn(self.send_heartbeats(writer))

    async def _listen(self, reader: asyncio.StreamReader) -> str:
        """Follows worker 0's parent; returns how the connection ended."""
        try:
            while True:
                async with asyncio.timeout(HEARTBEAT_TIMEOUT):
                    message = await receive(reader)
                if message is None:
                    return "its connection closed"
                if "go" in message:
                    self.going = True
                    self.go()
                elif "verdict" in message:
                    self._end(Verdict(*message["verdict"]))
        except TimeoutError:
            return f"no heartbeat for {HEARTBEAT_TIMEOUT:g} s"

    def on_ready(self) -> None:
        self._say(ready=self.settings)

    def on_outcome(self, outcome: Outcome) -> None:
        code, text, kind = outcome
        self._say(ended=outcome)
        own = Verdict(code, text, self.cluster.index)
        if kind == "lost":
            self._end(own)
        elif self.chief is None:
            self.set_deadline("telling", TELL_TIMEOUT, lambda: self._end(own))
        elif code:  # Until worker 0 has decided; where all stop, that is when it has saved.
            unclear = kind in ("crashed", "unclear")
            wait = LOSS_TIMEOUT + HEARTBEAT_INTERVAL if unclear else STOP_TIMEOUT
            self.set_deadline("telling", wait, lambda: self._end(own))

    def on_hang(self, text: str) -> None:
        self._say(hang=text)
        self.set_deadline("telling", TELL_TIMEOUT, lambda: self._end(Verdict(STOPPED, text)))

    def _absent(self) -> None:
        if self.chief is not None:  # Worker 0 waits for others, too, and says for whom.
            return
        code, text = _missing([self.cluster.name(0)], self.startup_timeout)
        self._end(Verdict(code, f"{text} Worker 0 answered: {self.busy}." if self.busy else text))

    def _say(self, **message: object) -> None:
        if self.chief is not None:
            send(self.chief, **message)

    def _end(self, verdict: Verdict) -> None:
        self.finish(*self.own_end(verdict))


def _loss(cluster: Cluster, index: int, how: str) -> Verdict:
    return Verdict(STOPPED, f"{cluster.name(index)} was lost: {how}. {RESUME_HINT}", index)


def _missing(workers: Sequence[str], seconds: float) -> tuple[int, str]:
    return STOPPED, (
        f"{', '.join(workers)} did not join within {seconds:g} s. Start the same command there "
        "too, or use a longer startup_timeout."
    )
