# Two commands do nearly everything: `make lab` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
JOBS ?= 2
VERSION := import sys; print("%d.%d" % sys.version_info[:2])
PYVER := $(shell $(PYTHON) -c '$(VERSION)')
READY := $(VENV)/ready-$(PYVER)
COURSE_ENV := build/course-env
HUB_ENV := build/hub-env
SITE_ENV := build/site-env
COMMA := ,
# $(call install,EXTRAS): a few minutes the first time.
install = set -o pipefail; echo "installing packages into $(VENV)"; \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(1)]' \
	| awk '/^(Collecting|Building|Installing|Successfully)/ {print "  " $$1 " " $$2; fflush()}'

# $(call on-top,FOLDER,EXTRA): an environment that has .venv's packages below its own.
on-top = set -e; echo "installing the extra $(2) into $(1)"; $(BIN)/python -m venv --clear $(1); \
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"; \
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(2)]'

.PHONY: help setup test-setup lab test lint unit labs test-browser test-binder test-colab test-course course hub test-hub hub-figures site test-site frames verify study coverage bench doctor checkpoints wheel clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(READY) ## virtual environment, packages, corpora and pretrained models
	@$(BIN)/python -m lablib setup

# What a reader needs, and nothing that compiles. The stamp is written last, so an interrupted
# installation is taken up again; its name has Python's version, so another Python starts anew.
$(READY): pyproject.toml constraints.txt
	@if test -x $(BIN)/python && test "$$($(BIN)/python -c '$(VERSION)')" != "$(PYVER)"; then \
		echo "$(VENV) has another Python than $(PYTHON), which is $(PYVER): it is made anew"; rm -rf $(VENV); fi
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(call install,lab)
	@touch $@

$(READY)-test: $(READY)
	@$(call install,lab$(COMMA)test$(COMMA)browser)
	@touch $@

lab: setup ## set everything up and open JupyterLab at the start page
	@$(BIN)/python -m lablib.lab.open

test: lint unit labs ## everything that tests can tell: ruff, unit tests, every lab at the smoke tier

test-setup: setup $(READY)-test

lint: test-setup
	@$(BIN)/ruff format --check . && $(BIN)/ruff check .

unit: test-setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadscope -q tests -m "not browser and not course and not hub and not binder and not colab and not site"

labs: test-setup
	@LABLIB_TIER=smoke LABLIB_STATIC=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadscope -q \
		--nbval-lax --nbval-cell-timeout=300 labs

test-browser: test-setup ## drive JupyterLab in headless Chromium; ALL=1 through every lab; screenshots under build/
	@$(BIN)/python -m pytest -n 2 --dist load --maxschedchunk 1 -q tests/browser -m browser

test-binder: test-setup ## the steps of Binder's image in a new environment; its size, and minutes to build
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -s tests/binder -m binder

# Colab's packages, with nothing of ours: tests/colab/versions.txt says how each version is known.
COLAB_ENV := build/colab-env
COLAB_PYTHON ?= $(or $(shell for at in python3.13 ~/.pyenv/versions/3.13.*/bin/python3.13; do \
	$$at -V >/dev/null 2>&1 && echo $$at && break; done),$(PYTHON))
