# Everything runs in .venv, which is made on first use from pyproject.toml and constraints.txt.
# Needed on the machine: make, bash, Python >= 3.10 with venv (PYTHON=python3.12 picks another), and for compiled steps
# on a CPU a C++ compiler.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python -m
READY := $(VENV)/.ready
PARITY ?= .venv-parity
AUDIT ?= .venv-audit
# More options for a target's program: make train ARGS="--steps 200 --data my_texts"
ARGS ?=
# What is known of the tested versions, each with the reason why it does not reach trainkit.
KNOWN := $(shell sed -n 's/^| \(CVE-[0-9-]*\) .*/\1/p' docs/advisories.md)
BENCHMARKS ?= $(filter-out benchmarks.__init__,$(subst /,.,$(basename $(shell grep -l '^if __name__ ==' benchmarks/*.py))))

# $(call install,environment,constraints)
define install
@echo "Installing into $(1); the first time this downloads torch and takes some minutes."
@$(PYTHON) -m venv $(1)
@$(1)/bin/python -m pip install --disable-pip-version-check --no-input -c $(2) -e '.[test]' \
	| grep --line-buffered -E '^ *(Downloading|Installing|Building|Successfully)'
endef

.PHONY: help train test test-all parity crash-test bench lint types docs audit clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 12

train: $(READY) ## train the first recipe; the run folder is runs/pretrain_lm
	$(RUN) recipes.pretrain_lm $(ARGS)

test: $(READY) ## the test suite, doctests included: minutes
	$(RUN) pytest -q $(ARGS)

test-all: $(READY) ## the slow tests as well
	$(RUN) pytest -q -m 'not gpu' $(ARGS)

parity: $(PARITY)/.ready ## the Trainer beside that of transformers 4.57.1, in an environment of its own
	$(PARITY)/bin/python -m pytest -q tests/trainer/test_parity.py $(ARGS)

crash-test: $(READY) ## kill runs at random moments and file calls, resume them, compare bit for bit; ARGS="--kills 1000 --killops 1000 --seed 0"
	$(RUN) tests.faults.crash $(ARGS)

bench: $(READY) ## all measurements in benchmarks/; BENCHMARKS=benchmarks.import_time picks one
	@for benchmark in $(BENCHMARKS); do echo "== $$benchmark"; $(RUN) $$benchmark $(ARGS); done

lint: $(READY) ## style
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(READY) ## static types
	$(RUN) mypy

docs: $(READY) ## examples in docstrings, Python blocks and links in Markdown
	$(RUN) pytest -q tests/docs trainkit recipes

audit: $(AUDIT)/.ready ## vulnerabilities of the versions in constraints.txt that docs/advisories.md does not name; needs a network
	@# Without --strict, versions that the service does not know would pass.
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt \
		$(KNOWN:%=--ignore-vuln %) $(ARGS)

clean: ## remove what was installed and cached; runs/ stays
	rm -rf $(VENV) $(PARITY) $(AUDIT) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)
	@touch $@

$(PARITY)/.ready: pyproject.toml constraints-parity.txt
	$(call install,$(PARITY),constraints-parity.txt)
	@touch $@

$(AUDIT)/.ready:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --disable-pip-version-check --no-input --quiet pip-audit
	@touch $@
