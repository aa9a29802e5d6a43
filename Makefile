# One word per habit. Every target sets up what it needs; `make help` lists them.
SHELL := /bin/sh
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 1
JOBS ?= 2
MLFLOW_PORT ?= 5000
PREFECT_PORT ?= 4200
ARGS ?=

# Tests run in JOBS processes; one that has nothing left takes over what waits in another.
PYTEST := $(BIN)/pytest -n $(JOBS) --dist worksteal

# Stages call ffprune by name: this folder's, whatever environment is active.
export PATH := $(CURDIR)/$(BIN):$(PATH)

# Where the links on Prefect's page lead, unless runs are kept on a server: those lead there.
export FFPRUNE_MLFLOW_URL := http://127.0.0.1:$(MLFLOW_PORT)

# No library reports home, from whatever command.
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: help run table pull push test check docs ui bench lock clean venv

help: ## List the targets.
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

venv: $(STAMP) ## Create .venv from requirements.lock.

# Relative paths throughout: make cannot handle a folder whose name has spaces, the commands can.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is older than Python 3.11; name another one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $(STAMP)

run: $(STAMP) ## Run the whole pipeline (only what is stale) and print the result table. WORKERS=n stages at once.
	@$(BIN)/ffprune run --workers $(WORKERS) $(ARGS)
	@$(BIN)/ffprune table

table: $(STAMP) ## Print the result table of the last run.
	@$(BIN)/ffprune table

pull: $(STAMP) ## Fetch the team's results and check every byte; `make run` then runs nothing. ARGS="-r REMOTE"
	@$(BIN)/dvc pull --run-cache $(ARGS)
	@$(BIN)/ffprune verify

push: $(STAMP) ## Check this folder's results, then share them; commit dvc.lock after it. ARGS="-r REMOTE"
	@$(BIN)/ffprune verify
	@$(BIN)/dvc push --run-cache $(ARGS)

check: $(STAMP) ## Format, lint, types, import contracts, documentation, fast tests. JOBS=n tests at once.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy flows/*.py benchmarks/*.py
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	$(PYTEST) -m "not slow" $(ARGS)

docs: $(STAMP) ## Build the documentation into site/; a broken link fails.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

test: check ## All tests: those of check, then the slow ones.
	$(PYTEST) -m slow $(ARGS)

ui: $(STAMP) ## Start the MLflow and Prefect pages (MLFLOW_PORT, PREFECT_PORT); Ctrl-C stops both.
	@VENV_BIN=$(BIN) MLFLOW_PORT=$(MLFLOW_PORT) PREFECT_PORT=$(PREFECT_PORT) scripts/ui.sh

bench: $(STAMP) ## Run the comparisons in benchmarks/ that have no result yet.
	@for file in benchmarks/*.py; do $(BIN)/python "$$file" || exit 1; done

lock: $(STAMP) ## Resolve the dependencies anew into requirements.lock.
	$(BIN)/pip-compile --quiet --extra=dev --strip-extras --no-emit-find-links --no-emit-index-url \
		--no-emit-trusted-host --output-file=requirements.lock pyproject.toml
	@# A local build of torch (2.13.0+cpu) is the same release; the registry knows it by the plain number.
	@sed -i 's/^\(torch==[0-9.]*\)+.*/\1/' requirements.lock

clean: ## Remove caches of the tools and checkpoints; outputs, DVC's cache and .venv stay.
	rm -rf .ckpt site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build src/*.egg-info
	find src tests flows -name __pycache__ -type d -prune -exec rm -rf {} +
