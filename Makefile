# `make` alone lists the targets. Variables: PYTHON (3.11 or newer), VENV, TORCH_INDEX, PYTEST_ARGS, FAULTS_ARGS,
# DEMO_ARGS, BENCH.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
# The first interpreter that answers and is new enough; versions that the tests run on come first.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3 python; do \
	if $$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then command -v $$name; break; fi; done)
# Where pip may find the CPU build of torch, e.g. https://download.pytorch.org/whl/cpu (a CUDA build works, but is large).
TORCH_INDEX ?=
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --quiet --progress-bar off
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
# Training on a CPU takes and returns gigabytes every step: kept by the process, in huge pages, steps are a fifth faster.
MEMORY := GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456
BENCH ?= $(filter-out ablation scaling __init__,$(basename $(notdir $(wildcard benchmarks/*.py))))

.PHONY: help setup venv demo tracking test meshes faults lint format ablation bench clean

help: ## List the targets
	@echo "tracevision-jax: make TARGET"
	@sed -nE 's/^([a-z]+)( [a-z]+)*:[^#]*## (.*)/  \1\t\3/p' $(MAKEFILE_LIST) | expand -t 14

setup venv: $(STAMP) ## Make the environment in .venv; does nothing when pyproject.toml has not changed

# torch goes first and in one exact version: left to the resolver, the newest one brings gigabytes of CUDA libraries.
$(STAMP): pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "No Python 3.11 or newer with venv found; name one: make PYTHON=/path/to/python3" >&2; exit 1; fi
	@if [ ! -x $(BIN)/python ]; then echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); fi
	@echo "Installing torch 2.13.0 (the reference that tests compare with)"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	@echo "Installing tracevision-jax with its dependencies (a few minutes the first time)"
	@$(PIP) --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## Train, evaluate and draw on synthetic scenes, 15 minutes on two cores: runs/demo/report/index.html
	$(MEMORY) $(BIN)/tracevision demo $(DEMO_ARGS)

tracking: $(STAMP) ## Train a tiny SAM 2 on synthetic videos, 15 minutes on two cores, and score it: runs/sam2_demo
	$(MEMORY) $(BIN)/tracevision train sam2_demo

test: $(STAMP) ## Run all tests on the CPU with two workers (PYTEST_ARGS="-k name" to choose)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n 2 --dist worksteal $(PYTEST_ARGS)

meshes: $(STAMP) ## Compare every mesh of eight virtual devices with one device
	TRACEVISION_TEST_MESHES=all JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n 2 tests/parallel/test_eight_devices.py $(PYTEST_ARGS)

faults: $(STAMP) ## Kill a training run at random instants, 20 times (FAULTS_ARGS="--kills 3"), and compare every bit
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.faults.random_kills $(FAULTS_ARGS)

lint: $(STAMP) ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP) ## Rewrite the sources in the format that lint asks for
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ablation: $(STAMP) ## Train the ablations of the paper's tables on synthetic scenes (hours) and write docs/ablation.md
	$(MEMORY) $(BIN)/python -m benchmarks.ablation

bench: $(STAMP) ## Run every benchmark of benchmarks/ and print its table (BENCH="lbm" to choose)
	@for name in $(BENCH); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done

clean: ## Remove the environment, caches and runs
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build ./*.egg-info
