# `make demo` and `make test` set up all they need; they want Python 3.11 to 3.13 and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed

.PHONY: help setup demo test lint types wheel bench soak

help:
	@echo "make demo    train, export, predict without torch, prove parity (writes demo_output/)"
	@echo "make test    the whole test suite, parity included"
	@echo "make lint    ruff: rules and formatting"
	@echo "make types   mypy --strict on models_zoo and infer_tf"
	@echo "make wheel   build wheel and sdist, install the wheel alone, predict with it"
	@echo "make bench   time the front ends and the whole path against torch"
	@echo "make soak    memory and threads over thousands of predictions"
	@echo "PYTHON=python3.12 chooses the interpreter, VENV=folder the environment, PYTEST_ARGS='-k frontend' the tests."

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "crossfade needs Python 3.11 to 3.13, but '$(PYTHON)' is not one; say make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "'$(PYTHON)' cannot make environments; install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV): several GB with torch's own CUDA libraries; some minutes and no output."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[sed]" || \
	  echo "The extra 'sed' cannot be built here (it wants a C compiler); all else works, and its tests are left out." >&2
	@$(BIN)/python -c 'import sys; from importlib.metadata import version; sys.exit(not all(version(name).startswith("2.11.") for name in ("torch", "torchaudio")))' || \
	  { echo "torch and torchaudio must be 2.11; remove $(VENV) and run make again" >&2; exit 2; }
	@touch $@

demo: $(INSTALLED)
	PATH="$(BIN):$$PATH" ./demo.sh

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy

wheel: $(INSTALLED)
	PATH="$(BIN):$$PATH" .ci/check_wheel

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

soak: $(INSTALLED)
	$(BIN)/python -m benchmarks.soak
