# Every target does its own set-up and works on a fresh machine with Python 3.11 or newer, pip and make.
# `make help` lists the targets.

PYTHON ?= python3
# Which ONNX Runtime to install, cpu or gpu: one exactly, since both provide the module `onnxruntime`.
FLAVOUR ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
# What `make test` hands to pytest, e.g. ARGS='tests/core -k heun'.
ARGS ?=

PIP_INSTALL = -m pip install --quiet --no-input --disable-pip-version-check --progress-bar off
DEV = .venv/.installed
SERVER = .venv-server/.installed

.DEFAULT_GOAL := help
.PHONY: help setup test lint protos demo serve bench bench-gpu soak clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(DEV) $(SERVER) ## Make the environments .venv (everything) and .venv-server (the server and latentctl, no torch)

test: $(DEV) $(SERVER) ## Run the tests; ARGS='...' goes to pytest
	.venv/bin/pytest -m 'not soak' $(ARGS)

lint: $(DEV) ## Check style, types, import rules and the contract
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/buf lint protos
	.venv/bin/buf format protos --diff --exit-code
	PATH="$(CURDIR)/.venv/bin:$$PATH" scripts/check_breaking.sh
	PYTHON=$(PYTHON) scripts/make_protos.sh --check

protos: ## Regenerate the committed stubs from protos/
	PYTHON=$(PYTHON) scripts/make_protos.sh

demo: $(DEV) ## Train, export, serve and sample the three families on real digits; pictures go to out/
	.venv/bin/python scripts/demo.py

serve: $(DEV) ## Serve the bundles in models/ on 127.0.0.1:8500
	.venv/bin/latentd --models models

bench: $(DEV) ## Compare served samples/s with a bare ONNX Runtime loop on the same cores
	.venv/bin/python -m tests.bench

bench-gpu: $(DEV) ## Compare the engine with PyTorch on a GPU, with a network of CIFAR-10's size
	.venv/bin/python -m tests.bench.gpu

soak: $(DEV) $(SERVER) ## Run the long tests
	.venv/bin/pytest -m soak $(ARGS)

clean: ## Remove environments, caches and pictures; trained models stay
	rm -rf .venv .venv-* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist out
	find protos server client trainer tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEV): pyproject.toml
	@$(call make_venv,.venv)
	@echo "Installing PyTorch into .venv (the first time takes minutes)"
	.venv/bin/python $(PIP_INSTALL) torch==2.13.0
	@echo "Installing latentd[dev,$(FLAVOUR)] into .venv"
	.venv/bin/python $(PIP_INSTALL) -e '.[dev,$(FLAVOUR)]'
	@echo $(FLAVOUR) > $@

$(SERVER): pyproject.toml
	@$(call make_venv,.venv-server)
	@echo "Installing latentd[server,cli,$(FLAVOUR)] into .venv-server"
	.venv-server/bin/python $(PIP_INSTALL) -e '.[server,cli,$(FLAVOUR)]'
	@echo $(FLAVOUR) > $@

# Makes the environment $(1), anew where it was made for the other ONNX Runtime.
define make_venv
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "latentd needs Python 3.11 or newer, and $(PYTHON) is not; try make PYTHON=python3.12" >&2; exit 1; }; \
	if [ -e $(1)/.installed ] && [ "$$(cat $(1)/.installed)" != $(FLAVOUR) ]; then rm -rf $(1); fi; \
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
endef
