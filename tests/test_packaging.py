"""The wheel, its console scripts, and make in a folder where nothing has been installed."""

import importlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from support import ROOT

# What the Makefile reads: a make that runs these tests exports its own to them.
VARIABLES = ("ARGS", "EXTRA", "IMAGE", "IMAGE_BUILD", "PYTHON", "TARGET", "VENV")


def run(*argv, **options):
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MAKE") and name not in VARIABLES
    }
    options = {"check": True, "capture_output": True, "text": True, "env": env, **options}
    return subprocess.run([str(part) for part in argv], **options)


def test_every_command_has_a_console_script():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    modules = []
    for target in project["scripts"].values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))
        modules.append(module)
    commands = [
        f"trainer.{path.stem}"
        for path in (ROOT / "trainer").glob("*.py")
        if "\ndef main(" in path.read_text() and "__main__" in path.read_text()
    ]
    assert sorted(modules) == sorted(commands)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # From a copy, because building leaves a folder behind.
    source = tmp_path_factory.mktemp("source")
    tracked = run("git", "ls-files", cwd=ROOT).stdout.splitlines()
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, source)
    return next(folder.glob("digits_trainer-*.whl"))


@pytest.mark.full
def test_the_wheel_holds_the_package_its_data_and_both_licences(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if "/_winograd." not in name}
    modules = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "trainer").rglob("*.py")
        if path.name != "bundle.py"
    }
    data = {
        "trainer/py.typed",
        "trainer/data/assets/mnist.npz",
        "trainer/data/assets/LICENSE.mnist",
        "trainer/reporting/assets/report.html",
    }
    manifests = {
        f"trainer/k8s/assets/{path.name}"
        for path in (ROOT / "trainer" / "k8s" / "assets").glob("*.yaml")
    }
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == modules | data | manifests
    licences = {name.partition("/licenses/")[2] for name in metadata}
    assert {"LICENSE", "trainer/data/assets/LICENSE.mnist"} <= licences


@pytest.mark.full
def test_the_installed_wheel_is_the_same_command_with_its_data(wheel, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    folder = tmp_path / "empty"
    folder.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    here = {"cwd": folder, "env": env}

    run(python, "-m", "pip", "install", "--quiet", wheel)
    assert run(python, "-m", "trainer.task", "--help", **here).stdout.startswith("usage:")
    assert run(python.with_name("digits-train"), "--help", **here).stdout.startswith("usage:")
    without = run(python, "-m", "trainer.task", **here, check=False)
    assert without.returncode == 78
    assert "pip install 'digits-trainer[cpu]'" in without.stderr
    assert without.stderr.count("\n") == 1

    # A run in a cluster needs no TensorFlow here.
    submit = (python, "-m", "trainer.submit", "--workers", 2, "--dry-run")
    assert "pip install 'digits-trainer[k8s]'" in run(*submit, **here, check=False).stderr
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[k8s]")
    assert run(*submit, **here).stdout.count("kind: Job") == 2

    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[cpu]")
    small = ("--epochs", 1, "--train-limit", 256, "--test-limit", 100)
    done = run(python, "-m", "trainer.task", *small, **here)
    assert "256 training and 100 test images (bundled)" in done.stdout
    assert (folder / "mnist.h5").exists()


@pytest.fixture
def fresh(tmp_path):
    """A folder with what make needs to plan an installation."""
    (tmp_path / "trainer").mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py", "trainer/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def python_of_version(folder, version):
    """Writes a program that answers to make as a Python of this version would."""
    script = folder / "python-of-that-version"
    script.write_text(
        f'#!/bin/sh\ncase "$1" in --version) echo Python {version};; *) exit 1;; esac\n'
    )
    script.chmod(0o755)
    return script


def test_make_names_a_python_that_tensorflow_does_not_support(fresh):
    python = python_of_version(fresh, "3.9.18")
    done = run("make", "train", f"PYTHON={python}", cwd=fresh, check=False)
    assert done.returncode == 2
    assert "Expected Python 3.11, 3.12 or 3.13" in done.stderr
    assert "Received: Python 3.9.18" in done.stderr
    assert not (fresh / ".venv").exists()


@pytest.mark.parametrize(("works", "extra"), [(True, "gpu"), (False, "cpu")])
def test_make_installs_for_the_gpu_where_nvidia_smi_works(fresh, works, extra):
    tools = fresh / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\nexit {0 if works else 9}\n")
    (tools / "nvidia-smi").chmod(0o755)
    path = f"PATH={tools}{os.pathsep}{os.environ['PATH']}"
    plan = run("env", path, "make", "--dry-run", "train", "ARGS=--epochs 2", cwd=fresh).stdout
    assert f'--editable ".[{extra}]"' in plan
    assert plan.splitlines()[-1] == ".venv/bin/python -m trainer.task --epochs 2"
