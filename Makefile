# Two commands do nearly everything: `make lab` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
JOBS ?= 2

.PHONY: help setup lab test lint unit labs test-browser verify coverage bench doctor checkpoints wheel clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/ready ## virtual environment, packages, corpora and pretrained models
	@$(BIN)/python -m lablib setup

# The stamp is written last, so an interrupted installation is taken up again.
$(VENV)/ready: pyproject.toml constraints.txt
	@echo "installing packages into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt \
		-e '.[lab,test,browser]' \
		| awk '/^(Collecting|Building|Installing|Successfully)/ {print "  " $$1 " " $$2; fflush()}'
	@touch $@

lab: setup ## set everything up and open JupyterLab at the start page
	@$(BIN)/python -m lablib.lab.open

test: setup lint unit labs ## everything that tests can tell: ruff, unit tests, every lab at the smoke tier

lint: setup
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

unit: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadscope -q tests -m "not browser"

labs: setup
	@LABLIB_TIER=smoke LABLIB_STATIC=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadscope -q \
		--nbval-lax --nbval-cell-timeout=300 labs

test-browser: setup ## drive JupyterLab in headless Chromium through every lab; screenshots under build/
	@$(BIN)/python -m pytest -q tests/browser -m browser

verify: setup ## make verify LAB=101 [TIER=cpu]: run one lab headless at its tier
	@$(BIN)/python -m lablib verify $(or $(LAB),$(error say which: make verify LAB=101)) $(if $(TIER),--tier $(TIER))

coverage: setup ## write the README's table from data/results
	@$(BIN)/python -m lablib coverage

doctor: setup ## what this machine can run
	@$(BIN)/python -m lablib doctor

bench: setup ## time kernels, training and labs
	@$(BIN)/python -m lablib bench

checkpoints: setup ## train tiny-1m and tiny-4m again (one to two hours on two cores)
	@$(BIN)/python -m lablib.training.checkpoints tiny-1m tiny-4m

wheel: setup ## build the wheel, data included
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/dist .

clean: ## remove what was built; the cache of corpora and models stays
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis
