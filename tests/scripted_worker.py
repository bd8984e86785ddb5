"""A worker whose parent is real and whose worker process does what a test tells it to, instead of
training; ``test_supervisor`` is its test.

    python scripted_worker.py --config JSON      # the parent
    python scripted_worker.py FIFO JSON          # its worker process

The worker process reads its commands from a FIFO, and answers each on stdout when it is done. The
parent writes a log: of each message that it receives and, later, has handled, and of each deadline
that it sets. Deadlines are not a matter of time: one is over when the test creates its file.
"""

import asyncio
import contextlib
import json
import os
import resource
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from trainer import cli, errors
from trainer.distributed import parent, supervisor
from trainer.distributed.authentication import read_secret
from trainer.distributed.chief import Chief
from trainer.distributed.cluster import Cluster
from trainer.distributed.messages import Connection
from trainer.distributed.worker import Link, PeerError
from trainer.signals import Signals

RAISES = {
    "data": lambda: errors.DataError("the data is damaged."),
    "disk": lambda: errors.OutputError("the disk is full."),
    "memory": lambda: errors.ConfigurationError("the device has too little memory."),
    "peer": lambda: PeerError("InternalError: no kernel image"),
    "defect": lambda: AssertionError("a defect"),
    "far": lambda: AssertionError("\N{SNOWMAN}" * 30_000),
}


@dataclass
class Config:
    config: str


def run_parent(config: Config) -> None:
    options = json.loads(config.config)
    folder = Path(options["folder"])

    def log(*entry):
        with (folder / "log").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    log_messages(log)
    replace_deadlines(folder, log)
    supervisor.run(
        [sys.executable, __file__, folder / "commands", json.dumps(options["settings"])],
        Cluster(tuple(options["workers"]), options["index"], read_secret(os.environ)),
        startup_timeout=30,
        step_timeout=options["step_timeout"],
    )


def log_messages(log):
    receive = Connection.receive
    last = {}

    async def logged(self):
        if self in last:
            log("handled", last.pop(self))
        message = await receive(self)
        if message is not None:
            log("received", message)
            last[self] = message
        return message

    Connection.receive = logged

    join = Chief._join

    def logged_join(self, index, connection):
        peer = join(self, index, connection)
        log("joined", index)
        return peer

    Chief._join = logged_join


def replace_deadlines(folder, log):
    async def call_when_told(name, then):
        while not (folder / name).exists():
            await asyncio.sleep(0.01)
        (folder / name).unlink()  # It may be set again.
        then()

    def set_deadline(self, name, seconds, then):
        if name not in self.deadlines:
            self.deadlines[name] = self.loop.create_task(call_when_told(name, then))
            log("deadline", name, seconds)

    parent.Parent.set_deadline = set_deadline


def follow_commands(fifo, settings):
    link = Link.find(os.environ)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def answer(text):
        print(text, flush=True)

    def train():
        with Signals() as signals, Path(fifo).open() as commands:
            answer(f"started {os.getpid()}")
            for line in commands:
                match line.split():
                    case ["meet"]:
                        meet(link, settings)
                        signals.defer()
                    case ["tell", event]:
                        link.tell(event)
                    case ["step", epoch, step]:
                        link.report_step(int(epoch), int(step))
                    case ["stop"]:
                        raise errors.StoppedError(f"stopped by {signals.received}. Saved.")
                    case ["raise", name]:
                        raise RAISES[name]()
                    case ["abort"]:
                        os.abort()
                    case ["babble"]:
                        link.connection.sendall(b"[1, 2]\n")
                    case ["hush"]:
                        link.connection.shutdown(socket.SHUT_WR)
                    case ["exit"]:
                        os._exit(3)
                    case ["end"]:
                        return
                answer(line.strip())

    link.run(train)


def meet(link, settings):
    try:
        link.meet(settings)
    except KeyboardInterrupt as interrupt:
        if str(interrupt) == "SIGTERM":
            raise errors.StoppedError("stopped by SIGTERM.") from None
        raise


if __name__ == "__main__":
    if sys.argv[1] == "--config":
        sys.exit(cli.run("task", Config, run_parent))
    with contextlib.suppress(BrokenPipeError):
        follow_commands(sys.argv[1], json.loads(sys.argv[2]))
