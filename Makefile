# One environment in .venv, made on first use and again when pyproject.toml changes.
.DEFAULT_GOAL := help
SHELL := /bin/sh

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHONS := python3.11 python3.12 python3.10 python3
# A name on the PATH may be a shim without an interpreter behind it, so each candidate is tried.
PYTHON ?= $(shell for name in $(PYTHONS); do \
	if $$name -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; \
	then echo $$name; break; fi; done)

.PHONY: help demo test test-all test-devices lint format bench clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | while IFS='|' read -r name text; do \
		printf '%-16s %s\n' "$$name" "$$text"; done

$(STAMP): pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo 'edgekd needs Python 3.10, 3.11 or 3.12 with venv' >&2; exit 1; fi
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP) ## compress a small image model into runs/demo, without network
	$(BIN)/edgekd demo --out runs/demo

lint: $(STAMP) ## style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: lint ## lint and the fast tests, on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: lint ## lint and every test, with coverage
	$(BIN)/python -m pytest -m 'not device' --cov --cov-report=term

test-devices: ## the tests that need OpenVINO, a vendor's compiler or sshd, in an environment of their own
	@[ -x $(VENV)-devices/bin/python ] || $(PYTHON) -m venv $(VENV)-devices
	$(VENV)-devices/bin/python -m pip install --quiet --disable-pip-version-check \
		-e '.[dev,openvino,qualcomm,ethos-u,plots]'
	$(VENV)-devices/bin/python -m pytest -p no:anyio -m device

format: $(STAMP) ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Those that make what they need; lowering, proxies, ptq, pruning_criteria, supernet and weight_only want a teacher, see `python bench/NAME.py --help`.
BENCH := budgets compress latency_prediction operators profile_overhead pruning training vendor_estimates verdict_simulation

bench: $(STAMP) ## the comparisons that need no teacher
	@for name in $(BENCH); do echo "$$name"; $(BIN)/python "bench/$$name.py" || exit 1; done

clean: ## remove the environment, caches and builds; runs/ stays
	rm -rf $(VENV) $(VENV)-devices build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
