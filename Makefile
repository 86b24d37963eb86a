# Each target makes its own environment from pyproject.toml; it needs Python 3.11 or newer, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/digits
EXTRAS ?= dev

.PHONY: demo test test-slow lint bench docs package venv clean

demo: $(VENV)/.demo
	$(BIN)/python -m sapr_jax.main --config configs/digits.py --workdir $(RUN)

# Two workers with half of the files each, as the tests of a file share what is slow to make.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: lint
	$(PYTEST) -m 'not slow'

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Measures beside PyTorch, on this machine, and renews docs/performance.md; some minutes.
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

# The site, in site/; a link that leads nowhere is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Wheel and source distribution, in dist/, each tried in a clean environment.
package: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python tests/try_package.py dist/*.whl
	$(BIN)/python tests/try_package.py dist/*.tar.gz

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
	@touch $@

$(VENV)/.bench: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

# With EXTRAS=dev,bench the tests against PyTorch run too; they are skipped without it.
$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

venv: $(VENV)/bin/python

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: Python 3.11 or newer is needed; name it by make PYTHON=python3.12' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV)
