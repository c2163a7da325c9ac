# Everything runs from .venv, which `setup` makes from pyproject.toml and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
TOOLS := .venv/tools

.PHONY: setup compare browser test lint docs release-check bench clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[study,dev]'
	touch $@

compare: $(INSTALLED)
	$(BIN)/nvamp compare --out runs/compare

# Chromium, which the tests of `nvamp inspect` open its pages in: Debian's, where there is none.
browser:
	@if [ -n "$$CHROMIUM" ] || command -v chromium >/dev/null || command -v chromium-browser >/dev/null \
		|| command -v google-chrome >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; \
	else echo "the tests need Chromium: install it, or name one in CHROMIUM" >&2; exit 1; fi

test: $(INSTALLED) browser
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What only documentation and releases need.
$(TOOLS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[docs,release]'
	touch $@

# The site, in runs/site: open index.html there. To search in it: python -m http.server -d runs/site
docs: $(TOOLS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

release-check: $(TOOLS)
	$(BIN)/python .ci/release_check.py

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.cpu --out runs/bench

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
