"""Whether the installed packages go together: by their own metadata, without importing them.

findings = check_packages()
"""

import platform
from collections.abc import Iterator
from importlib import metadata

from trainer.diagnosis.finding import Finding

DISTRIBUTION = "digits-trainer"
_USERS_EXTRAS = ("cpu", "gpu", "tpu", "export", "k8s", "tfds", "web")  # Not its developers'.
_TENSORFLOWS = ("tensorflow", "tensorflow-cpu", "tensorflow-tpu")


def check_packages() -> Iterator[Finding]:
    """Compares Python and the installed packages with what each of them requires, from this package
    down. What a run cannot do without shows in ``probe``, where it is imported.
    """
    try:
        from packaging.specifiers import SpecifierSet

        own = metadata.distribution(DISTRIBUTION)
    except (ImportError, metadata.PackageNotFoundError) as error:
        yield Finding(
            "versions",
            "warning",
            f"not compared, because their requirements are not known here ({error})",
            "pip install 'digits-trainer[cpu]', or gpu or tpu in place of cpu",
        )
        return
    python = platform.python_version()
    supported = own.metadata["Requires-Python"]
    if SpecifierSet(supported).contains(python, prereleases=True):
        yield Finding("Python", "ok", python)
    else:
        yield Finding(
            "Python",
            "warning",
            f"{python}, where {DISTRIBUTION} {own.version} requires {supported}",
            "Make a virtual environment with such a Python.",
        )
    yield from _check_tensorflow()
    wrong = False
    for requirer, requirement, installed in unmet_requirements(DISTRIBUTION):
        wrong = True
        yield Finding(
            "versions",
            "warning",
            f"{requirer} requires {requirement}; installed: {installed or 'none'}",
            f"pip install '{requirement}'",
        )
    if not wrong:
        yield Finding("versions", "ok", "all packages are of versions that go together")


def unmet_requirements(distribution: str) -> Iterator[tuple[str, str, str | None]]:
    """Yields each requirement of a distribution, and of those that it requires in turn, that is not
    met: who requires it, the requirement, and the version that is installed, if any.

    Optional requirements (extras) count where something of that name is installed.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    waiting: list[tuple[str, tuple[str, ...]]] = [(distribution, _USERS_EXTRAS)]
    seen = {canonicalize_name(distribution)}
    while waiting:
        requirer, extras = waiting.pop(0)
        for text in metadata.requires(requirer) or []:
            requirement = Requirement(text)
            marker = requirement.marker
            needed = marker is None or marker.evaluate({"extra": ""})
            if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                continue
            installed = _version(requirement.name)
            if not (installed or needed):
                continue
            if not installed or not requirement.specifier.contains(installed, prereleases=True):
                yield requirer, str(requirement).partition(";")[0].strip(), installed
            if installed and (name := canonicalize_name(requirement.name)) not in seen:
                seen.add(name)
                waiting.append((requirement.name, tuple(requirement.extras)))


def _check_tensorflow() -> Iterator[Finding]:
    installed = {name: version for name in _TENSORFLOWS if (version := _version(name))}
    if len(installed) > 1:
        packages = " and ".join(f"{name} {version}" for name, version in installed.items())
        yield Finding(
            "versions",
            "warning",
            f"{packages} are installed over one another, in the same folder",
            f"pip uninstall {' '.join(installed)}; then install one of them",
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
