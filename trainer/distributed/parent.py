"""The parent process of a worker: it runs the worker process, which trains, forwards signals to it,
and enforces deadlines.

``trainer.distributed.supervisor`` adds how the parents of a run agree on its end.
"""

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from types import FrameType
from typing import NamedTuple, cast

from trainer.cli import INTERRUPTED
from trainer.distributed.authentication import TOKEN_FILE
from trainer.distributed.cluster import Cluster
from trainer.distributed.messages import Connection, Outcome, Verdict
from trainer.distributed.worker import WorkerProcess
from trainer.errors import StoppedError
from trainer.signals import stop_signals

HEARTBEAT_INTERVAL = 1.0  # Seconds.
HEARTBEAT_TIMEOUT = 10.0  # Seconds without a heartbeat after which a peer is lost.
FREEZE_TIMEOUT = 5.0  # Seconds that the worker process may be stopped (SIGSTOP).
STOP_TIMEOUT = 7.0  # Seconds from a signal to the end of the step and of its checkpoint.

LOSS_TIMEOUT = 12.0  # Seconds from an error until the lost peer that caused it is noticed, at most.
LEAVE_TIMEOUT = 5.0  # Seconds within which the others exit after the verdict.
TELL_TIMEOUT = 10.0  # Seconds within which workers that join late receive the verdict.
WAITING_NOTICE = 10.0  # Seconds of waiting for peers before the user is told; then twice that, ...

STOPPED = StoppedError.exit_code

RESUME_HINT = "The same command, on all workers, resumes from the last checkpoint, if there is one."


def step_deadline(step_timeout: float | None, longest_step: float | None) -> float:
    """Returns the seconds within which a worker process must report progress.

    Args:
        step_timeout: What the user allows; None: 20 times the longest interval between two reports,
            but at least 300 s.
        longest_step: Seconds of that interval so far; None: nothing has been reported yet. The
            first step, which compiles, has at least 1,200 s in any case.

    >>> step_deadline(None, None), step_deadline(None, 1.5), step_deadline(None, 60.0)
    (1200.0, 300.0, 1200.0)
    >>> step_deadline(10, None), step_deadline(10, 60.0), step_deadline(1800, None)
    (1200.0, 10, 1800)
    """
    if longest_step is None:
        return max(1200.0, step_timeout or 0)
    return step_timeout or max(300.0, 20 * longest_step)


class End(NamedTuple):
    """How one worker ends.

    Attributes:
        code: Exit code.
        text: Why.
        details: The traceback of an error of its own, where that ends the run.
    """

    code: int
    text: str
    details: str = ""


