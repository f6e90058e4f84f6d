# Two commands for a stranger: `make bench` sees the race, `make test` proves it. Both set themselves up.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: bench test test-slow lint setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints/cpu.txt scripts/setup.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/setup.sh

$(VENV)/.dev: $(VENV)/.ready
	PYTHON="$(PYTHON)" VENV="$(VENV)" sh scripts/setup.sh dev

bench: setup
	$(BIN)/python bench.py tour

test: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --benchmark-disable -m "not slow"
	@echo "left to 'make test-slow': the tests marked slow (ten seconds or more, or more formats and flags of the same kernels); CI runs both"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --benchmark-disable -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format . && $(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
