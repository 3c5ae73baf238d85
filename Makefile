# `make demo` and `make test` work on a fresh machine that has Python >= 3.10, a C++17 compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip obeys this inside its isolated builds too; without it torch's largest build would be fetched there.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SOURCES := $(shell find src/rewire/ops/cpu -name '*.cpp' -o -name '*.h')
# The tests start many processes; without bytecode each of them would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

ASAN := build/asan
# Python and torch are not instrumented: their memory goes through the sanitizer's allocator by preloading it, with the
# C++ library beside it so that exceptions are found; what they never free at exit is not looked at.
ASAN_ENVIRONMENT = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(ASAN)/lib
# The tests of native code, which start the lower instruction sets themselves; none of what the compilers make of it.
ASAN_TESTS = tests/ops tests/nn/layers/test_conv.py tests/nn/weight/test_pool.py tests/topology tests/test_random.py \
  -k 'not compile and not export and not distributed'

.PHONY: install demo test lint format types layers pytest docs asan build wheels-test clean

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
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: install
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

types: install
	$(BIN)/mypy

layers: install
	$(BIN)/lint-imports

pytest: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The documentation site, in build/site; a warning (a link that leads nowhere, a page without a place) is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The native library with AddressSanitizer and UndefinedBehaviorSanitizer, in a folder of its own, and the kernels' tests.
asan: install
	mkdir -p $(ASAN)
	REWIRE_SANITIZE=1 $(BIN)/python setup.py -q build --build-temp $(ASAN)/objects --build-lib $(ASAN)/lib \
	  >$(ASAN)/log 2>&1 || { cat $(ASAN)/log; exit 1; }
	$(ASAN_ENVIRONMENT) $(BIN)/python -m pytest -q -n 2 $(ASAN_TESTS)

# An sdist and, from it, a wheel for this machine, in dist/.
build: dist/built

dist/built: pyproject.toml setup.py MANIFEST.in README.md constraints.txt $(shell find src/rewire -name '*.py') $(SOURCES) | $(BIN)/python
	rm -rf dist
	$(BIN)/python -m pip install --quiet setuptools wheel ninja numpy torch build
	$(BIN)/python -m build --no-isolation --outdir dist .
	touch $@

wheels-test: build
	.ci/try_distributions $(BIN)/python

clean:
	rm -rf build dist runs src/*.egg-info src/rewire/ops/cpu/_C*.so
