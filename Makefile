# Everything runs from .venv, which `setup` makes from pyproject.toml and constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
STUDY := .venv/study
INSTALLED := .venv/installed
TOOLS := .venv/tools

.PHONY: setup compare browser test lint docs release-check api lowest fuzz mutants bench clean

setup: $(INSTALLED)

# What `nvamp compare` needs.
$(STUDY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[study]'
	touch $@

# Only the loss module of torchtitan is used: its dependencies, left out here, need an older datasets.
$(INSTALLED): $(STUDY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[study,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'torchtitan==0.3.0; python_version >= "3.11"'
	touch $@

compare: $(STUDY)
	$(BIN)/nvamp compare --out runs/compare

# The tests of `nvamp inspect` open its pages in Chromium. If there is none, this installs Debian's.
browser:
	@if [ -n "$$CHROMIUM" ] || command -v chromium >/dev/null || command -v chromium-browser >/dev/null \
		|| command -v google-chrome >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; \
	else echo "the tests need Chromium: install it, or name one in CHROMIUM" >&2; exit 1; fi

# One process per core: the tests are many and small, and threads would only slow them down.
test: $(INSTALLED) browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --dist worksteal

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

# Records the public API after an intended change.
api: $(INSTALLED)
	$(BIN)/python -m tools.api > tests/api.txt.new
	mv tests/api.txt.new tests/api.txt

# Tests with the lowest versions that pyproject.toml allows, as far as they are available.
lowest: $(INSTALLED)
	$(BIN)/python -m tools.lowest

# For FUZZ_SECONDS each: property tests with new examples; then the commands killed, damaged and given random
# options. A failure is reported with its seed.
FUZZ_SECONDS ?= 3600
fuzz: $(INSTALLED)
	$(BIN)/python -m tools.fuzz --seconds $(FUZZ_SECONDS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.soak --seconds $(FUZZ_SECONDS)

# Changes the code in small ways and reports which changes no test sees: all of them, or for MUTANT_MINUTES those
# that the day's date draws.
mutants: $(INSTALLED)
	$(BIN)/python -m tools.mutants $(if $(MUTANT_MINUTES),--minutes $(MUTANT_MINUTES))

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.cpu --out runs/bench

# Removes what can be made again, but not the studies and measurements in runs/.
clean:
	rm -rf .venv runs/site runs/lowest runs/trainers runs/dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
