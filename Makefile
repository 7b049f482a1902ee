# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0

PYTHON ?= python3
# Where to get torch from, if not from pip's own index: https://download.pytorch.org/whl/cpu, for instance.
TORCH_INDEX_URL ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Threads that wait for each other sleep instead of spinning: halves the time where other work shares the cores.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-long style bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\): .*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "make %-9s  %s\n", $$1, $$2 }'

venv: $(STAMP)  ## make .venv with the pinned packages, unless it is there

# torch by itself and first, so that the index it comes from has no say in the rest.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "Making $(VENV) ..."; $(PYTHON) -m venv $(VENV); }
	@echo "Installing torch into $(VENV) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
		$(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $$(grep '^torch==' constraints.txt)
	@echo "Installing the pinned packages into $(VENV) (a few minutes, once) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[eval,dev,ray]'
	@touch $@

demo: $(STAMP)  ## compare full cache, eviction, merging and re-fitting on a real model: about 3 minutes on 2 cores
	@$(BIN)/python -m evaluation demo

test: $(STAMP)  ## run the tests, those on the real model included
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-long: $(STAMP)  ## run the tests that take long: an exception at every call, a thousand prefills
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m long

style: $(STAMP)  ## check the code: ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(STAMP)  ## time our kernels against kvpress's own
	@$(BIN)/python -m evaluation speed

clean:  ## remove .venv and caches; results/ stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
