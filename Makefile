# Two commands for a newcomer: make demo, make test. The rest: make help.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo demo-slurm demo-globus demo-engines test test-fast test-slurm test-globus test-gpu check bench-gateway bench-fairness bench-rough bench-growth bench-core bench-switching bench-switching-live bench-gpus bench-globus venv clean

VENV := .venv
BIN := $(VENV)/bin
# The environment is built once for a given set of pinned lists: its stamp carries their hash, so that neither a fresh
# checkout's file times nor a switch of branches builds it again for nothing.
LISTS := requirements/cpu.txt requirements/globus-client.txt requirements/dev.txt requirements/torch.txt requirements/make_venv.sh
HASH := $(shell cat $(LISTS) | sha256sum | cut -c1-12)
STAMP := $(VENV)/.complete-$(HASH)
TESTS ?= tests

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 22

$(STAMP):
	@sh requirements/make_venv.sh "$(abspath $(VENV))"
	@rm -f $(VENV)/.complete-*
	@touch $@

venv: $(STAMP) ## The virtual environment .venv with every pinned package

demo: $(STAMP) ## Two real models on this machine, room for one: the quickstart, from nothing to an answer
	@exec $(BIN)/python examples/run_demo.py

demo-slurm: $(STAMP) ## The same on a real Slurm with two nodes, one model on each; needs root, installs Slurm's packages
	@sh requirements/slurm.sh
	@exec $(BIN)/python -m examples.run_demo_slurm

demo-globus: $(STAMP) ## The same two models through Globus Compute: stand-in, broker, endpoint, a client in another venv
	@sh requirements/rabbitmq.sh
	@exec $(BIN)/python -m examples.run_globus_demo

demo-engines: $(STAMP) ## Speech and chat: three engines of three programs in three runtimes, room for one
	@sh requirements/demo_engines.sh
	@exec $(BIN)/python -m examples.run_demo_engines

PYTEST := $(BIN)/python -m pytest -rfEs --tb=short --durations=10

# Two workers side by side, as tests/support/lanes.py says. In one process, for a debugger: make test WORKERS=0
WORKERS ?= 2

test: $(STAMP) ## Every test; says what it skipped and why
	$(PYTEST) --numprocesses=$(WORKERS) $(TESTS)

test-fast: $(STAMP) ## The tests that start no process: under three minutes, for every change
	$(PYTEST) --numprocesses=$(WORKERS) -m 'not process' $(TESTS)

test-slurm: $(STAMP) ## The tests on a real Slurm; installs its packages if it may, else says what to install
	@sh requirements/slurm.sh
	$(PYTEST) -m slurm $(TESTS)

test-globus: $(STAMP) ## The tests of the Globus Compute endpoint; installs RabbitMQ if it may, else says what to install
	@sh requirements/rabbitmq.sh
	$(PYTEST) -m globus $(TESTS)

# Not in .venv, whose vLLM is the one for CPUs: PYTHON names an interpreter with the GPU's.
PYTHON ?= $(BIN)/python
test-gpu: ## The tests on an NVIDIA GPU, with what they measured; PYTHON=... names a Python with vLLM for GPUs
	$(PYTHON) -m pytest -rA -s --tb=short tests/gpu

check: $(STAMP) ## Linter, formatter, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_architecture.py

DOORMAN ?=
bench-gateway: $(STAMP) ## What the gateway adds to an engine, DOORMAN=1: what a doorman adds: build/bench/gateway.json
	$(BIN)/python -m benchmarks.gateway $(if $(DOORMAN),--doorman)

bench-fairness: $(STAMP) ## One client beside 100 of another key at one loaded model: build/bench/fairness.json
	$(BIN)/python -m benchmarks.fairness

bench-rough: $(STAMP) ## Floods, strangers, cold streams and ghosts on whole gateways: build/bench/rough.json
	$(BIN)/python -m benchmarks.rough

bench-switching-live: $(STAMP) ## 200 requests over two models, room for one: ours and plain LRU: build/bench/switching-live.json
	$(BIN)/python -m benchmarks.switching_live

bench-growth: $(STAMP) ## Growth rules compared over a simulated day: build/bench/growth.json and .png
	$(BIN)/python -m benchmarks.growth

bench-core: $(STAMP) ## What steps and views of the core cost, by the size of the fleet: build/bench/core.json and .png
	$(BIN)/python -m benchmarks.core

TRACES ?=
bench-switching: $(STAMP) ## Switching policies compared in virtual time, TRACES="FILE ..." too: build/bench/switching.json
	$(BIN)/python -m serve.simulate --seed 1 --seed 2 --seed 3 --jobs 2 --out build/bench
	@for trace in $(TRACES); do $(BIN)/python -m serve.simulate --trace $$trace --gpus 16 --gpus 24 \
		--host-gib 0 --host-gib 512 --host-gib 1024 --jobs 2 --out build/bench/$$(basename $$trace .csv.gz) || exit; done

bench-gpus: $(STAMP) ## The fewest GPUs at which 99 % of the requests of TRACES="FILE ..." start within 10 s and 60 s
	$(BIN)/python -m serve.simulate $(foreach trace,$(TRACES),--trace $(trace)) --gpus-needed \
		--host-gib 0 --host-gib 1024 --jobs 2 --out build/bench

bench-globus: $(STAMP) ## Prompts packed and one a task, through Globus Compute: build/bench/globus.json
	@sh requirements/rabbitmq.sh
	$(BIN)/python -m benchmarks.globus

clean: ## Remove .venv, build/ and caches (not the prepared weights)
	rm -rf $(VENV) $(VENV).log build .mypy_cache .ruff_cache .pytest_cache .hypothesis runinfo *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
