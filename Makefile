# Each target sets up what it needs first, in .venv: nothing but make and Python 3.11 or newer has to be there.
#
#   make demo PYTHON=/usr/bin/python3.12     use this Python
#   make demo ARGS="--help"                  more words for the command
#   make test TEST_PROCESSES=8               run the tests in more processes than two
#   make demo TORCH=pypi                     take PyTorch as the package index has it, with no look for a smaller build
#   make demo PIP_FLAGS="..."                more words for pip, for instance PyTorch's public CPU index or a mirror of yours
#
# CPU torch where there is no GPU: for Linux the package index serves PyTorch with CUDA, some gigabytes that such a
# machine cannot use. So where no nvidia-smi is found and pip would take the CUDA build (its list of requirements tells),
# uv, which knows PyTorch's own CPU builds (--torch-backend), fetches the same version from there. If they are out of
# reach, that is said and the CUDA build is taken: it runs on a CPU too.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-slow bench bench-gpu lint docs wheel clean

VENV ?= .venv
PYTHON ?= python3 python3.13 python3.12 python3.11
PIP_FLAGS ?=
TORCH ?= auto
ARGS ?=
TEST_PROCESSES ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

help: ## say what can be made
	@echo "make TARGET, where TARGET is one of:"
	@sed -n 's/^\([a-z-]*\):.*## /  \1 - /p' Makefile

install: $(INSTALLED) ## set up .venv with npedit, without what only the tests need

demo: $(READY) ## train a tiny editor without pairs and write a report (12 to 15 minutes on two cores)
	$(BIN)/npedit demo $(ARGS)

test: $(READY) ## the tests, except the slow ones and those that need a GPU, in two processes
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(ARGS)

test-slow: $(READY) ## the tests that take minutes
	$(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

bench: $(READY) ## measure speed and memory on this machine and write the tables into docs/benchmarks.md
	$(BIN)/python -m benchmarks --write docs/benchmarks.md $(ARGS)

bench-gpu: $(READY) ## rehearse all recipes of real models on this machine's GPUs, at full size with random weights
	$(BIN)/python -m benchmarks.gpu $(ARGS)

lint: $(READY) ## style, types, and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(VENV)/.docs ## build the documentation site into build/site, with strict links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

wheel: $(READY) ## build the wheel and the source archive into dist/
	$(BIN)/hatchling build $(ARGS)

clean: ## remove the virtual environment and the tools' caches (runs are kept)
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache build dist

# Each stamp is written last, so an interrupted set-up is taken up again.
$(INSTALLED): pyproject.toml constraints.txt
	@usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	if ! { $(BIN)/python -c "$$usable" && $(PIP) --version; } >/dev/null 2>&1; then \
	  found=; for p in $(PYTHON); do if "$$p" -c "$$usable" >/dev/null 2>&1; then found=$$p; break; fi; done; \
	  if [ -z "$$found" ]; then \
	    echo "npedit needs Python 3.11 or newer that can make virtual environments; none was found among: $(PYTHON)."; \
	    echo "Install one (on Debian and Ubuntu: apt-get install python3 python3-venv) or name yours: make PYTHON=/path/to/python3"; \
	    exit 1; \
	  fi >&2; \
	  echo "Setting up $(VENV) with $$("$$found" --version). This happens once."; \
	  "$$found" -m venv --clear $(VENV); \
	fi
	@rm -f $@
	@if [ "$(TORCH)" = auto ] && [ -z "$(PIP_FLAGS)" ] && [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null && \
	  $(PIP) install --quiet --quiet --dry-run --no-deps --report - -c constraints.txt torch | grep -Eq '"(nvidia|cuda)-'; then \
	  echo "No GPU here: looking for PyTorch's CPU build."; \
	  { $(PIP) install --quiet --quiet uv && \
	    $(BIN)/uv pip install --python $(BIN)/python --torch-backend=cpu -c constraints.txt torch; } || \
	  echo "PyTorch's CPU build is out of reach; taking the larger one with CUDA, which runs on a CPU too." >&2; \
	fi
	@echo "Installing what constraints.txt pins."; quiet=; [ -t 1 ] || quiet="--quiet --quiet"; \
	  $(PIP) install $$quiet $(PIP_FLAGS) -c constraints.txt -e .
	@touch $@

$(READY): $(INSTALLED)
	@echo "Installing what the tests need."; quiet=; [ -t 1 ] || quiet="--quiet --quiet"; \
	  $(PIP) install $$quiet $(PIP_FLAGS) -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.docs: $(READY)
	@$(PIP) install --quiet --quiet $(PIP_FLAGS) -c constraints.txt -e '.[docs]'
	@touch $@
