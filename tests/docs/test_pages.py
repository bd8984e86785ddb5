"""The pages as a site, and those that are read where they lie."""

import importlib
import re
import subprocess
import sys

import pytest
from support import ROOT

IN_THE_ROOT = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
PAGES = [*(ROOT / name for name in IN_THE_ROOT), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", IN_THE_ROOT)
def test_links_lead_to_files_that_are_there(name):
    links = [link.partition("#")[0] for link in LINK.findall((ROOT / name).read_text())]
    missing = [link for link in links if link and "://" not in link and not (ROOT / link).exists()]
    assert not missing


def test_figures_of_the_readme_are_those_that_were_measured():
    measured = (ROOT / "bench" / "results.md").read_text()
    (table,) = re.findall(
        r"^\| what \| figure .*?\n\n", (ROOT / "README.md").read_text(), re.M | re.S
    )
    numbers = set()
    for row in table.strip().splitlines()[2:]:
        numbers |= set(re.findall(r"\d+\.\d+", row.split("|")[2]))
    assert numbers
    assert not [number for number in numbers if number not in measured]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_names_only_modules_and_files_that_are_there(page):
    code = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", page.read_text())
    code = [text for text in code if "NAME" not in text]
    files = [
        text for text in code if re.fullmatch(r"(trainer|tests|k8s|bench|docs)/[\w./-]+", text)
    ]
    modules = [text for text in code if re.fullmatch(r"trainer(\.\w+)+", text)]
    missing = [name for name in files if not (ROOT / name).exists()]
    assert not missing + [name for name in modules if not is_there(name)]


def is_there(name: str) -> bool:
    """Tells whether ``trainer.a.b`` is a module or something in one."""
    path = ROOT.joinpath(*name.split("."))
    if path.is_dir() or path.with_suffix(".py").exists():
        return True
    module, _, attribute = name.rpartition(".")
    return hasattr(importlib.import_module(module), attribute)


@pytest.mark.full
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="Sphinx is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, ROOT / "docs", tmp_path / "site"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "commands.html").read_text()
    for flag in ("--collectives", "--step-timeout", "--no-report", "--dry-run", "--quantize"):
        assert flag in reference
