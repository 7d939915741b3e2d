# The commands of this repository. All of them work in .venv, which the first one makes; `make help` lists them.
# Steps run one after another: the demo and the tests are timed for two cores.

.DEFAULT_GOAL := help
.NOTPARALLEL:
SHELL := /bin/bash

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

# Every test process uses one thread; a file stays in one process, for what its tests share, and files begin in the
# order of tests/conftest.py.
TWO_AT_A_TIME := --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Flower counts its users over the network and looks for updates by default; nothing here needs either.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1

# glibc gives large blocks back to the kernel at every free and faults them in again at the next step. Keeping
# them makes training on a CPU 8-15 % faster; the price is memory that stays with the process until it ends.
demo demo-check: export MALLOC_MMAP_THRESHOLD_ := 1000000000
demo demo-check: export MALLOC_TRIM_THRESHOLD_ := 2000000000

.PHONY: help demo serve federation test test-slow test-all lint docs demo-check clean

help:  ## this list
	@grep -E '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*  ## (.*)/make \1|\2/' | column -t -s '|'

# --resume: an interrupted demo goes on, a finished one shows its result again.
demo: .venv/installed  ## train on made shapes at four simulated sites, privately; ends with pictures in runs/demo
	$(BIN)/fedcanvas simulate demo --out runs/demo --resume

serve: demo .venv/installed-serve  ## the demo's model as a service, with a page for browsers: http://127.0.0.1:8000
	$(BIN)/fedcanvas serve --model runs/demo

federation: .venv/installed-server  ## a server and three sites as processes of this machine, over TLS; ends with pictures
	$(BIN)/python -m simulations.rehearsal runs/federation

test: .venv/installed-dev  ## the test suite without the slow tests
	$(BIN)/python -m pytest $(TWO_AT_A_TIME)

test-slow: .venv/installed-dev  ## only the slow tests
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) -m slow

test-all: .venv/installed-dev  ## the whole suite, slow tests included
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) -m "slow or not slow"

lint: .venv/installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/installed  ## write the generated pages again; a test compares them
	$(BIN)/python docs/generate.py

demo-check: .venv/installed  ## the demo's way, a few rounds long
	rm -rf runs/demo-check runs/demo-check-sites
	$(BIN)/fedcanvas simulate demo --rounds 3 --out runs/demo-check
	test -s runs/demo-check/sheet.png
	test -s runs/demo-check/result.json

clean:  ## remove .venv, caches and builds; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: made last, so that an interrupted installation is done again.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: fedcanvas needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/installed-server: .venv/installed
	$(PIP) --quiet --editable '.[server]'
	touch $@

.venv/installed-serve: .venv/installed
	$(PIP) --quiet --editable '.[serve]'
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --quiet --editable '.[dev]'
	touch $@
