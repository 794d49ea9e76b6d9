# `make demo` and `make test` set up all they need; `make help` lists the rest.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.9
# Use the uv on the PATH; if there is none, pip installs one into its own small environment.
UV := $(or $(shell command -v uv 2>/dev/null),.tools/bin/uv)
INSTALLED := $(VENV)/.installed
# One process per core, each with one thread: most test code is single-threaded.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal
GATES := $(VENV)/.gates
NEWEST := .venv-newest
NEWEST_PYTHON ?= python3.13

.PHONY: help install demo test test-all newest chaos check coverage mutants dist sbom audit docs bench clean
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

demo: install  ## Pre-train, kill, resume, fine-tune with SAM, evaluate: 4 to 13 minutes on 2 cores
	$(BIN)/python examples/demo.py demo-run

test: check  ## What CI runs: lint, types, imports, then the tests that are not slow
	$(PYTEST) -m "not slow"

test-all: check newest  ## The same with the slow tests, and the tests on the newest torch
	$(PYTEST)

chaos: install  ## Kill, starve and damage runs, and compare them with undisturbed ones: 16 to 40 minutes
	$(BIN)/python -m tests.chaos --write docs/reliability.md

check: install  ## Lint, formatting, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

newest: install  ## Test models, data and scaling on the newest torch and Python, in .venv-newest
	$(UV) venv -q --clear --python $(NEWEST_PYTHON) $(NEWEST)
	$(UV) pip install -q --upgrade --python $(NEWEST)/bin/python -e ".[train,remote,dedup,scaling]" \
		hypothesis pyarrow pytest pytest-timeout scikit-learn
	PATH="$(CURDIR)/$(BIN):$$PATH" $(NEWEST)/bin/python -m pytest -m "not slow" \
		tests/models tests/data tests/scaling

coverage: install  ## Lines and branches covered by the tests that are not slow, in every process
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -m "not slow" $(COVERED)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

$(GATES): requirements-gates.lock $(INSTALLED)
	$(UV) pip install -q --require-hashes --python $(BIN)/python -r requirements-gates.lock
	touch $@

mutants: $(GATES)  ## Break the order, SGD, AdamW, by_role, SAM and laws in small ways; tests must notice
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 2 $(MUTANTS)
	$(BIN)/mutmut export-cicd-stats
	@cat mutants/mutmut-cicd-stats.json

dist: $(GATES)  ## Build wheel and sdist into dist/, and check if a package index would accept them
	rm -rf dist build
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*.whl dist/*.tar.gz

sbom: $(GATES)  ## List what is installed, with licences, as CycloneDX in dist/
	mkdir -p dist
	$(BIN)/cyclonedx-py environment $(BIN)/python --output-reproducible -o dist/nfnets_xla.cdx.json

# If the service cannot be asked about a package, the audit fails and names it (--strict).
audit: $(GATES)  ## Look for known vulnerabilities of locked packages; asks a service on the network
	@for lock in requirements.lock requirements-tpu.lock; do $(BIN)/pip-audit --strict \
		--disable-pip --require-hashes --progress-spinner off -r $$lock || exit 1; done

docs: install  ## Build the documentation into site/, every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# One takes hours and one needs photographs: benchmarks/README.md says how to run them.
BENCHMARKS := $(filter-out %/scaling_study.py %/dedup.py,$(wildcard benchmarks/[!_]*.py))

bench: install  ## Run the benchmarks, each beside its peer
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:  ## Delete what was built, and the runs of the demo and the benchmarks
	rm -rf $(VENV) $(NEWEST) .tools build dist demo-run findings-run scaling-study site src/*.egg-info .pytest_cache .ruff_cache mutants .coverage*
