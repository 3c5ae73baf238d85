# `make demo` and `make test` work on a fresh machine that has Python >= 3.10, a C++17 compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip obeys this inside its isolated builds too; without it torch's largest build would be fetched there.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SOURCES := $(wildcard src/rewire/ops/cpu/*.cpp src/rewire/ops/cpu/*.h src/rewire/ops/cpu/*.inc)

.PHONY: install demo test lint types layers pytest build clean

install: $(VENV)/installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first, so that the extension is built against the very version that will load it.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet setuptools wheel ninja numpy torch
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/rewire train --data digits --method deep-r --run-dir runs/demo --overwrite

test: lint types layers pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

layers: install
	$(BIN)/lint-imports

pytest: install
	$(BIN)/python -m pytest -n 2

build: install
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf build dist runs src/*.egg-info src/rewire/ops/cpu/_C*.so
