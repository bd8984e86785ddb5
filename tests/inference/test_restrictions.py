"""What a process that reads a stranger's file can still do: compute, and answer its parent."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from support import ROOT, TIMEOUT

from trainer.errors import DataError
from trainer.inference import decoders, model_file, restrictions, sandbox

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has none of them.")

# Applies layers, tries what code in a picture might, and prints what happened.
PROGRAM = """
import json, os, socket, sys, threading
from trainer.inference import restrictions

listener = socket.create_server(("127.0.0.1", 0))
connected = socket.socket()

def start(code):
    if not (child := os.fork()):
        try:
            os.execv(sys.executable, [sys.executable, "-c", code])
        finally:
            os._exit(9)
    assert not os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def compute():
    thread = threading.Thread(target=lambda: answer.append(sum(range(9))))
    answer = []
    thread.start()
    thread.join()
    return len(bytes(50_000_000)) and answer[0]

attempts = {
    "read": lambda: open(sys.argv[1]).read(),
    "create": lambda: open(sys.argv[1] + ".new", "w").close(),
    "list": lambda: os.listdir("."),
    "remove": lambda: os.remove(sys.argv[1]),
    "connect": lambda: connected.connect(listener.getsockname()),
    "socket": lambda: socket.socket(),
    "signal": lambda: os.kill(os.getppid(), 0),
    "program": lambda: start("pass"),
    "compute": compute,
}
applied = {name: getattr(restrictions, name)() for name in sys.argv[2:]}
seen = {}
for name, attempt in attempts.items():
    try:
        attempt()
        seen[name] = "done"
    except (OSError, AssertionError) as error:
        seen[name] = type(error).__name__
print(json.dumps([applied, seen]))
"""

# What each layer refuses by itself.
REFUSED = {
    # A program cannot open its libraries.
    "limits": {"read", "create", "list", "socket", "program"},
    "landlock": {"read", "create", "list", "remove", "connect", "signal", "program"},
    "seccomp": {"read", "create", "list", "remove", "connect", "socket", "signal", "program"},
}
LEAST_ABI = {"connect": 4, "signal": 6}  # Of Landlock.


def tried(folder: Path, *layers: str) -> tuple[dict[str, bool], dict[str, str]]:
    (folder / "secret").write_text("secret")
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, folder / "secret", *layers],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
    )
    applied, seen = json.loads(done.stdout)
    return applied, seen


def test_without_restrictions_all_of_it_can_be_done(tmp_path):
    assert set(tried(tmp_path)[1].values()) == {"done"}


@pytest.mark.parametrize("layer", REFUSED)
def test_each_layer_refuses_what_it_is_for(tmp_path, layer):
    applied, seen = tried(tmp_path, "no_new_privileges", layer)
    if not applied[layer]:
        pytest.skip(f"This system has no {layer}, or does not allow it here.")
    abi = restrictions.landlock_abi()
    expected = {
        name for name in REFUSED[layer] if layer != "landlock" or abi >= LEAST_ABI.get(name, 1)
    }
    assert {name for name, how in seen.items() if how != "done"} == expected


def test_applying_them_where_they_are_blocked_changes_nothing(tmp_path):
    # After the first time no system call of the layers works, as in a container that blocks them.
    layers = ("no_new_privileges", "landlock", "limits", "seccomp")
    twice = PROGRAM.replace("applied =", "restrictions.apply(); restrictions.apply(); applied =")
    done = subprocess.run(
        [sys.executable, "-P", "-c", twice, tmp_path / "secret", *layers],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
    )
    _, seen = json.loads(done.stdout)
    assert seen["compute"] == "done"


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_have_no_kernel_layers(monkeypatch, platform):
    monkeypatch.setattr(sys, "platform", platform)
    assert not restrictions.no_new_privileges()
    assert not restrictions.landlock()
    assert not restrictions.seccomp()


def test_system_calls_have_the_kernels_numbers():
    headers = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h"
    for at, header in enumerate(map(Path, headers)):
        if not header.exists():
            pytest.skip(f"There is no {header}: linux-libc-dev is not installed.")
        pattern = r"#define __NR(?:3264)?_(\w+)\s+(\d+)"
        numbers = {name: int(number) for name, number in re.findall(pattern, header.read_text())}
        calls = restrictions.SYSTEM_CALLS | restrictions.CONDITIONAL_CALLS
        for name, ours in calls.items():
            assert ours[at] == numbers.get(name), name


# ---- the processes that read pictures and models


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Starts a program as a process that reads a file is started."""

    def start(code: str) -> sandbox.Child:
        (tmp_path / "program.py").write_text(
            "from trainer.inference import restrictions, sandbox\n" + code
        )
        return sandbox.Child("program")

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return start


