# Everything needs Python 3.11, make and a network to the package registries; nothing else.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_VENV := .venv-bench
BENCH_BIN := $(BENCH_VENV)/bin
BENCH_READY := $(BENCH_VENV)/.ready

# Tests that run at once: they wait about as much as they work.
PROCESSES ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
# All of them, or those in these folders: make test TESTS=tests/unit
TESTS ?=

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(READY) ## Create .venv and install what is locked

# Plain pip, with hashes; the project itself goes in without its dependencies, which are there.
$(READY): requirements/dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=/path/to/it")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

.PHONY: demo
demo: $(READY) ## Watch mentors expire, Dynamics fail and heal, a worker die, and nothing get lost
	$(BIN)/hlf-sync demo

.PHONY: test
test: $(READY) ## Run the tests on a real PostgreSQL
	$(BIN)/python -m pytest -n $(PROCESSES) $(TESTS)

.PHONY: check
check: $(READY) ## Everything that has to hold: style, types, import contracts, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory test

.PHONY: chaos
chaos: $(READY) ## Kill, stop, cut off and fill up everything for some minutes: nothing may be lost
	$(BIN)/python -m tests.chaos

.PHONY: chaos-full
chaos-full: $(READY) ## The same for about an hour
	$(BIN)/python -m tests.chaos --full

.PHONY: bench
bench: $(BENCH_READY) ## Measure it side by side with its peers and its limits (half an hour)
	$(BENCH_BIN)/python -m tests.bench

# The peers live apart: nothing of ours may come to need them.
$(BENCH_READY): requirements/bench.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make bench PYTHON=/path/to/it")'
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/bench.txt
	@touch $(BENCH_READY)

.PHONY: migrate
migrate: $(READY) ## Bring the database of DATABASE_URL up to this release
	$(BIN)/alembic upgrade head

.PHONY: lock
lock: ## Lock the dependencies anew, with hashes (needs uv)
	uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --no-header --quiet --output-file requirements/runtime.txt
	uv pip compile pyproject.toml --extra demo --extra otel --extra sentry --group dev --universal --python-version 3.11 --generate-hashes --no-header --quiet --output-file requirements/dev.txt
	uv pip compile pyproject.toml --extra demo --group bench --constraint requirements/runtime.txt --universal --python-version 3.11 --generate-hashes --no-header --quiet --output-file requirements/bench.txt

.PHONY: clean
clean: ## Remove the environments, the reports and every cache
	rm -rf $(VENV) $(BENCH_VENV) tests/bench/contenders/node/node_modules tests/integration/deno/node_modules chaos-report bench-report .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
