# make train     one command from a fresh clone to mnist.h5:   make train ARGS="--epochs 2"
# make test      the tests, within five minutes;  make test-full: those that take longer
# make image     the container image, by docker, or by IMAGE_BUILD="buildah bud"; TARGET=cpu|gpu|tpu
# make test-cluster  the manifests on the cluster of KUBECONFIG, with the image loaded there
# make lock      the exact versions of the image's packages, anew
# make manifests k8s/job.yaml and all that is written out from k8s/, by kubectl
# make notebook  digitclassification-model.ipynb anew: executed, and stored with its outputs
# make lint      ruff: rules and format; hadolint
# make bench     measurements, some hours of them; ARGS="step --repeats 3" for a part
# PYTHON=... names the Python to use, EXTRA=cpu|gpu|tpu the TensorFlow to install.

VENV ?= .venv
RUN = $(VENV)/bin/python
EXTRA ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

# What an installation is made of, the code apart.
INSTALLED = setup.py trainer/__init__.py $(wildcard trainer/models/winograd.*)

TARGET ?= cpu
IMAGE ?= digits-trainer:$(VERSION)$(if $(filter-out cpu,$(TARGET)),-$(TARGET))
IMAGE_BUILD ?= docker build
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' trainer/__init__.py)

.PHONY: train test test-full test-cluster lint format bench notebook image lock manifests clean

train: $(VENV)/.installed-$(EXTRA)
	$(RUN) -m trainer.task $(ARGS)

# Three at a time on two cores: some wait for a deadline.
test: $(VENV)/.installed-$(EXTRA)-test
	$(RUN) -m pytest -n 3 --dist worksteal -m "not full" $(ARGS)

test-full: $(VENV)/.installed-$(EXTRA)-test
	$(RUN) -m pytest -n 2 --dist worksteal --durations=10 -m full $(ARGS)

test-cluster: $(VENV)/.installed-$(EXTRA)-test
	$(RUN) -m pytest tests/cluster --durations=10 $(ARGS)

image:
	$(IMAGE_BUILD) --file docker/Dockerfile --target $(TARGET) --build-arg VERSION=$(VERSION) --tag $(IMAGE) .

# The image for CPUs runs on ARM too; TensorFlow for GPUs and TPUs is made for x86 alone.
lock: $(VENV)/.installed-$(EXTRA)
	$(RUN) -m pip install --quiet uv
	echo setuptools | $(LOCK) - --output-file docker/requirements-build.txt
	$(LOCK) setup.py --extra cpu --universal --output-file docker/requirements-cpu.txt
	$(LOCK) setup.py --extra gpu --python-platform x86_64-manylinux_2_40 --output-file docker/requirements-gpu.txt
	$(LOCK) setup.py --extra tpu --python-platform x86_64-manylinux_2_40 --output-file docker/requirements-tpu.txt

LOCK = $(RUN) -m uv pip compile --quiet --upgrade --python-version 3.13 \
    --generate-hashes --no-emit-index-url --no-header --no-annotate

# What kustomize makes of k8s/, written out: the two files that are used alone, each under the comment
# that it opens with, and what trainer.submit finds in the wheel.
manifests:
	$(call write_out,k8s/base,k8s/job.yaml)
	$(call write_out,k8s/fetch,k8s/fetch.yaml)
	cp k8s/job.yaml k8s/fetch.yaml trainer/k8s/assets/
	for name in gpu multiworker multiworker-gpu; do \
	    kubectl kustomize k8s/$$name >trainer/k8s/assets/$$name.yaml || exit; \
	done

write_out = (awk '!/^\#/ {exit} 1' $2; kubectl kustomize $1) >$2.tmp && mv $2.tmp $2

lint: $(VENV)/.installed-$(EXTRA)-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/hadolint docker/Dockerfile

format: $(VENV)/.installed-$(EXTRA)-test
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: $(VENV)/.installed-$(EXTRA)
	$(RUN) bench/pipeline.py
	$(RUN) bench/checkpoint.py
	$(RUN) bench/compare.py $(ARGS)

notebook: $(VENV)/.installed-$(EXTRA)-test
	$(RUN) tests/execute_notebook.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache

$(VENV)/.installed-%-test: $(INSTALLED) $(VENV)/bin/python
	@echo "Installing TensorFlow ($*) and the tests' packages into $(VENV): a minute or two"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[$*,test]"
	@touch $@

$(VENV)/.installed-%: $(INSTALLED) $(VENV)/bin/python
	@echo "Installing TensorFlow ($*) into $(VENV): a minute or two"
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
