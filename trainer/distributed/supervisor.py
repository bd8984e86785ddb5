"""How the parent processes of a run's workers agree on who is alive, and on how the run ends. They
do not load TensorFlow.

    run([sys.executable, "-m", "trainer.task", *flags], cluster, startup_timeout=300)

The process that trains is a child (``worker`` explains why); its parent (``parent``) is responsible
for what must never block: signals, deadlines, and the exit code.

The parents connect to worker 0's first, and compare the settings of their workers. Then TensorFlow
takes over the port of worker 0's address; the connections of the parents last as long as the run.
Through them every parent knows which workers are alive, and worker 0's (``chief``) decides for all
how the run ends. ``messages`` lists what they send, ``authentication`` how they know one another. A
caller that is no worker of the run is turned away, and changes nothing.

A run ends with exit code 75, which a scheduler need not count as a failure, only where a parent has
seen a worker lost: its connection closed, its heartbeats stopped, its process died or hung, or it
never joined. An error that a worker raises while all are alive ends the run with that error's code.

Worker 0 exits last. The loss of another worker after worker 0 has trained does not fail the run; if
that worker is restarted, it is told that the run is finished.
"""

import asyncio
import sys
from collections.abc import Callable, Sequence

from trainer import errors
from trainer.cli import INTERRUPTED
from trainer.distributed.chief import Chief
from trainer.distributed.cluster import Cluster
from trainer.distributed.messages import (
    Connection,
    Outcome,
    SecretError,
    Verdict,
    call,
    listen_when_free,
)
from trainer.distributed.parent import (
    HEARTBEAT_INTERVAL,
    HEARTBEAT_TIMEOUT,
    LOSS_TIMEOUT,
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
        notify: Called with what there is to tell beside the error: its traceback, for whom this
            worker waits, and what the lack of a secret means.

    Raises:
        StoppedError: A peer was lost or did not join, the run hung, or a signal stopped it.
        TrainerError: The error of this worker, or of the first one that had any.
        KeyboardInterrupt: A second signal was received, or one before the run had begun.
    """
    parent = Chief if cluster.is_chief else _Other
    if cluster.secret.notice and (cluster.is_chief or cluster.secret.key):
        notify(cluster.secret.notice)

    async def supervise() -> End:
        return await parent(command, cluster, startup_timeout, step_timeout, notify).run()

    code, text, details = asyncio.run(supervise())
    if details:
        notify(details)
    if code == INTERRUPTED:
        raise KeyboardInterrupt(text)
    if code:
        raise errors.from_exit_code(code, text)


class _Other(Parent):
    """The parent of any other worker."""

    chief: Connection | None = None
    going = False
    reason = "no answer"  # why worker 0 has not let this one join
    busy = ""

    async def meet(self) -> None:
        self.set_deadline("meeting", self.startup_timeout, self._absent)
        self.announce_waiting()
        (await listen_when_free(self.cluster.workers[self.cluster.index])).close()
        while True:
            self.chief = await self._join()
            how = await self._follow(self.chief)
            self.chief.close()
            self.chief = None
            if self.going or self.worker.outcome:
                self._end(loss(self.cluster, 0, how))

    async def _join(self) -> Connection:
        """Connects to worker 0's parent until that lets this worker join."""
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_TIMEOUT / 2):
                    if connection := await self._call():
                        return connection
            except SecretError as error:
                self._disagree(str(error))
            except OSError as error:  # TimeoutError is one.
                self.reason = unreachable(error)
            await asyncio.sleep(HEARTBEAT_INTERVAL / 2)

    async def _call(self) -> Connection | None:
        """Returns the connection to worker 0's parent; None: it has answered otherwise."""
        index, workers = self.cluster.index, self.cluster.workers
        connection = await call(
            workers[0], index=index, workers=workers, secret=self.cluster.secret
        )
        try:
            answer = await connection.receive() or {}
            if "welcome" in answer:
                self.cancel_deadlines("agreeing")
                self._report_state(connection)
                return connection
            if "verdict" in answer:
                self._end(answer["verdict"])
            self.busy = answer.get("busy", self.busy)
            self.reason = self.busy or "it closed the connection"
        except BaseException:
            connection.close()
            raise
        connection.close()
        return None

    def _disagree(self, theirs: str) -> None:
        """Ends this worker if nobody who knows its secret answers at worker 0's address: soon, but
        not at the first answer, which may be that of a program that is just ending.
        """
        own = "one" if self.cluster.secret.key else "none"
        self.reason = f"it has {theirs}, or something else answers there"
        text = secret_mismatch(f"{own} here, and {theirs} at {self.cluster.name(0)}")
        verdict = Verdict(ConfigurationError.exit_code, text)
        self.set_deadline("agreeing", TELL_TIMEOUT, lambda: self._end(verdict))

    def _report_state(self, connection: Connection) -> None:
        """Sends what this worker has reached: its settings, or how its process ended."""
        if self.worker.outcome:
            connection.send(ended=self.worker.outcome)
            if self.worker.outcome.code:
                self._end(Verdict(*self.worker.outcome[:2], self.cluster.index))
        elif self.settings is not None:
            connection.send(ready=self.settings)
        self.spawn(self.send_heartbeats(connection))

    async def _follow(self, connection: Connection) -> str:
        """Follows worker 0's parent; returns how the connection ended."""
        try:
            while True:
                async with asyncio.timeout(HEARTBEAT_TIMEOUT):
                    message = await connection.receive()
                if message is None:
                    return "its connection closed"
                if "go" in message:
                    self.going = True
                    self.go()
                elif "verdict" in message:
                    self._end(message["verdict"])
                elif "waiting" in message:
                    self.notify(message["waiting"])
        except TimeoutError:
            return f"no heartbeat for {HEARTBEAT_TIMEOUT:g} s"

    async def waits_for(self) -> str:
        if self.chief is not None:  # Worker 0 tells.
            return ""
        return f"Waiting for {self.cluster.name(0)}: {self.reason}."

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
        code, text = missing([self.cluster.name(0)], self.startup_timeout)
        self._end(Verdict(code, f"{text} Worker 0 answered: {self.busy}." if self.busy else text))

    def _say(self, **message: object) -> None:
        if self.chief is not None:
            self.chief.send(**message)

    def _end(self, verdict: Verdict) -> None:
        self.finish(*self.own_end(verdict))