class Parent:
    """Base class of the parents of worker 0 and of the other workers.

    The first call of ``finish`` decides how the worker ends.

    Args:
        command: The worker process.
        cluster: All workers, and which this one is.
        startup_timeout: Seconds that the workers wait for one another.
        step_timeout: Seconds without progress after which the run ends; None: the default of
            ``step_deadline``.
        notify: Called with a sentence for the user.
    """

    def __init__(
        self,
        command: Sequence[str],
        cluster: Cluster,
        startup_timeout: float,
        step_timeout: float | None,
        notify: Callable[[str], None],
    ) -> None:
        self.cluster = cluster
        self.notify = notify
        self.startup_timeout = startup_timeout
        self.step_timeout = step_timeout
        self.worker = WorkerProcess(command)
        self.settings: dict | None = None  # what must be equal on all workers
        self.trained = False
        self.details = ""  # the traceback of an error in the worker process
        self.signals: list[str] = []
        self.deadlines: dict[str, asyncio.TimerHandle] = {}
        self.tasks: set[asyncio.Task] = set()
        self.loop = asyncio.get_running_loop()
        self.end: asyncio.Future[End] = self.loop.create_future()

    async def run(self) -> End:
        """Returns how this worker ends, when it does."""
        # Not the loop's add_signal_handler, at whose end a signal has its default action again.
        numbers = stop_signals()
        for number in numbers:
            signal.signal(number, self._receive)
        await self.worker.connect()
        try:
            for part in (self._follow_worker(), self._watch(), self.meet()):
                self.spawn(part)
            return await self.end
        finally:
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
            self.worker.close()
            for number in numbers:  # How this worker ends is decided.
                signal.signal(number, signal.SIG_IGN)

    # What differs between worker 0 and the others.

    async def meet(self) -> None:
        """Connects to the other parents, and keeps the connections."""
        raise NotImplementedError

    def on_ready(self) -> None:
        """Is called when the worker process has reported its settings."""
        raise NotImplementedError

    def on_outcome(self, outcome: Outcome) -> None:
        """Is called when the worker process has ended."""
        raise NotImplementedError

    def on_hang(self, text: str) -> None:
        """Is called when the worker process has not reported progress in time."""
        raise NotImplementedError

    async def waits_for(self) -> str:
        """Returns for which workers this one waits, and why, in a sentence; it may be empty."""
        raise NotImplementedError

    # What they have in common.

    def announce_waiting(self, times: int = 1) -> None:
        """Tells the user for whom this worker waits: first after WAITING_NOTICE, then later."""

        async def announce() -> None:
            if text := await self.waits_for():
                self.notify(text)

        def then() -> None:
            self.cancel_deadlines("waiting")
            self.spawn(announce())
            self.announce_waiting(2 * times)

        self.set_deadline("waiting", times * WAITING_NOTICE, then)

    def give_up(self, text: str) -> None:
        """Kills the worker process, and so ends the run, which can be resumed."""
        if self.worker.outcome is None:
            self.worker.kill(Outcome(STOPPED, text, "lost"))

    def own_end(self, verdict: Verdict) -> End:
        """Returns how this worker ends when the run ends with the verdict: with the outcome of its
        own process, unless the verdict explains that.
        """
        code, text, kind = self.worker.outcome or (0, "", "named")
        consequence = kind in ("crashed", "unclear") and verdict.about != self.cluster.index
        if code == 0 or consequence:
            return End(verdict.code, verdict.text)
        if kind == "named":
            return End(code, text)
        return End(code, f"{text}. {RESUME_HINT}", self.details)

    def finish(self, code: int, text: str, details: str = "") -> None:
        """Ends this worker, unless it is ending already."""
        if not self.end.done():
            self.end.set_result(End(code, text, details))

    def spawn(self, part: Coroutine) -> None:
        """Runs a coroutine concurrently; an exception in it ends the worker."""

        def done(task: asyncio.Task) -> None:
            self.tasks.discard(task)
            if task.cancelled():
                return
            if (error := task.exception()) and not self.end.done():
                self.end.set_exception(error)

        task = self.loop.create_task(part)
        self.tasks.add(task)
        task.add_done_callback(done)

    def set_deadline(self, name: str, seconds: float, then: Callable[[], None]) -> None:
        """Calls ``then`` after some seconds, unless ``cancel_deadlines`` is called before; a
        deadline of this name that is already set stays as it is.
        """
        if name not in self.deadlines:
            self.deadlines[name] = self.loop.call_later(seconds, then)

    def cancel_deadlines(self, *names: str) -> None:
        """Cancels deadlines."""
        for name in names:
            if name in self.deadlines:
                self.deadlines.pop(name).cancel()

    def go(self) -> None:
        """Lets the worker process connect to the others, which have all joined."""
        self.cancel_deadlines("meeting", "waiting")
        self.worker.go()
        self.set_deadline(
            "connecting",
            self.startup_timeout,
            lambda: self.give_up(
                f"all workers joined, but could not connect to one another within "
                f"{self.startup_timeout:g} s. Every one of these addresses must be reachable from "
                f"every machine: {', '.join(self.cluster.workers)}"
            ),
        )

    async def _follow_worker(self) -> None:
        longest_step = last_report = None
        async for message in self.worker.messages():
            if "ready" in message:
                self.settings = message["ready"]
                self.on_ready()
            elif "connected" in message or "training" in message:
                self.cancel_deadlines("connecting", "step")
                longest_step = last_report = None
                start = "all workers connected" if "connected" in message else "training began"
                self._limit_step(step_deadline(self.step_timeout, None), start)
            elif "idle" in message:
                self.cancel_deadlines("step")
            elif "step" in message:
                now = self.loop.time()
                longest_step = max(longest_step or 0.0, now - (last_report or now))
                last_report = now
                epoch, step = message["step"]
                self.cancel_deadlines("step")
                self._limit_step(
                    step_deadline(self.step_timeout, longest_step), f"epoch {epoch}, step {step}"
                )
            elif "traceback" in message:
                self.details = message["traceback"]
            elif "trained" in message:
                self.trained = True
                self.cancel_deadlines("step")
        self.cancel_deadlines("connecting", "step", "stopping")
        self.on_outcome(cast("Outcome", self.worker.outcome))  # Set when the messages end.

    def _limit_step(self, seconds: float, last: str) -> None:
        text = f"no step ended for {seconds:g} s after {last} (step_timeout). {RESUME_HINT}"
        self.set_deadline("step", seconds, lambda: self.on_hang(text))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.loop.call_soon_threadsafe(self.on_signal, signal.Signals(number))

    def on_signal(self, number: signal.Signals) -> None:
        """Forwards a signal to the worker process, which stops after the step on which all workers
        agree; a second signal ends this worker at once.
        """
        self.signals.append(number.name)
        if len(self.signals) > 1:
            self.finish(
                INTERRUPTED if number == signal.SIGINT else STOPPED,
                f"stopped by a second {number.name}. Earlier checkpoints are intact.",
            )
            return
        self.worker.signal(number)
        self.set_deadline(
            "stopping",
            STOP_TIMEOUT,
            lambda: self.give_up(f"stopped by {number.name} while it waited for another worker"),
        )

    async def _watch(self) -> None:
        """Notices when the worker process, or this process, has been stopped (SIGSTOP)."""
        stopped = 0.0
        while True:
            start = time.monotonic()
            await asyncio.sleep(HEARTBEAT_INTERVAL)
            seconds = time.monotonic() - start
            if seconds > HEARTBEAT_TIMEOUT:
                self.give_up(f"it was suspended for {seconds:.0f} s, longer than the others wait")
            stopped = stopped + seconds if self.worker.is_stopped() else 0.0
            if stopped > FREEZE_TIMEOUT:
                self.give_up("its process was stopped (SIGSTOP)")

    async def send_heartbeats(self, connection: Connection) -> None:
        """Sends heartbeats for as long as a connection lasts."""
        while not connection.is_closing():
            connection.send(heartbeat=1)
            await asyncio.sleep(HEARTBEAT_INTERVAL)


def loss(cluster: Cluster, index: int, how: str) -> Verdict:
    """Returns how a run ends when a worker is lost."""
    return Verdict(STOPPED, f"{cluster.name(index)} was lost: {how}. {RESUME_HINT}", index)


def missing(workers: Sequence[str], seconds: float) -> tuple[int, str]:
    """Returns how a run ends when workers have not come: the exit code, and why."""
    return STOPPED, (
        f"{', '.join(workers)} did not join within {seconds:g} s. Start the same command there "
        "too, or use a longer startup_timeout."
    )


def secret_mismatch(received: str) -> str:
    """Returns the error of workers that do not share a secret."""
    return (
        f"Expected the same secret on all workers, or none. Received: {received}. Let {TOKEN_FILE} "
        "name a file with the same content on every worker."
    )


def unreachable(error: OSError) -> str:
    """Returns in a few words why an address cannot be reached."""
    match error:
        case socket.gaierror():
            return f"its name cannot be resolved ({error.strerror})"
        case ConnectionRefusedError():
            return "connection refused"
        case TimeoutError():
            return "no answer"
    return (error.strerror or str(error)).lower()
