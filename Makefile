# Everything happens in a virtual environment beside this file; nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?=
ARGS ?=
# The CPU build of PyTorch: from local wheels where pip knows some, else from PyTorch's own index.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: serve test lint types docs unit format install bench gpu-check chaos loadtest lock docker-proof \
  package-proof ray-proof clean help
.DEFAULT_GOAL := help

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

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

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(wildcard engine/*/*.cpp engine/model/*.h engine/model/attention/*.cpp)
	@echo "installing ropeway"
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@echo "installing what the tests need"
	$(BIN)/pip install --quiet --editable ".[dev,train,bench,loadtest,docs]"
	$(BIN)/pip install --quiet --no-deps litgpt==0.5.13  # its network is an oracle; see docs/dependencies.md
	@touch $@

install: $(VENV)/.installed ## the virtual environment with ropeway in it

serve: $(VENV)/.installed ## start the server on http://127.0.0.1:8000 (MODEL=, ARGS=)
	@exec $(BIN)/ropeway serve $(MODEL) $(ARGS)

test: lint types docs unit ## everything that CI runs

lint: $(VENV)/.dev ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## mypy, strict
	$(BIN)/mypy

# Not --quiet: it hides warnings from --strict too.
docs: $(VENV)/.dev ## the documentation as a site in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

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
	$(PYTHON) -m loadtest.gpu.check $(ARGS)

chaos: $(VENV)/.installed ## mistreat a server: clients leave, the engine is killed (ARGS=)
	$(BIN)/pip install --quiet --editable ".[bench]"
	$(BIN)/ropeway bench chaos $(ARGS)

loadtest: $(VENV)/.installed ## load a local server: report in loadtest-report/, exit code by SLO (ARGS=)
	$(BIN)/pip install --quiet --editable ".[loadtest]"
	$(BIN)/ropeway loadtest $(ARGS)

docker-proof: ## build the Dockerfile without Docker and try the image (root; ARGS="--target cuda")
	$(PYTHON) -m proofs.docker $(ARGS)

package-proof: $(VENV)/.dev ## build sdist and wheel, install and serve them from a clean environment
	$(BIN)/python -m proofs.package $(ARGS)

ray-proof: $(VENV)/.dev ## two replicas on Ray: one killed, both replaced, under load; routing measured
	$(BIN)/pip install --quiet --editable ".[ray]"
	$(BIN)/python -m proofs.replicas

# Where PyTorch's CPU wheels are for uv: their index, or a folder (LOCK_TORCH="--find-links DIR").
LOCK_TORCH ?= --index $(TORCH_INDEX) --index-strategy unsafe-best-match
LOCK = $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
  --generate-hashes --no-emit-find-links --custom-compile-command "make lock"
SERVER = pyproject.toml --extra grammar --extra otel

lock: $(VENV)/.created ## locks/*.txt: every package of every image with its hashes
	$(BIN)/pip install --quiet uv
	echo "$(TORCH)+cpu" | $(LOCK) $(SERVER) $(LOCK_TORCH) --constraint - --no-emit-package torch -o locks/cpu.txt
	echo "$(TORCH)" | $(LOCK) $(SERVER) --constraint - -o locks/cuda.txt
	echo "torch; python_version < '3'" | $(LOCK) pyproject.toml --extra loadtest --override - \
	  --constraint locks/cpu.txt -o locks/loadtest.txt
	echo "setuptools>=77" | $(LOCK) - --constraint locks/cpu.txt -o locks/build.txt

clean: ## remove the environment and what was built
	rm -rf $(VENV) build *.egg-info engine/model/*.so
