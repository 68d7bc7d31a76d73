# On a machine with git, make and python3 (3.11 or newer, with venv):
#
#   make demo     the main job, from a log of interactions to a report, on the data and model that ship with rankwise
#   make test     every test
#
# Each creates .venv here and installs exactly pinned versions into it, once. Another build of torch, for example one for
# CUDA, is any text that follows `pip install`: make demo TORCH="torch==2.13.0 --index-url ..."; it is remembered until
# another one is given or .venv is removed.

PYTHON ?= python3
WORKERS ?= 2
TORCH_CHOICE := $(if $(filter undefined,$(origin TORCH)),default,given)
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
AUDIT := $(VENV)/audit
PIP := $(BIN)/python -m pip --disable-pip-version-check
# pip draws its progress bars in a terminal; in a log it stays silent.
INSTALL = $(PIP) install $$([ -t 1 ] || echo --quiet)

.PHONY: help install demo test soak matrix lint format types bench lock audit clean FORCE
.DEFAULT_GOAL := help

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1 - /p' Makefile

install: $(VENV)/.installed ## create .venv and install the pinned versions

demo: install ## run the whole main job on embedded data
	@$(BIN)/rankwise demo $(ARGS)

test: install ## run every test (WORKERS=2 processes; ARGS="-k name" for some)
	@$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

soak: install ## kill commands at random moments, 150 times, and start them again (ARGS="--kills 500 --seed 1")
	@$(BIN)/python tests/faults.py --kills 150 $(ARGS)

matrix: install ## test with the oldest and newest peft, transformers and trl (ARGS="--pythons python3.12" for more)
	@$(BIN)/python scripts/matrix.py --torch "$(TORCH)" $(ARGS)

lint: install ## check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: install ## repair style and formatting
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: install ## check types
	@$(BIN)/mypy

bench: install ## run the benchmarks
	@set -e; for file in benchmarks/bench_*.py; do \
		[ -e "$$file" ] || { echo "no benchmarks/bench_*.py"; exit 1; }; \
		echo "== $$file"; $(BIN)/python "$$file" $(ARGS); \
	done

lock: ## write requirements.lock from the versions that .venv holds
	@$(BIN)/python scripts/lock.py

audit: ## look the pinned packages up among the known vulnerabilities (asks the package index)
	@mkdir -p $(AUDIT)
	@[ -x $(AUDIT)/bin/pip-audit ] || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/pip install --quiet pip-audit==2.10.1; }
	@{ grep -o '^[^# ]*==[^ ]*' requirements.lock; echo $(firstword $(TORCH)); } > $(AUDIT)/pins.txt
	@$(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off -r $(AUDIT)/pins.txt $(ARGS) || { \
		echo "make audit: a package is vulnerable, or the data could not be had: the lines above say which" >&2; exit 1; }

clean: ## remove what the tools leave behind (.venv stays; to start afresh, delete it)
	rm -rf dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# The installation: each step touches its stamp last, so that a step that failed is run again.

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "rankwise needs Python 3.11 or newer, and '$(PYTHON)' is older or missing: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "[1/4] creating $(VENV) with $$($(PYTHON) --version)"
	@$(PIP) --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@touch $@

# Written only where its content changes: the next step runs again for another torch, and for nothing else. A torch that
# was given once stays when a later command gives none.
$(VENV)/.torch-wanted: FORCE | $(VENV)/.created
	@if [ "$(TORCH_CHOICE)" = default ] && grep -qs '^given ' $@; then exit 0; fi; \
	line='$(TORCH_CHOICE) $(TORCH)'; [ "$$(cat $@ 2>/dev/null)" = "$$line" ] || printf '%s\n' "$$line" > $@

# pip takes the CPU and the CUDA builds of one version for the same: the old one has to go first.
$(VENV)/.torch: $(VENV)/.torch-wanted
	@echo "[2/4] installing $$(cut -d' ' -f2- $<) (the largest part; some minutes on a slow network)"
	@if [ -e $@ ]; then rm -f $@ $(VENV)/.installed; $(PIP) uninstall --quiet --yes torch; fi
	@$(INSTALL) $$(cut -d' ' -f2- $<) || { rm $<; exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.torch requirements.lock pyproject.toml
	@echo "[3/4] installing $$(grep -c == requirements.lock) pinned packages"
	@$(INSTALL) --no-deps --require-hashes -r requirements.lock
	@echo "[4/4] installing rankwise itself, editable"
	@$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@