def test_the_environment_holds_nothing_of_the_users(child, monkeypatch):
    for name in ("GITHUB_TOKEN", "HTTPS_PROXY", "LD_PRELOAD", "AWS_SECRET_ACCESS_KEY", "SSH_AGENT"):
        monkeypatch.setenv(name, "secret")
    with child("import os\nsandbox.enter().send({'names': sorted(os.environ)})") as running:
        names = set(running.receive()["names"])
    assert not names & {"GITHUB_TOKEN", "HTTPS_PROXY", "LD_PRELOAD", "SSH_AGENT"}
    own = {"PYTHONPATH", "PYTHONWARNINGS", "OPENBLAS_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_"}
    assert names <= {*sandbox.ENVIRONMENT, *own}
    assert "PATH" in names


def test_processor_time_is_limited_by_the_process_itself(child):
    code = "channel = sandbox.enter()\nsandbox.allow_cpu(0)\nwhile True:\n    pass\n"
    with child(code) as running:
        assert running._process.wait(TIMEOUT) == -signal.SIGXCPU
        with pytest.raises(sandbox.ProtocolError):
            running.receive()


def held(process: subprocess.Popen, name: str) -> str:
    """Returns a line of what Linux says of a process."""
    folder = Path("/proc") / str(process.pid)
    lines = (folder / "status").read_text() + (folder / "limits").read_text()
    return re.search(rf"^{name}:?\s+(\S+)", lines, re.MULTILINE)[1]


def assert_restricted(process: subprocess.Popen, applied: dict[str, bool]) -> None:
    assert held(process, "Threads") == "1"  # The layers are one thread's.
    assert held(process, "NoNewPrivs") == "1"
    assert held(process, "Max core file size") == "0"
    if applied["limits"]:
        assert held(process, "Max open files") == "0"
        assert held(process, "Max file size") == "0"
    if applied["seccomp"]:
        assert held(process, "Seccomp") == "2"


@pytest.fixture
def applied(tmp_path):
    """Which of the layers this system has."""
    if sys.platform != "linux":
        pytest.skip("What a process holds is read in Linux' /proc.")
    return tried(tmp_path, "no_new_privileges", "landlock", "limits", "seccomp")[0]


def test_what_reads_pictures_is_restricted_before_it_has_one(applied):
    decoder = decoders._Decoder()
    try:
        Image.new("L", (9, 9)).save(content := io.BytesIO(), "PNG")
        with pytest.raises(DataError, match="a blank picture"):
            decoder.decode(content.getvalue(), "blank.png", "one")
        assert_restricted(decoder._child._process, applied)
    finally:
        decoder.end()


def test_what_reads_a_model_is_restricted_before_it_has_read_it(applied, tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.attrs["layer_names"] = ["a"]
        layer = file.create_group("a")
        layer.attrs["weight_names"] = ["w"]
        layer["w"] = np.zeros(10**6, np.float32)  # More than a pipe holds: it waits for a reader.
    with sandbox.Child(model_file.MODULE, tmp_path / "x.h5") as child:
        assert child.receive() == {"shapes": [[10**6]], "config": 0}
        assert_restricted(child._process, applied)


def test_a_decoder_can_decode_no_more_than_a_picture(child, tmp_path, monkeypatch):
    # A stand-in for a decoder that a picture has taken over: it starts as the decoders start.
    (tmp_path / "secret").write_text("secret")
    code = (
        "import json, socket\n"
        "from trainer.inference import decoders, pictures\n"
        "def taken_over(*arguments):\n"
        "    seen = []\n"
        "    for attempt in (lambda: open('secret').read(), lambda: socket.socket(),\n"
        "                    lambda: os.posix_spawn(sys.executable, ['python'], {})):\n"
        "        try:\n"
        "            attempt()\n"
        "        except OSError as error:\n"
        "            seen.append(type(error).__name__)\n"
        "    raise DataError(f'{len(seen)} of 3 refused')\n"
        "import os, sys\n"
        "from trainer.errors import DataError\n"
        "real = restrictions.apply\n"
        "def apply():\n"
        "    real()\n"
        "    pictures.open_image = taken_over\n"
        "restrictions.apply = apply\n"
        "decoders._serve()\n"
    )
    child(code).end()
    monkeypatch.setattr(decoders, "MODULE", "program")
    monkeypatch.chdir(tmp_path)
    expected = r"^3 of 3 refused" if sys.platform == "linux" else r"^[23] of 3 refused"
    with decoders.start(1) as decode, pytest.raises(DataError, match=expected):
        decode(b"content", "a.png", "one").result()
