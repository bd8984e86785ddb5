"""The command python -m trainer.submit as a user runs it, and what it writes meanwhile."""

import os
import subprocess
import sys
import threading
import time

from namespaces import ROOT


class Submit:
    """The command in a folder; ``lines`` are those it has written so far."""

    def __init__(self, namespace, folder, *flags, kubeconfig=None):
        self.lines = []
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        if kubeconfig:
            environ["KUBECONFIG"] = str(kubeconfig)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "trainer.submit", "--namespace", namespace.name),
                *map(str, flags),
            ],
            cwd=folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        with self.process.stdout as stream:
            for line in stream:
                self.lines.append(line.rstrip("\n"))

    def until(self, *parts, seconds=120):
        """Waits until one line contains all the parts; returns it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in list(self.lines):
                if all(part in line for part in parts):
                    return line
            assert self.process.poll() is None, self.text
            time.sleep(0.1)
        raise AssertionError(self.text)

    def end(self, *, seconds=300):
        code = self.process.wait(seconds)
        self.reader.join()
        return code

    @property
    def text(self):
        return "\n".join(self.lines)
