"""Puts the hooks of a test into the processes that it starts; ``support.Pause`` describes them.

Python runs this file at its start wherever its folder is in PYTHONPATH, and so in the processes
that a run starts for itself too.
"""

import contextlib
import functools
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path


def install(hook):
    """Has a hook take effect as soon as the module that it concerns is there."""
    module, _, name = (hook["calling"] or hook["importing"] or hook["constant"] or "").partition(
        ":"
    )
    if hook["worker"] is not None and hook["worker"] != worker():
        return
    if hook["after_step"]:
        patch("trainer.training.loop", after=lambda loop: pause_after_step(loop, hook))
    elif hook["importing"]:
        patch(module, before=lambda: pause(hook))
    elif hook["calling"]:
        patch(module, after=lambda found: pause_at_call(found, name, hook))
    else:
        patch(module, after=lambda found: setattr(found, name, hook["value"]))


def worker():
    return json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {}).get("index", 0)


def patch(name, *, before=lambda: None, after=lambda module: None):
    """Calls functions before and after a module is executed."""
    if name in sys.modules:
        after(sys.modules[name])
    else:
        sys.meta_path.insert(0, Patch(name, before, after))


class Patch(importlib.abc.MetaPathFinder):
    def __init__(self, name, before, after):
        self.name, self.before, self.after = name, before, after

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            self.before()
            execute(module)
            self.after(module)

        spec.loader.exec_module = exec_module
        return spec


def pause_after_step(loop, hook):
    """Pauses once, when a call of the compiled step has ended at the position or behind it."""
    train = loop.train
    reached = []

    @functools.wraps(train)
    def paused(*arguments, after_call=lambda position: None, **options):
        def after(position):
            after_call(position)
            if not reached and [position.epoch + 1, position.step] >= hook["after_step"]:
                reached.append(position)
                pause(hook)

        return train(*arguments, after_call=after, **options)

    loop.train = paused


def pause_at_call(module, name, hook):
    """Pauses before the call of this number of a function."""
    *path, last = name.split(".")
    owner = functools.reduce(getattr, path, module)
    function = getattr(owner, last)
    calls = []

    @functools.wraps(function)
    def paused(*arguments, **options):
        calls.append(1)
        if len(calls) == hook["call"]:
            pause(hook)
        return function(*arguments, **options)

    setattr(owner, last, paused)


def pause(hook):
    """Says that the point is reached, and each signal that comes then; goes on when it is told to,
    or ends with the error of the hook.
    """
    folder = Path(hook["folder"])
    folder.mkdir(exist_ok=True)

    def say(text):
        with (folder / "log").open("a") as log:
            log.write(f"{text}\n")

    with told_of_signals(say):
        say("reached")
        while not (folder / "go").exists():
            time.sleep(0.005)
    if hook["error"]:
        raise eval(hook["error"], {"tf": sys.modules.get("tensorflow")})  # noqa: S307


@contextlib.contextmanager
def told_of_signals(say):
    """Calls ``say`` with the name of each signal before its handler."""
    handlers = {}

    def receive(number, frame):
        say(signal.Signals(number).name)
        if callable(handlers[number]):
            handlers[number](number, frame)
        elif handlers[number] == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handlers[number] = signal.getsignal(number)
        for number in handlers:
            signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


for hook in json.loads(os.environ.get("TEST_HOOKS", "[]")):
    install(hook)
