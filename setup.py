"""Builds the fast step's C extension; everything else about the package is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    # It includes no header of Python's, so one file serves all versions. Where it cannot be
    # compiled (no gcc or clang), the package is installed without it.
    ext_modules=[
        Extension(
            "trainer.models._winograd",
            ["trainer/models/winograd.c"],
            depends=["trainer/models/winograd.h"],
            extra_compile_args=["-O3", "-fno-math-errno"],
            libraries=["dl", "pthread"],  # separate libraries before glibc 2.34
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
