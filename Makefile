# `make help` lists what there is. Needs Python 3.11 to 3.14 and make; everything else goes to .venv.
# PYTHON=/path/to/python chooses the interpreter, LLKD_EXTRA=cpu|gpu|none what is installed.

.DEFAULT_GOAL := help
BIN := .venv/bin

# Two processes: one runs all tests that start Ray, one after the other; the other runs the rest.
pytest := $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

# Looks for a Python; setup.py knows whether there is anything left to do.
setup_with = python=$$(sh scripts/find_python.sh) && "$$python" scripts/setup.py

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

.PHONY: setup
setup: ## Make .venv and install the pinned versions (a second call returns at once)
	@$(setup_with)

.PHONY: setup-dev
setup-dev: ## The same with the development tools
	@$(setup_with) --dev

.PHONY: quickstart
quickstart: setup ## Distil a tiny teacher into MiniLM, from nothing, on this machine
	@$(BIN)/python jobs/distill.py

.PHONY: doctor
doctor: setup ## Check the set-up and say what to do; ARGS="my.yaml --set a.b=c" goes to jobs/doctor.py
	@$(BIN)/python jobs/doctor.py $(ARGS)

.PHONY: test
test: setup-dev ## Run the tests that take minutes: every part, once for real; ARGS="-k name -x" goes to pytest
	@$(pytest) $(ARGS)

.PHONY: test-all
test-all: setup-dev ## Run all tests: kills, nodes, S3, servers, browser, notebook, the whole quickstart
	@$(pytest) -m "not long" $(ARGS)

.PHONY: test-long
test-long: setup-dev ## Run the soaks: many kills, pools that grow and shrink
	@$(BIN)/python -m pytest -m long $(ARGS)

.PHONY: fuzz
fuzz: setup-dev ## Run the tests of properties on examples that they have not seen yet
	@$(BIN)/python -m pytest -m hypothesis --hypothesis-profile=new $(ARGS)

.PHONY: lint
lint: setup-dev ## Check style, formatting and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/mypy --config-file benchmarks/mypy.ini benchmarks

.PHONY: docs
docs: setup-dev ## Build the pages below docs/ into build/docs
	@$(BIN)/python scripts/config_reference.py > docs/reference/config.md
	@$(BIN)/python -m mkdocs build --quiet

.PHONY: bench
bench: setup-dev ## Measure against what one would use instead (hours); ARGS="teacher --pairs 1" chooses
	@$(BIN)/python benchmarks/suite.py $(ARGS)

.PHONY: format
format: setup-dev ## Put style and formatting right where that is possible
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

.PHONY: clean
clean: ## Remove caches and build/; keeps runs/ and .venv
	@rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## The same, and .venv, too
	@rm -rf .venv *.egg-info
