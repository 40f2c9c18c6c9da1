# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST_TRITON := $(VENV)/triton-3.6.0
# Processes of tests at a time; many of them start ranks of their own.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-slurm check bench clean

help:
	@echo "make demo       shard, train, kill, resume and evaluate a small ViT on real images (2 CPU cores, minutes)"
	@echo "make test       checks and tests"
	@echo "make test-slow  the tests that kill real runs for minutes"
	@echo "make test-slurm jobs on a real SLURM cluster that it starts on this machine (needs slurm-wlm and munge)"
	@echo "make check      formatting, lint, types, architecture"
	@echo "make bench      measure the loader against the bare decoder (shards: benchmarks/shards.py IMAGES)"
	@echo "make clean      remove .venv, caches and the demo's output"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vitscale needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/python docs/demo.py

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_architecture.py

test: check
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m "not slow" $(PARALLEL) tests/interpreter

$(OLDEST_TRITON)/.ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $(@D) triton==3.6.0
	touch $@

test-slow: $(READY) $(OLDEST_TRITON)/.ready
	$(BIN)/python -m pytest -m slow $(PARALLEL)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m slow $(PARALLEL) tests/interpreter

test-slurm: $(READY)
	VITSCALE_REQUIRE_SLURM=1 $(BIN)/python -m pytest $(PARALLEL) tests/slurm

docs/config.md: $(READY) vitscale/config/schema.py
	printf '# Configuration\n\nEvery key, as `vitscale config` prints it. Generated: `make docs/config.md`.\n\n```yaml\n%s\n```\n' \
	  "$$($(BIN)/vitscale config)" > $@

bench: $(READY)
	$(BIN)/python benchmarks/loader.py

clean:
	rm -rf $(VENV) demo-out dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
