# `make quickstart` and `make test` do all the set-up they need on a machine with Python 3.11 or newer, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: quickstart test test-short test-newer faults slow slurm launch-files launch-checks stores compiled remedies lint lock clean

quickstart: $(VENV)/.installed
	@$(BIN)/rlhfjax data prepare movies
	@$(BIN)/rlhfjax run quickstart

# What checks types has one thread, for half a minute: it runs beside the tests.
test: $(VENV)/.installed-test
	@$(MAKE) --no-print-directory lint & lint=$$!; \
	  $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder; tests=$$?; \
	  wait $$lint || { echo "make lint: see above what it says"; exit 1; }; exit $$tests

# What differs between versions of Python and jax, in minutes: equations, the checkpoints of older releases, a run that is
# stopped and goes on, several devices, sampling, the command line.
SHORT := $(addprefix tests/,functional training/test_checkpoint.py sharding/test_rules.py sharding/test_mesh.py \
  generation/test_slots.py stages/test_finished_run.py stages/test_resume.py stages/test_old_checkpoints.py test_cli.py \
  test_xla_flags.py test_packaging.py)
test-short: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(SHORT)

# The same on every newer Python that is at hand, each in a virtual environment of its own.
test-newer: $(VENV)/.installed-test
	@for python in $(or $(PYTHONS),$$(.ci/newer-pythons)); do \
	  version=$$($$python -c 'import sys; print(*sys.version_info[:2], sep=".")') && echo "Python $$version" && \
	  $(MAKE) --no-print-directory test-short VENV=.venv-$$version PYTHON=$$python || exit 1; \
	done

# Every fault: what `make test` leaves out because it waits for deadlines and heartbeats.
faults: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m faults

# Renders the files of launch/ anew, each by the command in its first comment.
launch-files: $(VENV)/.installed-test
	$(BIN)/python -m tests.launch.launch_files

# The files of launch/ before the validators of those who read them, which have an environment of their own.
launch-checks: $(VENV)/.installed-test .venv-launch/.installed
	RLHFJAX_LAUNCH_VENV="$(CURDIR)/.venv-launch" $(BIN)/python -m pytest -p no:xdist -m launch -rs tests/launch

.venv-launch/.installed: pyproject.toml
	@$(PYTHON) -m venv .venv-launch
	@.venv-launch/bin/python -m pip --disable-pip-version-check --quiet install $(VALIDATORS)
	@touch $@
VALIDATORS := $(shell sed -n 's/^launch = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ',')

# The launch file for SLURM under a real SLURM of two nodes on this machine, as root: `apt-get install --no-install-recommends
# slurmctld slurmd slurm-client munge`. Without them it is skipped.
slurm: $(VENV)/.installed-test
	$(BIN)/python -m pytest -p no:xdist -m slurm -rs tests/launch/slurm

# Runs, data and exports in buckets, on stand-ins for them that nothing else needs.
stores: $(VENV)/.installed-test
	@$(PIP) install --editable '.[s3,gcs]'
	@$(PIP) install s3fs 'moto[server]>=5.1'
	$(BIN)/python -m pytest -m 'faults or not faults' tests/stores tests/stages/test_killed_in_a_store.py

# Whole recipes and models that learn: what `make test` has in small.
slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m slow

# Programs for TPUs, one after the other, each in minutes, into the result file that the tests ask. TPU_PYTHON is 3.12 or
# newer, with `pip install -e '.[tpu]'` and then `pip install libtpu==0.0.52`; PEERS=--peers compiles MaxText's, too.
compiled: $(VENV)/.installed-test
	"$(TPU_PYTHON)" -m benchmarks compiled $(PEERS) --json benchmarks/results/compiled.json
	$(BIN)/python -m pytest -p no:xdist tests/test_compiled.py

# What plans propose against mistakes, itself planned. Those of TPUs need Python 3.12 with libtpu, as `make compiled`.
remedies: $(VENV)/.installed-test
	$(BIN)/python -m pytest -p no:xdist -m remedies -rs tests/planning

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
	for kind in cpu cuda tpu; do \
	  sed -n 's/^\([a-z0-9_.-]*==[^\\]*\) \\$$/\1/p' requirements.lock | grep -vE '^($(FREE))==' | \
	  uv pip compile pyproject.toml launch/docker/build.in $$(test $$kind = cpu || echo --extra $$kind) --extra gcs --extra s3 --extra judges \
	    --constraints - --python-version 3.12 --python-platform x86_64-manylinux_2_31 $(PINNED) --output-file launch/docker/$$kind.lock || exit 1; \
	done
PINNED := --generate-hashes --no-emit-index-url --no-annotate --quiet --custom-compile-command "make lock"
LOCK := --universal --python-version 3.11 $(PINNED)
# What images have, with buckets, in older versions: their clients bound it from above.
FREE := fsspec|wrapt|aiohttp|aiosignal|aiohappyeyeballs|urllib3|python-dateutil|typing-extensions|multidict|yarl|propcache|frozenlist|attrs|idna

clean:
	rm -rf $(VENV) .venv-3.* .venv-launch build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
