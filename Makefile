# Everything runs from .venv, made from pyproject.toml and constraints.txt. A target installs what it needs there.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
VENV := .venv/made
STUDY := .venv/study
SITE := .venv/site
INSTALLED := .venv/installed
RELEASE := .venv/release

.PHONY: help setup compare browser test lint docs screenshots release-check api lowest fuzz mutants bench clean

help: ## print these lines
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1 \t\2/p' Makefile | expand -t 22

setup: $(INSTALLED) ## install everything that work on nvamp needs

# A pip that knows dependency groups.
$(VENV):
	@echo "making .venv"
	$(PYTHON) -m venv --upgrade-deps .venv
	touch $@

# What `nvamp compare` needs.
$(STUDY): $(VENV) pyproject.toml constraints.txt
	@echo "installing what nvamp compare needs, PyTorch among it: some minutes the first time"
	$(PIP) -c constraints.txt --editable '.[study]'
	touch $@

# What the site needs, neither PyTorch nor nvamp: mkdocstrings reads the source.
$(SITE): $(VENV) pyproject.toml constraints.txt
	@echo "installing what the site needs"
	$(PIP) -c constraints.txt --group docs
	touch $@

# Only the loss module of torchtitan is used: its dependencies, left out here, need an older datasets.
$(INSTALLED): $(STUDY) $(SITE)
	@echo "installing what the tests need"
	$(PIP) -c constraints.txt --editable '.[study,dev]'
	$(PIP) --no-deps 'torchtitan==0.3.0; python_version >= "3.11"'
	touch $@

compare: $(STUDY) ## train a small Llama under three losses and write runs/compare/report.html
	$(BIN)/nvamp compare --out runs/compare

# The tests of `nvamp inspect` open its pages in Chromium. If there is none, this installs Debian's.
browser:
	@if [ -n "$$CHROMIUM" ] || command -v chromium >/dev/null || command -v chromium-browser >/dev/null \
		|| command -v google-chrome >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		echo "installing Chromium"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; \
	else echo "the tests need Chromium: install it, or name one in CHROMIUM" >&2; exit 1; fi

# One process per core: the tests are many and small, and threads would only slow them down.
test: $(INSTALLED) browser ## run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --dist worksteal

lint: $(INSTALLED) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Open index.html there. To search in it: python -m http.server -d runs/site
docs: $(SITE) ## build this documentation as a site, runs/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

screenshots: $(INSTALLED) browser ## take the pictures of report and inspect page in docs/figures
	OMP_NUM_THREADS=1 $(BIN)/python -m docs.screenshots

$(RELEASE): $(VENV) pyproject.toml constraints.txt
	@echo "installing what builds and checks a release"
	$(PIP) -c constraints.txt --group release
	touch $@

release-check: $(RELEASE) ## build wheel and sdist in runs/dist, and try the wheel beside PyTorch alone
	$(BIN)/python .ci/release_check.py

# Records the public API after an intended change.
api: $(INSTALLED) ## record the public API in tests/api.txt
	$(BIN)/python -m tools.api > tests/api.txt.new
	mv tests/api.txt.new tests/api.txt

# Tests with the lowest versions that pyproject.toml allows, as far as they are available.
lowest: $(INSTALLED) ## test with the lowest versions that pyproject.toml allows
	$(BIN)/python -m tools.lowest

# For FUZZ_SECONDS each: property tests with new examples; then the commands killed, damaged and given random
# options. A failure is reported with its seed.
FUZZ_SECONDS ?= 3600
fuzz: $(INSTALLED) ## look for counterexamples for two hours, or twice FUZZ_SECONDS
	$(BIN)/python -m tools.fuzz --seconds $(FUZZ_SECONDS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.soak --seconds $(FUZZ_SECONDS)

# Changes the code in small ways and reports which changes no test sees: all of them, or for MUTANT_MINUTES those
# that the day's date draws.
mutants: $(INSTALLED) ## change the code in small ways and report what no test sees
	$(BIN)/python -m tools.mutants $(if $(MUTANT_MINUTES),--minutes $(MUTANT_MINUTES))

bench: $(INSTALLED) ## measure speed and memory of the losses on this CPU
	$(BIN)/python -m benchmarks.cpu --out runs/bench

# Removes what can be made again, but not the studies and measurements in runs/.
clean: ## remove .venv and what can be made again; keep the studies in runs/
	rm -rf .venv runs/site runs/lowest runs/trainers runs/dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
