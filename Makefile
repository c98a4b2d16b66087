# What a developer or a first user runs: `make help` lists the targets. Needs Python 3.11 or newer, make and the network.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
MODELS := .models
CLIENTS := .clients
BIN := $(VENV)/bin

# The first interpreter that is new enough. `make PYTHON=/path/to/python` chooses another.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	$$p -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && { command -v $$p; break; }; done)

# uv installs the environments: it can replace a dependency, which pip can't. Without one on PATH, .venv gets its own.
HOST_UV := $(shell command -v uv 2>/dev/null)
UV := $(or $(HOST_UV),$(BIN)/uv)
UV_READY := $(if $(HOST_UV),$(BIN)/python,$(BIN)/uv)

# pip reads PIP_FIND_LINKS by itself, uv wants to be told; a folder that is not there would be an error.
LINKS := $(foreach place,$(PIP_FIND_LINKS),$(if $(findstring ://,$(place)),$(place),$(wildcard $(place))))
INSTALL := $(UV) pip install --quiet $(foreach place,$(LINKS),--find-links $(place))

# A machine with a working NVIDIA driver gets vLLM's CUDA build, any other the CPU build.
KIND := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
OVERRIDES := $(if $(filter cpu,$(KIND)),--override deploy/models-overrides.txt)

# Where it cannot be done, as without a C compiler, this says so in a line, and everything runs interpreted.
COMPILE := $(BIN)/understudy compile >/dev/null || echo "so the gateway runs interpreted, which is slower"

DEMO_OPTIONS := $(if $(DATA),--data '$(DATA)') $(if $(LABEL),--label '$(LABEL)') $(if $(ONLY),--only '$(ONLY)') \
	$(if $(LABELS),--labels '$(LABELS)') $(if $(UPSTREAM),--upstream '$(UPSTREAM)') \
	$(if $(UPSTREAM_MODEL),--upstream-model '$(UPSTREAM_MODEL)') $(if $(N),--records '$(N)') \
	$(if $(SEED),--seed '$(SEED)')

.PHONY: help setup compiled models clients demo up check test soak bench services clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18
	@echo "  options of demo:  DATA=FILE LABEL=FIELD ONLY=a,b LABELS=shuffled UPSTREAM=URL UPSTREAM_MODEL=NAME N=RECORDS SEED=NUMBER"

setup: $(VENV)/.installed $(VENV)/.compiled ## the environment .venv: gateway, controller, tools for development

compiled: $(VENV)/.installed ## the gateway's hot path as native code, a minute after a change of gateway/ or routing/
	@$(COMPILE)

models: $(MODELS)/.installed-$(KIND) ## the environment .models: vLLM, torch, peft (several gigabytes)

demo: setup compiled models ## the whole story on sample traffic, from first request to promotion
	$(BIN)/understudy demo $(strip $(DEMO_OPTIONS))

up: setup compiled ## gateway and controller on this machine
	$(BIN)/understudy up

check: setup ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clients: $(CLIENTS)/.python $(CLIENTS)/.load $(CLIENTS)/.node ## other people's clients, which the tests of conformance run

test: setup models services $(if $(PYTEST_ARGS),,compiled) clients ## every test; PYTEST_ARGS="-k spool" for some
	$(BIN)/pytest $(PYTEST_ARGS)

soak: setup compiled ## the log's fault tests in their long form, half an hour; SOAK_ARGS="--minutes 1" for less
	$(BIN)/python -m tests.bench.soak $(SOAK_ARGS)

bench: setup compiled ## the gateway beside nginx, LiteLLM, Portkey and two routers; BENCH_ARGS="--help" for its options
	@$(BIN)/python -m tests.bench.side_by_side $(BENCH_ARGS)

services: ## what the tests talk to or build with (PostgreSQL, Elasticsearch, Chromium, Node, nginx, cc), where this can install it
	@missing=""; \
	ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || missing="postgresql"; \
	command -v chromium chromium-browser google-chrome >/dev/null || missing="$$missing chromium"; \
	command -v curl >/dev/null || missing="$$missing curl"; \
	command -v npm >/dev/null || missing="$$missing nodejs npm"; \
	command -v nginx >/dev/null || missing="$$missing nginx-light"; \
	command -v wrk >/dev/null || missing="$$missing wrk"; \
	command -v cc >/dev/null || missing="$$missing gcc libc6-dev"; \
	[ -n "$${ELASTICSEARCH_URL:-}" ] || { \
		command -v java >/dev/null || missing="$$missing openjdk-17-jre-headless"; \
		command -v mvn >/dev/null || missing="$$missing maven"; }; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo not installed: $$missing, so the tests that need it are skipped; exit 0; fi; \
	echo installing: $$missing; export DEBIAN_FRONTEND=noninteractive; \
	{ apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing; } </dev/null >/dev/null \
		|| echo could not install: $$missing, so the tests that need it are skipped

clean: ## remove all environments, caches and the demo's output; your data stays
	rm -rf $(VENV) $(MODELS) $(CLIENTS) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
	rm -rf gateway/_compiled
	rm -rf demo-data demo-report.json demo-report.html .bench bench-report.json bench-report.svg
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer is needed: none found on PATH"; exit 1; }
	$(if $(HOST_UV),$(UV) venv --quiet --allow-existing --python $(PYTHON) $(VENV),$(PYTHON) -m venv $(VENV))

$(BIN)/uv: | $(BIN)/python
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv

$(VENV)/.installed: pyproject.toml constraints.txt | $(UV_READY)
	$(INSTALL) --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The first time only: who edits the sources compiles when it is wanted.
$(VENV)/.compiled: | $(VENV)/.installed
	@$(COMPILE); touch $@

$(MODELS)/.installed-$(KIND): $(wildcard deploy/models-*.txt) | $(VENV)/.installed
	[ -x $(MODELS)/bin/python ] || $(UV) venv --quiet --allow-existing --python $(BIN)/python $(MODELS)
	$(INSTALL) --python $(MODELS)/bin/python --constraint deploy/models-constraints.txt $(OVERRIDES) \
		--requirement deploy/models-$(KIND).txt
	@touch $@

# What cannot be had here is named, and its tests are skipped by name.
$(CLIENTS)/.python $(CLIENTS)/.load: $(CLIENTS)/.%: tests/conformance/clients/%.txt | $(VENV)/.installed
	@mkdir -p $(CLIENTS)
	@{ $(UV) venv --quiet --allow-existing --python $(BIN)/python $(CLIENTS)/$* && \
		$(INSTALL) --python $(CLIENTS)/$*/bin/python --requirement $< && touch $@; } || \
		echo "could not install $<, so the tests that need it are skipped"

$(CLIENTS)/.node: tests/conformance/clients/package.json
	@mkdir -p $(CLIENTS)/node && cp $< $(CLIENTS)/node/
	@{ npm install --silent --prefix $(CLIENTS)/node --no-audit --no-fund --no-package-lock --ignore-scripts </dev/null && \
		touch $@; } || echo "could not install $<, so the tests that need it are skipped"
