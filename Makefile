# `make quickstart` and `make test` do all the set-up they need on a machine with Python 3.11 or newer, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: quickstart test faults lint lock clean

quickstart: $(VENV)/.installed
	@$(BIN)/rlhfjax data prepare movies
	@$(BIN)/rlhfjax run quickstart

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Every fault: what `make test` leaves out because it waits for deadlines and heartbeats.
faults: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m faults

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("rlhfjax needs Python 3.11 or newer; this is " + sys.version.split()[0] + " (set PYTHON=python3.11)" if sys.version_info < (3, 11) else 0)'
	@echo "installing into $(VENV) (about a minute)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.lock pyproject.toml | $(BIN)/python
	@$(PIP) install --require-hashes -r requirements.lock
	@$(PIP) install --no-deps --editable .
	@touch $@

$(VENV)/.installed-test: requirements-test.lock $(VENV)/.installed
	@$(PIP) install --require-hashes -r requirements-test.lock
	@touch $@

# Pins every package with its hashes, for all Python versions at once; names no download host.
lock:
	uv pip compile pyproject.toml --extra judges --output-file requirements.lock $(LOCK)
	uv pip compile pyproject.toml --extra test --constraints requirements.lock --output-file requirements-test.lock $(LOCK)
LOCK := --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --quiet --custom-compile-command "make lock"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
