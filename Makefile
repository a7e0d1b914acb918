# Each target stands alone on a fresh Debian 12 machine. PYTHON names another interpreter than python3.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made-from-pyproject

.DEFAULT_GOAL := help
.PHONY: help setup demo test image-test lint bench clean

help:  ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(STAMP)  ## Install the system packages and make .venv

$(STAMP): pyproject.toml scripts/install-packages
	@command -v $(PYTHON) >/dev/null || { scripts/install-packages base; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
	        "name another with: make PYTHON=python3.12" >&2; exit 1; }
	scripts/install-packages base
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## Encrypt, search, mount, push, load and tamper with a model made on the spot
	scripts/install-packages demo
	$(BIN)/python scripts/demo.py

test: $(STAMP)  ## Run all tests
	scripts/install-packages test
	@$(BIN)/python -m tests.support.programs
	$(BIN)/python -m pytest --numprocesses auto --quiet

image-test: $(STAMP)  ## Build the container image, and run it in the three ways of the manifests (root; asks apt and PyPI)
	scripts/install-packages test
	scripts/test-image

lint: $(STAMP)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## Measure against gocryptfs, skopeo and age (takes long)
	scripts/install-packages test bench
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	$(BIN)/python -m bench

clean:  ## Remove what the other targets made
	rm -rf $(VENV) demo-work build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
