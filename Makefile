# Everything happens in a virtual environment beside this file; nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?=
ARGS ?=
# The CPU build of PyTorch: from local wheels where pip knows some, else from PyTorch's own index.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: serve test lint types unit format install bench gpu-check clean help
.DEFAULT_GOAL := help

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

# With an NVIDIA card the package index's own PyTorch is the right one: it brings CUDA.
$(VENV)/.torch: $(VENV)/.created
	@if nvidia-smi >/dev/null 2>&1; then echo "CUDA found: installing PyTorch with CUDA"; \
	  $(BIN)/pip install --quiet "$(TORCH)"; \
	else echo "no CUDA: installing PyTorch for the CPU"; \
	  $(BIN)/pip install --quiet --no-index --no-deps "$(TORCH)" 2>/dev/null \
	  || $(BIN)/pip install --quiet --index-url "$(TORCH_INDEX)" "$(TORCH)" \
	  || { echo "only the package index can be reached: its PyTorch brings CUDA, several gigabytes"; \
	       $(BIN)/pip install --quiet "$(TORCH)"; }; fi
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py engine/model/attention/cpu_kernel.cpp
	@echo "installing ropeway"
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@echo "installing what the tests need"
	$(BIN)/pip install --quiet --editable ".[dev,train,bench]"
	@touch $@

install: $(VENV)/.installed ## the virtual environment with ropeway in it

serve: $(VENV)/.installed ## start the server on http://127.0.0.1:8000 (MODEL=, ARGS=)
	@exec $(BIN)/ropeway serve $(MODEL) $(ARGS)

test: lint types unit ## everything that CI runs

lint: $(VENV)/.dev ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## mypy, strict
	$(BIN)/mypy

unit: $(VENV)/.dev ## the tests
	$(BIN)/pytest -n 2 --dist worksteal -q

format: $(VENV)/.dev ## lay the code out and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed ## latency and throughput on this machine
	$(BIN)/pip install --quiet --editable ".[bench]"
	$(BIN)/ropeway bench latency
	$(BIN)/ropeway bench throughput

# Needs PyTorch for CUDA, Triton, numpy and safetensors in PYTHON; nothing is installed.
gpu-check: ## with a GPU: check every kernel against float64, measure, compare (PYTHON=, ARGS=)
	$(PYTHON) -m loadtest.gpu_check $(ARGS)

clean: ## remove the environment and what was built
	rm -rf $(VENV) build *.egg-info engine/model/attention/*.so
