# make quickstart   set up, then fine-tune the embedded model on the embedded data and look at the result
# make test         set up, then run every test but those marked slow or gpu
# make lint         lint, format and types
# make check        lint, and the fast tests (tests/unit without shared data): what to run before a commit
# make clean        remove what make made; runs/ stays
#
# PYTHON=...        the interpreter to build .venv with; the default is the first fit one on the PATH
# PYTEST_ARGS=...   more arguments for pytest, such as -n 4 or -k schedule

# an interpreter is fit if it is 3.11 or newer and can put pip into a virtual environment
IS_FIT := -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
ifndef PYTHON
PYTHON := $(shell for candidate in python3.11 python3.12 python3.13 python3 python; do \
	if $$candidate $(IS_FIT) >/dev/null 2>&1; then echo $$candidate; break; fi; done)
endif
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
PYTEST_ARGS ?=

.PHONY: quickstart test lint check clean
.DELETE_ON_ERROR:

# a run that is there already is gone on with, as train never writes over one
quickstart: .venv/.run-ready
	$(BIN)/ftcli train recipes/quickstart.yaml $(if $(wildcard runs/quickstart),--resume)
	$(BIN)/ftcli runs show runs/quickstart

test: .venv/.dev-ready
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: .venv/.dev-ready
	$(BIN)/ruff check src tests scripts
	$(BIN)/ruff format --check src tests scripts
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -q -m "not slow and not gpu and not real" tests/unit $(PYTEST_ARGS)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests scripts -name __pycache__ -prune -exec rm -rf {} +

# The stamps are the last thing written, so that an installation that was cut short is done again.
.venv/.run-ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" $(IS_FIT) 2>/dev/null || { \
		echo "error: no Python 3.11 or newer with venv and ensurepip was found" >&2; \
		echo "  hint: install one (on Debian and Ubuntu: apt install python3-venv), or name one: make PYTHON=/path/to/python3.11 ..." >&2; \
		exit 2; }
	@echo "making .venv and installing what ftcli needs (a minute or two, about 2 GB) ..."
	@$(PYTHON) -m venv --clear .venv
	@$(PIP) -e .
	@touch $@

.venv/.dev-ready: .venv/.run-ready
	@echo "installing the tools for tests and checks ..."
	@$(PIP) -e ".[dev]"
	@touch $@
