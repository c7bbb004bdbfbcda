# `make serve` goes from a checkout to a serving example; `make test` is the whole check. Both are quick the second time.
#
# torch comes as a CPU build where there is no NVIDIA driver: the plain wheel of PyPI brings gigabytes of CUDA. The CPU
# build's version carries a local part (2.13.0+cpu), which sorts above the plain one, so naming its index is enough to
# choose it; where that index cannot be reached, pip says so and takes what its other indexes have. It is asked for
# torch alone (--no-deps): everything else, torch's own requirements included, comes from the usual index.
# Override with e.g. `make install TORCH=torch==2.12.0 TORCH_INDEX=https://download.pytorch.org/whl/cu130`.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

SUITABLE := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for each in python3 python3.13 python3.12 python3.11; do \
  if command -v $$each >/dev/null && $$each -c '$(SUITABLE)'; then echo $$each; break; fi; done)

TORCH ?= torch==2.13.0
HAS_GPU := $(wildcard /proc/driver/nvidia/version)
ifeq ($(HAS_GPU),)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
EXTRAS ?= openvino
else
TORCH_INDEX ?=
EXTRAS ?= openvino,gpu
endif

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

EXAMPLE := examples/digits
REPOSITORY := $(EXAMPLE)/repository
GRPC_PORT ?= 8001
HTTP_PORT ?= 8002

.PHONY: help serve client test explore install stubs clean distclean

help: ## this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

serve: $(REPOSITORY)/.built ## train and build the digits example, then serve it
	@echo
	@echo "Serving $(EXAMPLE). When the log says ready, try in another terminal:"
	@echo "  make client                      three SLOs, and which variant answered each"
	@echo "  $(BIN)/gearshift variants         every variant with its evidence"
	@echo "  $(BIN)/gearshift explain digits --latency-ms 5"
	@echo "  http://127.0.0.1:$(HTTP_PORT)            the status page"
	@echo
	@exec $(BIN)/gearshift serve --models $(REPOSITORY) --grpc-port $(GRPC_PORT) --http-port $(HTTP_PORT)

client: $(VENV)/.installed ## send real digits to a running server
	$(BIN)/python $(EXAMPLE)/client.py --url 127.0.0.1:$(GRPC_PORT)

test: $(VENV)/.installed ## format, lint, types, import contracts, tests
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist loadfile

explore: $(VENV)/.installed ## look for counterexamples that `test` has never tried; new ones in each run
	$(BIN)/pytest -n 2 --dist loadfile --hypothesis-profile new $$(grep -l 'from hypothesis' tests/test_*.py)

install: $(VENV)/.installed ## the virtual environment with everything in it

stubs: $(VENV)/.installed ## regenerate the committed gRPC stubs
	$(BIN)/python -m protos

clean: ## remove caches and the built example
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache $(REPOSITORY)

distclean: clean ## remove the virtual environment too
	rm -rf $(VENV)

$(VENV)/.torch:
	@test -n "$(PYTHON)" || { echo "Gearshift needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	$(PIP) install --quiet --no-deps --retries 1 --timeout 20 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) '$(TORCH)'
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet --editable '.[$(EXTRAS)]' --group dev
ifneq ($(HAS_GPU),)
	# both wheels install the same Python package, so only one of them may stay
	$(PIP) uninstall --quiet --yes onnxruntime onnxruntime-gpu
	$(PIP) install --quiet --no-deps 'onnxruntime-gpu>=1.22'
endif
	@touch $@

$(REPOSITORY)/.trained: $(EXAMPLE)/train.py $(EXAMPLE)/model.py | $(VENV)/.installed
	$(BIN)/python $(EXAMPLE)/train.py --out $(REPOSITORY)
	@touch $@

# `build` itself finds out what changed, recipes included; this only asks it again after an install
$(REPOSITORY)/.built: $(REPOSITORY)/.trained $(EXAMPLE)/model.yaml $(VENV)/.installed
	cp $(EXAMPLE)/model.yaml $(REPOSITORY)/digits/model.yaml
	$(BIN)/gearshift build $(REPOSITORY)
	@touch $@
