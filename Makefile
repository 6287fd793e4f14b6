# Set-up and checks. `make help` lists the targets.
#
# Each environment is made on first use and brought up to date when pyproject.toml changes; a stamp file in it
# says when that last happened. Another torch or another Python gets an environment of its own, so switching
# back and forth installs nothing twice.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

DEFAULT_TORCH := 2.13.0
PYTHON ?= python3
TORCH ?= $(DEFAULT_TORCH)
ARGS ?=
PYTEST_ARGS ?=
SLOW ?=

# .venv, .venv-torch2.11, .venv-python3.12, .venv-torch2.11-python3.12. A Python that is named is asked for its
# version, since a path says little: /usr/bin/python3 and ~/other/bin/python3 may be different ones.
TORCH_SUFFIX := $(if $(filter $(DEFAULT_TORCH),$(TORCH)),,-torch$(TORCH))
PYTHON_VERSION = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
PYTHON_SUFFIX := $(if $(filter python3,$(PYTHON)),,-python$(PYTHON_VERSION))
VENV ?= .venv$(TORCH_SUFFIX)$(PYTHON_SUFFIX)
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

# "2.11" means any 2.11 release, "2.13.0" means that one.
TORCH_SPEC := torch==$(TORCH)$(if $(filter 2,$(words $(subst ., ,$(TORCH)))),.*)
EXTRAS := examples,interop,test,lint

.PHONY: help install demo test lint clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  \1\t/' | expand -t 12
	@echo
	@echo "  TORCH=2.11              another torch release, in an environment of its own"
	@echo "  PYTHON=python3.12       another Python, likewise"
	@echo "  ARGS='--steps 100'      flags for the demo"
	@echo "  SLOW=1                  the slow tests too"
	@echo "  PYTEST_ARGS='-k wheel'  flags for pytest"

install: $(STAMP) ## Make the environment and install the project in it

# torch goes first and is named again afterwards: the second command must not move it to another release.
# setuptools is installed so that the project builds without build isolation, the way it does offline.
# An environment that broke off half made has no pip, and is completed.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python %d.%d, and this \
	project needs 3.11 or later: name one with make PYTHON=..." % sys.version_info[:2])'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet "$(TORCH_SPEC)" "setuptools>=77"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-build-isolation \
		"$(TORCH_SPEC)" --editable ".[$(EXTRAS)]"
	$(BIN)/python -c "import torch; print('torch', torch.__version__, 'in $(VENV)')"
	touch $@

demo: $(STAMP) ## Pretrain a small GPT, dense and with SLoPe, and compare
	$(BIN)/python examples/pretrain.py $(ARGS)

# Types are checked against one torch only, the default: its annotations differ from release to release.
# Files of tests go to as many processes as there are cores, each with one thread of its own, in the order of their
# names: by default those with the fewest tests would come last, which are some that take longest.
test: $(STAMP) $(if $(TORCH_SUFFIX),,lint) ## Lint, types and the test suite
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
		$(if $(SLOW),,-m 'not slow') $(PYTEST_ARGS)

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

clean: ## Remove the environments, builds and caches
	rm -rf .venv .venv-torch* .venv-python* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find slope_compile passes kernels tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
