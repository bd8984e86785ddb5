"""What the parent process of every worker has: a child that trains, signals, and deadlines.

``trainer.distributed.supervisor`` adds how the parents of a run agree on its end.
"""

import asyncio
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import NamedTuple

from trainer.cli import INTERRUPTED
from trainer.distributed.cluster import Cluster
from trainer.distributed.messages import send
from trainer.distributed.worker import Child, Outcome
from trainer.errors import StoppedError

BEAT = 1.0  # Seconds between two signs of life.
SILENCE = 10.0  # Seconds without one, after which a peer is lost.
FROZEN = 5.0  # Seconds that the process which trains may be stopped (SIGSTOP).
STOP = 7.0  # Seconds that it has for its last step and checkpoint: one that waits for a peer ends.

STOPPED = StoppedError.exit_code

STANDS = "The last checkpoint stands: the same command, on all workers, goes on from there."


class Verdict(NamedTuple):
    """How a run ends.

    Attributes:
        code: Exit code.
        text: Why.
        about: The worker that is the reason; None: all of them, or none.
    """

    code: int
    text: str
    about: int | None = None


class Parent:
    """What the parents of the chief and of the others share.

    Whoever calls ``finish`` first decides how it ends.
    """

    def __init__(self, command: Sequence[str], cluster: Cluster, startup_timeout: float) -> None:
        self.cluster = cluster
        self.startup_timeout = startup_timeout
        self.child = Child(command)
        self.facts: dict | None = None  # what the child is about to train
        self.trained = False
        self.signals: list[str] = []
        self.deadlines: dict[str, asyncio.TimerHandle] = {}
        self.tasks: set[asyncio.Task] = set()
        self.loop = asyncio.get_running_loop()
        self.end: asyncio.Future[tuple[int, str]] = self.loop.create_future()

    async def run(self) -> tuple[int, str]:
        """Returns the exit code of this worker, and the sentence that explains it."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self.loop.add_signal_handler(number, self.on_signal, number)
        await self.child.connect()
        try:
            for part in (self._follow_child(), self._watch(), self.meet()):
                self.spawn(part)
            return await self.end
        finally:
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
            self.child.close()

    # What the chief and the others do differently.

    async def meet(self) -> None:
        """Meets the others, and stays in touch with them."""
        raise NotImplementedError

    def on_ready(self) -> None:
        """Is called when the child has said what it is about to train."""
        raise NotImplementedError

    def on_outcome(self, outcome: Outcome) -> None:
        """Is called when the child has ended."""
        raise NotImplementedError

    # What they share.

    def give_up(self, text: str) -> None:
        """Ends the child, and so the run; it can be resumed."""
        if self.child.outcome is None:
            self.child.kill(Outcome(STOPPED, text, "lost"))

    def own_end(self, verdict: Verdict) -> tuple[int, str]:
        """Returns how this worker ends when the run ends so: by what its child says of itself,
        unless the loss of another worker explains that.
        """
        code, text, kind = self.child.outcome or (0, "", "named")
        if code == 0 or (kind == "unclear" and verdict.about != self.cluster.index):
            return verdict.code, verdict.text
        return code, text if kind == "named" else f"{text}. {STANDS}"

    def finish(self, code: int, text: str) -> None:
        """Ends this worker, unless it is ending already."""
        if not self.end.done():
            self.end.set_result((code, text))

    def spawn(self, part: Coroutine) -> None:
        """Runs a part of the work beside the others; a defect in it ends the worker."""

        def done(task: asyncio.Task) -> None:
            self.tasks.discard(task)
            if not task.cancelled() and task.exception() and not self.end.done():
                self.end.set_exception(task.exception())

        task = self.loop.create_task(part)
        self.tasks.add(task)
        task.add_done_callback(done)

    def limit(self, name: str, seconds: float, then: Callable[[], None]) -> None:
        """Calls a function when the time is over, unless ``reached`` is called before."""
        if name not in self.deadlines:
            self.deadlines[name] = self.loop.call_later(seconds, then)

    def reached(self, *names: str) -> None:
        """Drops deadlines."""
        for name in names:
            if name in self.deadlines:
                self.deadlines.pop(name).cancel()

    def go(self) -> None:
        """Lets the child connect to the others, who have all come."""
        self.reached("meeting")
        self.child.go()
        self.limit(
            "connecting",
            self.startup_timeout,
            lambda: self.give_up(
                f"all workers came, but did not reach one another within "
                f"{self.startup_timeout:g} s. Every one of these addresses must be reachable from "
                f"every machine: {', '.join(self.cluster.workers)}"
            ),
        )

    async def _follow_child(self) -> None:
        async for message in self.child.messages():
            if "ready" in message:
                self.facts = message["ready"]
                self.on_ready()
            elif "connected" in message:
                self.reached("connecting")
            elif "trained" in message:
                self.trained = True
        self.reached("connecting", "stopping")
        self.on_outcome(self.child.outcome)

    def on_signal(self, number: signal.Signals) -> None:
        """Passes it to the child, which stops where all agree to; a second one ends at once."""
        self.signals.append(number.name)
        if len(self.signals) > 1:
            self.finish(
                INTERRUPTED if number == signal.SIGINT else STOPPED,
                f"stopped by a second {number.name}. The last checkpoint stands.",
            )
            return
        self.child.signal(number)
        self.limit(
            "stopping",
            STOP,
            lambda: self.give_up(f"stopped by {number.name} while it waited for another worker"),
        )

    async def _watch(self) -> None:
        """Looks once a second whether the child is stopped, and whether this process was."""
        stopped = 0.0
        while True:
            start = time.monotonic()
            await asyncio.sleep(BEAT)
            seconds = time.monotonic() - start
            if seconds > SILENCE:
                self.give_up(f"it stood still for {seconds:.0f} s, longer than the others wait")
            stopped = stopped + seconds if self.child.is_stopped() else 0.0
            if stopped > FROZEN:
                self.give_up("its process was stopped (SIGSTOP)")

    async def beat(self, writer: asyncio.StreamWriter) -> None:
        """Gives signs of life for as long as a connection lasts."""
        while not writer.is_closing():
            send(writer, beat=1)
            await asyncio.sleep(BEAT)
