import importlib

import pytest

from trainer.diagnosis import packages


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs distributions, of which only the metadata exists, in place of all others."""
    import packaging.requirements
    import packaging.utils  # noqa: F401  (while the path still has it)

    def install(name, version, *requires, python=">=3.11"):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
        lines += [f"Requires-Python: {python}", *(f"Requires-Dist: {one}" for one in requires)]
        (folder / "METADATA").write_text("\n".join(lines))

    monkeypatch.setattr("sys.path", [str(tmp_path)])
    importlib.invalidate_caches()
    return install


def test_the_packages_of_this_installation_go_together():
    assert {finding.status for finding in packages.check_packages()} == {"ok"}


def test_a_package_of_a_version_that_does_not_fit_is_named(installed):
    installed("digits-trainer", "0.1.0", "keras<3.16,>=3.15.1")
    installed("keras", "3.14.0")
    python, versions = packages.check_packages()
    assert python.status == "ok"
    assert versions.status == "warning"
    assert versions.seen == "digits-trainer requires keras<3.16,>=3.15.1; installed: 3.14.0"
    assert versions.remedy == "pip install 'keras<3.16,>=3.15.1'"


def test_what_a_required_package_requires_counts_too(installed):
    installed("digits-trainer", "0.1.0", "keras>=3", 'onnx>=1; extra == "export"')
    installed("keras", "3.15.1", "ml-dtypes>=0.5", "absent", 'ruff; extra == "dev"')
    installed("ml-dtypes", "0.4.1")
    assert list(packages.unmet_requirements("digits-trainer")) == [
        ("keras", "ml-dtypes>=0.5", "0.4.1"),
        ("keras", "absent", None),
    ]


def test_an_optional_package_counts_where_it_is_installed(installed):
    requires = ('gradio<7,>=6; extra == "web"', 'onnx>=1; extra == "export"')
    installed("digits-trainer", "0.1.0", *requires)
    installed("gradio", "5.0")
    (unmet,) = packages.unmet_requirements("digits-trainer")
    assert unmet == ("digits-trainer", "gradio<7,>=6", "5.0")


def test_another_python_is_named(installed):
    installed("digits-trainer", "0.1.0", python="<3")
    python, _ = packages.check_packages()
    assert (python.status, python.seen.endswith("requires <3")) == ("warning", True)


def test_two_tensorflows_in_one_folder_are_named(installed):
    installed("digits-trainer", "0.1.0")
    installed("tensorflow", "2.21.0")
    installed("tensorflow-cpu", "2.21.0")
    _, versions, _ = packages.check_packages()
    assert versions.seen.startswith("tensorflow 2.21.0 and tensorflow-cpu 2.21.0 are installed")


def test_a_package_that_is_not_installed_is_no_error(installed):
    (finding,) = packages.check_packages()
    assert finding.status == "warning"
    assert "digits-trainer" in finding.seen
