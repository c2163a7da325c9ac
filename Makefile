# Everything runs from .venv, which `setup` makes from pyproject.toml and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: setup compare test lint bench clean

setup: $(INSTALLED)

# Of torchtitan only the loss module is used: all of it would need an older datasets.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[study,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'torchtitan==0.3.0; python_version >= "3.11"'
	touch $@

compare: $(INSTALLED)
	$(BIN)/nvamp compare --out runs/compare

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.cpu --out runs/bench

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
