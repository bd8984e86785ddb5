"""The pages as a site, and those that are read where they lie."""

import re
import subprocess
import sys

import pytest
from support import ROOT

IN_THE_ROOT = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
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
