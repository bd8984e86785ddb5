"""How the parent processes of a run's workers agree on who is alive, and on how the run ends. They
load no TensorFlow.

    run([sys.executable, "-m", "trainer.task", *flags], cluster, startup_timeout=300)

The process that trains is a child (``worker`` says why); its parent (``parent``) owns what must
never wait: signals, deadlines, and the exit code.

The parents meet first, at worker 0's address, and compare what they are about to train. Their
connections last as long as the run, beside TensorFlow's own, which takes over the port: by them
every parent knows who is alive, and worker 0's decides for all how the run ends. Each message is a
line of JSON:

    to worker 0    {"hello": 1, "workers": [...]}, {"ready": facts}, {"ended": [code, text, kind]}
    from worker 0  {"welcome": 0}, {"busy": text}, {"go": 1}, {"verdict": [code, text, about]}
    both           {"beat": 1}, every second

Workers leave first and worker 0 last. One that is lost when worker 0 has trained costs nothing;
when it comes back it is told that the run is finished.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Sequence

from trainer import errors
from trainer.cli import INTERRUPTED
from trainer.distributed.cluster import Cluster
from trainer.distributed.messages import connect, listener, receive, send
from trainer.distributed.parent import BEAT, SILENCE, STANDS, STOP, STOPPED, Parent, Verdict
from trainer.distributed.worker import Outcome
from trainer.errors import ConfigurationError

NEWS = 12.0  # Seconds in which an error of TensorFlow's turns out to be the loss of a peer.
LEAVE = 5.0  # Seconds in which the others end when they are told to.
TELL = 10.0  # Seconds in which workers that have not come yet can learn why there is no run.


def run(command: Sequence[str], cluster: Cluster, *, startup_timeout: float) -> None:
    """Runs one worker of a run in a child process, until all of them have ended.

    Args:
        command: What the child is; it finds its end of the connection by ``child.Link.find``.
        cluster: All workers, and which this one is.
        startup_timeout: Seconds to wait for the others.

    Raises:
        StoppedError: A peer was lost or did not come, or a signal stopped the run.
        TrainerError: What the child, or another worker, ended with.
        KeyboardInterrupt: A second signal came, or one before there was anything to lose.
    """
    kind = _Chief if cluster.is_chief else _Other

    async def supervise() -> tuple[int, str]:
        return await kind(command, cluster, startup_timeout).run()

    code, text = asyncio.run(supervise())
    if code == INTERRUPTED:
        raise KeyboardInterrupt(text)
    if code:
        raise errors.of(code, text)


class _Peer:
    """What the chief's parent knows of another worker's."""

    def __init__(self, index: int, writer: asyncio.StreamWriter) -> None:
        self.index = index
        self.writer = writer
        self.facts: dict | None = None
        self.ended = False  # its child


class _Chief(Parent):
    """Worker 0's parent: gathers the others, and decides how the run ends."""

    def __init__(self, command: Sequence[str], cluster: Cluster, startup_timeout: float) -> None:
        super().__init__(command, cluster, startup_timeout)
        self.others = range(1, len(cluster.workers))
        self.peers: dict[int, _Peer] = {}
        self.running = False
        self.verdict: Verdict | None = None
        self.told: set[int] = set()  # who knows the verdict
        self.server: asyncio.Server | None = None

    async def run(self) -> tuple[int, str]:
        try:
            return await super().run()
        finally:
            if self.server:
                self.server.close()

    # -- meeting

    async def meet(self) -> None:
        self.limit("meeting", self.startup_timeout, self._absent)
        await self._open()

    async def _open(self) -> None:
        self.server = await asyncio.start_server(
            lambda reader, writer: self.spawn(self._talk(reader, writer)),
            sock=await listener(self.cluster.workers[0]),
        )

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talks with another worker's parent, from its hello on."""
        peer = None
        how = "its connection closed"
        try:
            async with asyncio.timeout(SILENCE):
                hello = await receive(reader)
            if hello and "hello" in hello and (peer := self._greet(hello, writer)):
                self.spawn(self.beat(writer))
                while message := await self._next(reader):
                    if "ready" in message:
                        peer.facts = message["ready"]
                        self._compare()
                    elif "ended" in message:
                        peer.ended = True
                        self._ended(peer.index, Outcome(*message["ended"]))
        except TimeoutError:
            how = f"no sign of life for {SILENCE:g} s"
        finally:
            writer.close()
            if peer:
                del self.peers[peer.index]
        if peer and not peer.ended:
            self._lost(peer.index, how)
        self._try_to_conclude()

    async def _next(self, reader: asyncio.StreamReader) -> dict | None:
        async with asyncio.timeout(SILENCE):
            return await receive(reader)

    def _greet(self, hello: dict, writer: asyncio.StreamWriter) -> _Peer | None:
        """Lets a worker join; None: it has been told why not."""
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
        """Begins the run when all are there and about to train the same."""
        if self.facts is None or self.running or self.verdict is not None:
            return
        ready = [peer for peer in self.peers.values() if peer.facts is not None]
        for peer in ready:
            differences = [
                f"{name}={peer.facts.get(name)!r} where worker 0 has {name}={value!r}"
                for name, value in self.facts.items()
                if peer.facts.get(name) != value
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
            self.server.close()  # TensorFlow's server takes over the port.
            for peer in ready:
                send(peer.writer, go=1)
            self.go()

    def _absent(self) -> None:
        missing = [
            self.cluster.name(index)
            for index in self.others
            if index not in self.peers or self.peers[index].facts is None
        ]
        if self.facts is None:
            missing.insert(0, self.cluster.name(0))
        self._decide(*_missing(missing, self.startup_timeout))

    # -- the end

    def on_outcome(self, outcome: Outcome) -> None:
        code, text, kind = outcome
        if self.verdict is not None:  # It was ended because of that.
            return
        if code == 0 or (code == STOPPED and kind == "named" and self.running):
            # All have come to the same end.
            self.limit("last", LEAVE if code == 0 else BEAT, self._conclude)
            self._try_to_conclude()
        elif kind == "unclear" and self.running:
            self.limit("news", NEWS, lambda: self._gone(0, text))
        elif kind == "named" and code != INTERRUPTED:
            self._decide(code, f"{self.cluster.name(0)}: {text}", 0)
        else:
            self._gone(0, text)

    def _ended(self, index: int, outcome: Outcome) -> None:
        """Takes how another worker's child ended."""
        code, text, kind = outcome
        self._try_to_conclude()
        if code == 0 or self.trained or self.verdict is not None:
            return
        if kind == "unclear" and self.running:
            self.limit("news", NEWS, lambda: self._lost(index, text))
        elif kind != "named" or code == INTERRUPTED:
            self._gone(index, text)
        elif code == STOPPED and self.child.outcome is None and self.running:
            # All have agreed to stop; this one saves.
            self.limit("stopping", STOP, lambda: self._decide(code, text, index))
        else:
            self._decide(code, f"{self.cluster.name(index)}: {text}", index)

    def _try_to_conclude(self) -> None:
        """Ends the run as this worker's child has ended, when the others have as well."""
        if "last" in self.deadlines and all(peer.ended for peer in self.peers.values()):
            self._conclude()

    def _conclude(self) -> None:
        code, text, _ = self.child.outcome
        self._decide(code, text and f"{self.cluster.name(0)}: {text}", 0)

    def _lost(self, index: int, how: str) -> None:
        """Ends the run because a worker is gone, if there is one that it takes part in."""
        if self.running and not self.trained:
            self._gone(index, how)

    def _gone(self, index: int, how: str) -> None:
        self._decide(*_gone(self.cluster, index, how))

    def on_signal(self, number: signal.Signals) -> None:
        super().on_signal(number)
        if self.verdict is not None:
            self.finish(*self.own_end(self.verdict))

    def _decide(self, code: int, text: str, about: int | None = None) -> None:
        """Tells all workers how the run ends."""
        if self.verdict is not None:
            return
        self.verdict = Verdict(code, text, about)
        self.reached(*list(self.deadlines))
        self.child.kill(Outcome(code, text, "unclear"))
        for peer in self.peers.values():
            send(peer.writer, verdict=self.verdict)
        self.told |= set(self.peers)
        self.spawn(self._leave())

    async def _leave(self) -> None:
        """Ends when the others have left, or the time for that is over."""
        seconds = LEAVE
        if self.signals:
            seconds = BEAT
        elif self.told != set(self.others):
            # Workers that were lost at the very end may come back, those of a run that cannot
            # begin may be on their way: they are told, instead of waiting for one that has left.
            done = self.verdict.code == 0
            seconds = self.startup_timeout if done else 0 if self.running else TELL
            if done:
                self._say_whom_it_waits_for(seconds)
                if self.running:  # Else it is open still.
                    await self._open()
        until = self.loop.time() + seconds
        while (self.peers or self.told != set(self.others)) and self.loop.time() < until:
            await asyncio.sleep(BEAT / 10)
        self.finish(*self.own_end(self.verdict))

    def _say_whom_it_waits_for(self, seconds: float) -> None:
        lost = [self.cluster.name(index) for index in self.others if index not in self.told]
        print(
            f"The model is saved. Waiting up to {seconds:g} s to tell {', '.join(lost)}, lost at "
            "the very end; Ctrl-C ends that.",
            file=sys.stderr,
            flush=True,
        )


class _Other(Parent):
    """The parent of a worker that is not the chief."""

    chief: asyncio.StreamWriter | None = None
    going = False
    busy = ""

    async def meet(self) -> None:
        self.limit("meeting", self.startup_timeout, self._absent)
        (await listener(self.cluster.workers[self.cluster.index])).close()  # It is free.
        while True:
            reader, self.chief = await self._join()
            how = await self._listen(reader)
            self.chief.close()
            self.chief = None
            if self.going or self.child.outcome:
                self._end(_gone(self.cluster, 0, how))

    async def _join(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Calls worker 0 until its parent lets this one join."""
        hello = {"hello": self.cluster.index, "workers": self.cluster.workers}
        while True:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(SILENCE / 2):
                    reader, writer = await connect(self.cluster.workers[0])
                    send(writer, **hello)
                    answer = await receive(reader) or {}
                if "welcome" in answer:
                    self._introduce(writer)
                    return reader, writer
                if "verdict" in answer:
                    self._end(Verdict(*answer["verdict"]))
                self.busy = answer.get("busy", self.busy)
                writer.close()
            await asyncio.sleep(BEAT / 2)

    def _introduce(self, writer: asyncio.StreamWriter) -> None:
        if self.child.outcome:
            send(writer, ended=self.child.outcome)
            if self.child.outcome.code:
                self._end(Verdict(*self.child.outcome[:2], self.cluster.index))
        elif self.facts is not None:
            send(writer, ready=self.facts)
        self.spawn(self.beat(writer))

    async def _listen(self, reader: asyncio.StreamReader) -> str:
        """Does what worker 0's parent says; returns how the connection ended."""
        try:
            while True:
                async with asyncio.timeout(SILENCE):
                    message = await receive(reader)
                if message is None:
                    return "its connection closed"
                if "go" in message:
                    self.going = True
                    self.go()
                elif "verdict" in message:
                    self._end(Verdict(*message["verdict"]))
        except TimeoutError:
            return f"no sign of life for {SILENCE:g} s"

    def on_ready(self) -> None:
        self._say(ready=self.facts)

    def on_outcome(self, outcome: Outcome) -> None:
        code, text, kind = outcome
        self._say(ended=outcome)
        own = Verdict(code, text, self.cluster.index)
        if kind == "lost":
            self._end(own)
        elif self.chief is None:
            self.limit("telling", TELL, lambda: self._end(own))
        elif code:  # Until worker 0 has decided; where all stop, that is when it has saved.
            wait = NEWS + BEAT if kind == "unclear" else STOP
            self.limit("telling", wait, lambda: self._end(own))

    def _absent(self) -> None:
        if self.chief is not None:  # Its parent waits for others, and says for whom.
            return
        code, text = _missing([self.cluster.name(0)], self.startup_timeout)
        self._end(Verdict(code, f"{text} Worker 0 answered: {self.busy}." if self.busy else text))

    def _say(self, **message: object) -> None:
        if self.chief is not None:
            send(self.chief, **message)

    def _end(self, verdict: Verdict) -> None:
        self.finish(*self.own_end(verdict))


def _gone(cluster: Cluster, index: int, how: str) -> Verdict:
    return Verdict(STOPPED, f"{cluster.name(index)} was lost: {how}. {STANDS}", index)


def _missing(workers: Sequence[str], seconds: float) -> tuple[int, str]:
    return STOPPED, (
        f"{', '.join(workers)} did not come within {seconds:g} s. Start the same command there "
        "too; --startup-timeout waits longer."
    )
