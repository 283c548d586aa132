# Everything runs from .venv, which each target sets up first: with constraints.txt's pins, in place, with the plugins.
PYTHON ?= python3
JOBS ?= 2

BIN := .venv/bin
VENV := .venv/.installed
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
PIP := $(BIN)/pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
CHECKPOINT := .demo/alexnet-digits.safetensors
# One thread per process: several tests run at once, and idle OpenMP workers would take the cores from the others.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest

.PHONY: help venv demo test test-all gpu lint format docs bench peers clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

venv: $(VENV) ## set up .venv

$(VENV): pyproject.toml constraints.txt $(addsuffix /pyproject.toml,$(PLUGINS))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "optc needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (the first time: some minutes, about 3 GB)"
	$(PIP) --editable '.[cpu,dev]' $(addprefix --editable ,$(PLUGINS))
	@touch $@

.venv/.installed-bench: $(VENV)
	$(PIP) --editable '.[cpu,dev,bench]'
	@touch $@

demo: $(VENV) $(CHECKPOINT) ## optimize an AlexNet trained here on real digits, and show what it gained
	@rm -rf .demo/alexnet-int8
	$(BIN)/optc optimize alexnet --weights $(CHECKPOINT) --data digits --passes fuse,quant -o .demo/alexnet-int8

# Trained once and kept.
$(CHECKPOINT): | $(VENV)
	@mkdir -p $(@D)
	$(BIN)/python examples/train_digits.py --model alexnet -o $@

test: $(VENV) ## run the tests
	$(PYTEST) -n $(JOBS) --dist loadfile -m 'not slow'

test-all: $(VENV) ## run the tests, those that take minutes too
	$(PYTEST) -n $(JOBS) --dist loadfile

gpu: $(VENV) ## run the tests that need an NVIDIA GPU, then measure everything that runs on it
	@$(BIN)/python benchmarks/gpu.py

lint: $(VENV) ## style, formatting, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV) ## mend what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV) ## write the generated pages again
	$(BIN)/python docs/generate.py

bench: .venv/.installed-bench ## run every benchmark, that against the peers in a short form
	$(BIN)/python benchmarks/run.py

peers: .venv/.installed-bench ## measure against every peer on every model (hours)
	$(BIN)/python benchmarks/peers.py; status=$$?; $(BIN)/python benchmarks/readme.py; exit $$status

clean: ## remove what was built, not .venv nor the trained checkpoint
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis runs .demo/alexnet-int8
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