$(COLAB_ENV)/ready: tests/colab/versions.txt
	@echo "installing Colab's packages into $(COLAB_ENV), with torch's CUDA build (6 GB)"
	@$(COLAB_PYTHON) -m venv --clear $(COLAB_ENV)
	@$(COLAB_ENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

SPACE := $(subst ,, )
test-colab: test-setup $(COLAB_ENV)/ready ## every lab with Colab's packages; LABS="302 701" only these
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist load --maxschedchunk 1 -q tests/colab -m colab \
		$(if $(LABS),-k "$(subst $(SPACE), or ,$(LABS))")

# nbgrader lies in an environment of its own, on top of the one that the other tests run in.
$(COURSE_ENV)/ready-$(PYVER): pyproject.toml constraints.txt | $(READY)
	@$(call on-top,$(COURSE_ENV),grading)
	@touch $@

test-course: test-setup $(COURSE_ENV)/ready-$(PYVER) ## grade submissions, honest ones and cheats, with nbgrader
	@OMP_NUM_THREADS=1 JUPYTER_PATH=$(CURDIR)/$(VENV)/share/jupyter \
		$(COURSE_ENV)/bin/python -m pytest -q tests/course -m course

$(READY)-grading: $(READY)
	@$(call install,lab$(COMMA)grading)
	@touch $@

course: setup $(READY)-grading ## make course LABS="302 701" or THEMES=experts [COURSE=build/course]: an nbgrader course
	@$(BIN)/python -m lablib course $(if $(LABS),--labs $(LABS)) $(if $(THEMES),--themes $(THEMES)) \
		--to $(or $(COURSE),build/course)

# JupyterHub likewise, with the proxy that it needs (npm comes with Node.js).
$(HUB_ENV)/ready-$(PYVER): pyproject.toml constraints.txt | $(READY)
	@command -v npm >/dev/null || { echo "JupyterHub's proxy needs Node.js: install nodejs and npm"; exit 1; }
	@$(call on-top,$(HUB_ENV),jupyterhub)
	@npm install --silent --no-audit --no-fund --prefix build/chp configurable-http-proxy@5.3.0
	@touch $@

hub: setup $(HUB_ENV)/ready-$(PYVER) ## a JupyterHub with the labs on this machine, PORT=8000; binder/README.md
	@exec $(HUB_ENV)/bin/python -m lablib.hub --port $(or $(PORT),8000)

test-hub: test-setup $(HUB_ENV)/ready-$(PYVER) ## a class of eight on a JupyterHub, each running a lab
	@OMP_NUM_THREADS=1 $(HUB_ENV)/bin/python -m pytest -q tests/hub -m hub

hub-figures: test-setup $(HUB_ENV)/ready-$(PYVER) ## measure the hub: memory and waiting times, into binder/README.md
	@$(HUB_ENV)/bin/python -m lablib.hub.figures

# Sphinx likewise; it needs Python 3.11 or later.
$(SITE_ENV)/ready-$(PYVER): pyproject.toml constraints.txt | $(READY)
	@$(call on-top,$(SITE_ENV),site)
	@touch $@

site: $(READY) $(SITE_ENV)/ready-$(PYVER) ## all labs as a static site in build/site; its last line says how long it took
	@OMP_NUM_THREADS=1 $(SITE_ENV)/bin/python -m lablib.site --to build/site

test-site: test-setup $(SITE_ENV)/ready-$(PYVER) ## build the site anew; read it in headless Chromium, and with axe-core (npm)
	@command -v npm >/dev/null || { echo "axe-core comes with npm: install nodejs and npm"; exit 1; }
	@test -e build/axe/node_modules/axe-core/axe.min.js || \
		npm install --silent --no-audit --no-fund --prefix build/axe axe-core@4.14.1
	@OMP_NUM_THREADS=1 $(SITE_ENV)/bin/python -m pytest -q tests/site -m site

frames: setup ## make frames LAB="302 405": store what their sliders show, for the site
	@$(BIN)/python -m lablib frames $(or $(LAB),$(error say which: make frames LAB=302))

verify: setup ## make verify LAB=101 [TIER=cpu]: run one lab headless at its tier
	@$(BIN)/python -m lablib verify $(or $(LAB),$(error say which: make verify LAB=101)) $(if $(TIER),--tier $(TIER))

study: setup ## make study LAB=302: the runs of a paper's study that are missing
	@$(BIN)/python -m lablib study $(or $(LAB),$(error say which: make study LAB=302))

coverage: setup ## write the tables of what was measured
	@$(BIN)/python -m lablib coverage

doctor: setup ## what this machine can run
	@$(BIN)/python -m lablib doctor

bench: setup ## time kernels, training, encoding and labs
	@$(BIN)/python -m lablib bench

checkpoints: setup ## train tiny-1m, tiny-2m and tiny-4m again (two hours on two cores)
	@$(BIN)/python -m lablib.training.checkpoints tiny-1m tiny-2m tiny-4m

wheel: setup ## build the wheel, data included
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/dist .

clean: ## remove what was built; the cache of corpora and models stays
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis
