# make train         trains: from a fresh clone to mnist.h5 in one command. ARGS="--epochs 2" adds flags
# make test          the tests, in ten to fifteen minutes on two cores. ARGS="-k checkpoint" selects some
# make test-full     the tests that take longer
# make test-gpu      the tests that need a GPU, in five minutes or so; make test runs them, too
# make test-cluster  the manifests, on the cluster of KUBECONFIG with the image loaded into it
# make chaos         runs with one fault each, ten minutes of them. ARGS="--minutes 60 --seed 7"
# make lint          rules and format (ruff), types (mypy), imports between layers (import-linter), hadolint
# make format        applies ruff's fixes and format
# make docs          the documentation, as HTML in build/docs; a warning is an error
# make bench         measurements, some hours of them. ARGS="step --repeats 3" selects a part
# make bench-gpu     the same on a GPU, in six minutes or so. ARGS=--smoke tries it on a CPU
# make notebook      executes digitclassification-model.ipynb and stores its outputs
# make image         the container image. TARGET=cpu|gpu|tpu; IMAGE_BUILD="buildah bud" instead of docker
# make sbom          what is in the image, as CycloneDX: build/sbom-cpu.json, or TARGET=gpu|tpu
# make audit         known vulnerabilities of that; make lint runs it, where the index answers
# make lock          updates docker/requirements-*.txt, the exact versions inside the image
# make manifests     renders k8s/ with kubectl: k8s/job.yaml, k8s/fetch.yaml, trainer/k8s/assets
# make clean         removes the virtual environment, builds and caches
#
# PYTHON=...             the Python to make the virtual environment with: 3.11, 3.12 or 3.13
# EXTRA=cpu|gpu|tpu      the TensorFlow to install; gpu where nvidia-smi works

VENV ?= .venv
RUN = $(VENV)/bin/python
EXTRA ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

# A change of these needs another installation: it is editable, so other changes of code do not.
INSTALLED = pyproject.toml setup.py trainer/__init__.py $(wildcard trainer/models/winograd.*)

TARGET ?= cpu
IMAGE ?= digits-trainer:$(VERSION)$(if $(filter-out cpu,$(TARGET)),-$(TARGET))
IMAGE_BUILD ?= docker build
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' trainer/__init__.py)

.PHONY: audit sbom train test test-full test-gpu test-cluster chaos lint format docs bench bench-gpu notebook image lock manifests clean

train: $(VENV)/.installed-$(EXTRA)
	$(RUN) -m trainer.task $(ARGS)

# Three processes for two cores: some tests wait for timeouts, or for a process to start.
test: $(VENV)/.installed-$(EXTRA),test
	$(RUN) -m pytest -n 3 --dist worksteal -m "not full" $(ARGS)

test-full: $(VENV)/.installed-$(EXTRA),test
	$(RUN) -m pytest -n 3 --dist worksteal --durations=10 -m full $(ARGS)

test-gpu: $(VENV)/.installed-$(EXTRA),test
	$(RUN) -m pytest tests/gpu --durations=10 $(ARGS)

test-cluster: $(VENV)/.installed-$(EXTRA),test
	$(RUN) -m pytest tests/cluster --durations=10 $(ARGS)

chaos: $(VENV)/.installed-$(EXTRA),test
	$(RUN) tests/chaos.py $(ARGS)

image:
	$(IMAGE_BUILD) --file docker/Dockerfile --target $(TARGET) --build-arg VERSION=$(VERSION) \
	    --build-arg REVISION=$(shell git rev-parse HEAD 2>/dev/null) --tag $(IMAGE) .

# The image for CPUs runs on ARM too; TensorFlow for GPUs and TPUs has wheels for x86 only.
lock: $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check uv
	echo setuptools | $(LOCK) - --output-file docker/requirements-build.txt
	$(LOCK) pyproject.toml --extra cpu --extra metrics --universal --output-file docker/requirements-cpu.txt
	$(LOCK) pyproject.toml --extra gpu --extra metrics --python-platform x86_64-manylinux_2_40 --output-file docker/requirements-gpu.txt
	$(LOCK) pyproject.toml --extra tpu --extra metrics --python-platform x86_64-manylinux_2_40 --output-file docker/requirements-tpu.txt

LOCK = $(RUN) -m uv pip compile --quiet --upgrade --python-version 3.13 \
    --generate-hashes --no-emit-index-url --no-header --no-annotate

# Two files that are applied alone, which keep the comment they open with, and those that the wheel
# has for trainer.submit.
manifests:
	$(call write_out,k8s/base,k8s/job.yaml)
	$(call write_out,k8s/fetch,k8s/fetch.yaml)
	cp k8s/job.yaml k8s/fetch.yaml trainer/k8s/assets/
	for name in gpu tpu multiworker multiworker-gpu jobset jobset-gpu; do \
	    kubectl kustomize k8s/$$name >trainer/k8s/assets/$$name.yaml || exit; \
	done
	kubectl kustomize k8s/kubeflow >trainer/k8s/assets/trainjob.yaml

write_out = (awk '!/^\#/ {exit} 1' $2; kubectl kustomize $1) >$2.tmp && mv $2.tmp $2

# Without TensorFlow: neither mypy nor import-linter imports what it checks.
lint: $(VENV)/.installed-lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/hadolint docker/Dockerfile
	@if $(RUN) -c "from urllib.request import urlopen; urlopen('https://pypi.org/pypi/pip/json', timeout=10)" 2>/dev/null; \
	    then $(MAKE) --no-print-directory audit; else echo "pip-audit: skipped, pypi.org does not answer"; fi

# Known vulnerabilities of what the images contain.
audit: $(VENV)/.installed-lint
	for target in cpu gpu tpu; do \
	    $(RUN) -m pip_audit --disable-pip --require-hashes --requirement docker/requirements-$$target.txt || exit; \
	done

# Software bill of materials of an image, as CycloneDX.
sbom: $(VENV)/.installed-lint
	mkdir -p build
	$(VENV)/bin/cyclonedx-py requirements docker/requirements-$(TARGET).txt --output-file build/sbom-$(TARGET).json

format: $(VENV)/.installed-lint
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

docs: $(VENV)/.installed-$(EXTRA),docs
	$(RUN) -m sphinx --fail-on-warning --keep-going --quiet --builder html docs build/docs
	@echo "Open build/docs/index.html"

bench: $(VENV)/.installed-$(EXTRA)
	$(RUN) bench/pipeline.py
	$(RUN) bench/checkpoint.py
	$(RUN) bench/fit.py
	$(RUN) bench/augmentation.py
	$(RUN) bench/compare.py $(ARGS)

bench-gpu: $(VENV)/.installed-$(EXTRA)
	$(RUN) bench/gpu.py $(ARGS)

notebook: $(VENV)/.installed-$(EXTRA),test
	$(RUN) tests/execute_notebook.py

clean:
	rm -rf $(VENV) build *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

# The stem is the list of extras.
$(VENV)/.installed-%: $(INSTALLED) $(VENV)/bin/python
	@echo "Installing digits-trainer[$*] into $(VENV): a minute or two"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@

# The first Python that TensorFlow has wheels for, under any of its usual names.
$(VENV)/bin/python:
	@for python in $${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do \
	    $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || continue; \
	    $$python -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); \
	    echo "Expected $$python to make a virtual environment. Received: the error above. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	done; \
	echo "Expected Python 3.11, 3.12 or 3.13, which TensorFlow has wheels for. Received: $$($${PYTHON:-python3} --version 2>&1 | head -1). Install one, or name it: make train PYTHON=/path/to/python3.13" >&2; exit 1
