# `make demo` and `make test` set up all they need; `make help` lists the rest.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
# A uv on the PATH is used; else one is installed by pip into its own small environment.
UV := $(or $(shell command -v uv 2>/dev/null),.tools/bin/uv)
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-all chaos check docs bench clean
.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' | column -t -s '|'

install: $(INSTALLED)  ## Make .venv with the locked dependencies and this project

$(INSTALLED): requirements.lock setup.cfg pyproject.toml | $(filter .tools/bin/uv,$(UV))
	test -x $(BIN)/python || $(UV) venv -q --python $(PYTHON) $(VENV)
	$(UV) pip sync -q --compile-bytecode --require-hashes --python $(BIN)/python requirements.lock
	$(UV) pip install -q --no-deps --no-build-isolation --python $(BIN)/python -e .
	touch $@

.tools/bin/uv:
	$(PYTHON) -m venv .tools
	.tools/bin/python -m pip install -q uv==$(UV_VERSION)

demo: install  ## Pre-train, kill, resume, fine-tune with SAM, evaluate: about 6 minutes on 2 cores
	$(BIN)/python examples/demo.py demo-run

test: check  ## What CI runs: lint, types, imports, then the tests that are not slow
	$(BIN)/python -m pytest -m "not slow"

test-all: check  ## The same with the slow tests
	$(BIN)/python -m pytest

chaos: install  ## Kill, starve and damage runs, and compare them with undisturbed ones: 40 minutes
	$(BIN)/python -m tests.chaos --write docs/reliability.md

check: install  ## Lint, formatting, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: install  ## Build the documentation into site/, every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# One takes hours and one needs photographs: benchmarks/README.md says how they are run.
BENCHMARKS := $(filter-out %/scaling_study.py %/dedup.py,$(wildcard benchmarks/[!_]*.py))

bench: install  ## The benchmarks, each beside its peer
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:  ## Delete what was built and what the demo wrote
	rm -rf $(VENV) .tools build dist demo-run site src/*.egg-info .pytest_cache .ruff_cache
