"""Runs every shell and Python block of the README and of ``docs/``, and refuses what is neither run
nor marked as not run.

A comment directly above a block says how it is run, CONTRIBUTING.md explains it:

    <!-- run: full, exit 78, with --train-limit 512 -->      <!-- not run: needs a cluster -->

The flags after ``with`` are added to every command of the package in a shell block, and keyword
arguments to every ``TrainConfig`` in a Python block, so that it takes seconds. Each shell block is
run in a folder of its own, in which there are the trained model and the pictures that it names. A
page's Python blocks are run one after the other in one process.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import foreign  # of bench/
import numpy as np
import pytest
from PIL import Image
from support import ROOT, TIMEOUT

from trainer.files import FILES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("sh", "console", "python")  # Fences of these languages are run.
SHOWN = ("text", "json", "yaml")  # These are output, or files.


def written(*digits: int, seed: int = 1) -> np.ndarray:
    """Draws digits beside one another, uint8 (h, w), dark on light."""
    noise = np.random.default_rng(seed)
    return np.hstack([foreign.draw(digit, "felt-tip", noise) for digit in digits])


# Where the pages speak of pictures, by the names that they have there.
PICTURES = {
    "seven.jpg": lambda: written(7),
    "chalk.webp": lambda: 255 - written(9),
    "photo.jpg": lambda: written(2, 0, 4),
    "one.png": lambda: written(1, seed=6),
    "blank.png": lambda: np.full((240, 240), 255, np.uint8),
    "w100.png": lambda: np.full((10_000, 10_000), 255, np.uint8),
}

FENCE = re.compile(r"^```(?P<info>.*)\n(?P<text>(?:(?!^```).*\n)*)^```\n", re.MULTILINE)
COMMENT = re.compile(r"<!-- (not )?run: (.+) -->\n\Z")


@dataclasses.dataclass
class Block:
    """A fenced block, and what the comment above it says."""

    page: Path
    line: int
    language: str
    text: str
    reason: str = ""  # why it is not run
    make: bool = False
    full: bool = False
    exit_code: int = 0
    flags: str = ""

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path, text: str) -> list[Block]:
    """Returns the blocks of a page, in their order.

    Raises:
        ValueError: A comment above a block says something that is not understood.
    """
    found = []
    for fence in FENCE.finditer(text):
        line = text.count("\n", 0, fence.start()) + 1
        block = Block(page, line, fence["info"].strip(), fence["text"])
        if comment := COMMENT.search(text[: fence.start()]):
            if comment[1]:
                block.reason = comment[2]
            else:
                apply(block, comment[2])
        found.append(block)
    return found


def apply(block: Block, comment: str) -> None:
    """Sets what a comment says: ``full, exit 78, with --epochs 1``; ``make (why not for real)``."""
    how, _, block.flags = comment.partition("with ")
    for word in filter(None, re.split(r",\s*", how.strip())):
        if word == "full":
            block.full = True
        elif word.startswith("make ("):
            block.make = True
        elif code := re.fullmatch(r"exit (\d+)", word):
            block.exit_code = int(code[1])
        else:
            raise ValueError(
                f"Expected full, exit N, make (...) or with FLAGS. Received: {word!r}."
            )


BLOCKS = [block for page in PAGES for block in blocks_of(page, page.read_text(encoding="utf-8"))]
SHELL = [block for block in BLOCKS if block.language in ("sh", "console") and not block.reason]
PYTHON = {
    page: [
        block
        for block in BLOCKS
        if block.page == page and block.language == "python" and not block.reason
    ]
    for page in PAGES
}


def parameter(value, name, *, full):
    return pytest.param(value, id=name, marks=[pytest.mark.full] if full else [])


def test_every_block_is_of_a_language_that_says_whether_it_is_run():
    others = [
        f"{block.id}: {block.language or 'none'}"
        for block in BLOCKS
        if block.language not in (*RUN, *SHOWN) and not re.match(r"{(?!code)", block.language)
    ]
    assert not others, f"Use one of {', '.join((*RUN, *SHOWN))}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```sh\na\n```\n", ("", False, 0, "")),
        ("<!-- not run: needs a cluster -->\n```sh\na\n```\n", ("needs a cluster", False, 0, "")),
        ("<!-- run: full, exit 78, with -n 1 -->\n```sh\na\n```\n", ("", True, 78, "-n 1")),
        ("<!-- not run: too far above -->\n\n```sh\na\n```\n", ("", False, 0, "")),
    ],
)
def test_a_comment_directly_above_a_block_is_about_that_block(text, expected):
    (block,) = blocks_of(ROOT / "README.md", text)
    assert (block.reason, block.full, block.exit_code, block.flags) == expected


def test_a_comment_that_is_not_understood_is_an_error():
    with pytest.raises(ValueError, match="Received: 'fulll'"):
        blocks_of(ROOT / "README.md", "<!-- run: fulll -->\n```sh\na\n```\n")


def test_a_reason_not_to_run_a_block_names_only_tests_that_are_there():
    named = {name for block in BLOCKS for name in re.findall(r"tests/[\w/.]*\w", block.reason)}
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("block", [parameter(one, one.id, full=one.full) for one in SHELL])
def test_a_shell_block_does_what_it_shows(block, folder, shell_env):
    script, expected = (block.text, []) if block.language == "sh" else commands(block.text)
    done = run(["sh", "-e", "-c", script], folder, shell_env(block))
    assert done.returncode == block.exit_code, done.stdout
    missing = first_missing(expected, done.stdout)
    assert not missing, f"{missing!r} is not in:\n{done.stdout}"


@pytest.mark.parametrize(
    "blocks",
    [
        parameter(blocks, page.name, full=any(block.full for block in blocks))
        for page, blocks in PYTHON.items()
        if blocks
    ],
)
def test_the_python_blocks_of_a_page_run_one_after_the_other(blocks, folder, shell_env):
    code = "\n".join(python(block) for block in blocks)
    done = run([sys.executable, "-c", code], folder, shell_env())
    assert done.returncode == 0, done.stdout


def commands(text: str) -> tuple[str, list[str]]:
    r"""Splits a ``console`` block into its commands and its lines of output.

    >>> commands("$ echo 1 |\n cat\n1\n")
    ('echo 1 |\n cat', ['1'])
    """
    typed, shown, goes_on = [], [], False
    for line in text.splitlines():
        if goes_on or line.startswith("$ "):
            typed.append(line if goes_on else line.removeprefix("$ "))
            goes_on = line.endswith(("\\", "|"))
        elif line.strip():
            shown.append(line)
    return "\n".join(typed), shown


def first_missing(expected: list[str], output: str) -> str | None:
    r"""Returns the first line that does not come after the ones before it, whatever the numbers; an
    ellipsis stands for the rest of a line.

    >>> first_missing(["a 1.5%", "c ..."], "a 27.1%\nb\nc and more\n")
    >>> first_missing(["c", "a 1"], "a 2\nc\n")
    'a 1'
    """
    lines = iter(without_numbers(line) for line in output.splitlines())
    for line in expected:
        start, ellipsis, _ = without_numbers(line).replace("...", "…").partition("…")
        if not any(one.startswith(start) if ellipsis else one == start for one in lines):
            return line
    return None


def without_numbers(line: str) -> str:
    """Returns a line as it is compared: with 0 for each number, and for "." in a table."""
    line = re.sub(r"\b[0-9a-f]{64}\b", "…", line)
    line = re.sub(r"\d+m \d+s", "0s", line)
    line = re.sub(r"\d[\d.,]*", "0", line)
    return " ".join("0" if word == "." else word for word in line.split())


def python(block: Block) -> str:
    """Returns the code of a block; with flags, ``TrainConfig`` takes them whatever is given."""
    if not block.flags:
        return block.text
    return (
        "import trainer.config as _config; _given = _config.TrainConfig.__init__\n"
        "_config.TrainConfig.__init__ = lambda self, **given: _given(\n"
        f"    self, **{{**given, **dict({block.flags})}}\n)\n"
        f"{block.text}\n"
        "_config.TrainConfig.__init__ = _given\n"
    )


def run(argv: list[str], folder: Path, env: dict) -> subprocess.CompletedProcess:
    return subprocess.run(
        argv,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


@pytest.fixture
def folder(request, tmp_path):
    """A folder with the files that the blocks name: a trained model, and pictures of digits."""
    given = request.node.callspec.params
    text = "".join(block.text for block in given.get("blocks") or [given["block"]])
    if "mnist.h5" in text:
        for name in FILES:
            shutil.copy(request.getfixturevalue("trained") / name, tmp_path)
    for name, picture in PICTURES.items():
        if name in text:
            Image.fromarray(picture()).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def shell_env(tmp_path_factory, command):
    """Returns a function that makes the environment of a block: ``python`` is this one, with the
    block's flags for the package's commands, and ``make`` says what it would do.
    """

    def make(block: Block | None = None) -> dict:
        programs = tmp_path_factory.mktemp("bin")
        python = (
            '#!/bin/sh\ncase "$1 $2" in\n'
            f'"-m trainer."*) exec {sys.executable} "$@" {block.flags if block else ""} ;;\n'
            f'*) exec {sys.executable} "$@" ;;\nesac\n'
        )
        write_program(programs / "python", python)
        if block and block.make:
            real = f'exec {shutil.which("make")} --dry-run --directory {ROOT} "$@"'
        else:
            real = 'echo "Expected a comment: <!-- run: make (what runs it for real) -->"; exit 1'
        write_program(programs / "make", f"#!/bin/sh\n{real}\n")
        env = {name: value for name, value in command.env.items() if not name.startswith("MAKE")}
        # What the pages show is what happens where there is no GPU.
        env |= {"PATH": f"{programs}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "-1"}
        return env

    return make


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)
