# SPDX-FileCopyrightText: Copyright (c) 2026 the kvpress-merging authors
# SPDX-License-Identifier: Apache-2.0

PYTHON ?= python3
# Where to get torch from, if not from pip's own index: https://download.pytorch.org/whl/cpu, for instance.
TORCH_INDEX_URL ?=
# Those of the environments of test-lowest and test-latest: the oldest and the newest that were tested, if they are there.
LOWEST_PYTHON ?= $(or $(shell python3.10 -c "print(\"python3.10\")" 2>/dev/null),$(PYTHON))
LATEST_PYTHON ?= $(or $(shell python3.12 -c "print(\"python3.12\")" 2>/dev/null),$(PYTHON))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Threads that wait for each other sleep instead of spinning: halves the time where other work shares the cores.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-long test-lowest test-latest coverage mutation style docs bench gpu package-check clean

# The seed of the cases that `make test-long` draws.
SEED ?= 0
# Flags of `make gpu`, if not the defaults: --quick to rehearse on a CPU, for instance.
GPU_FLAGS ?=
# Which mutants `make mutation` tries, if not all: kvpress_merging.kernels.nearby.*, for instance.
MUTANTS ?=
RUN_TESTS := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
PYTEST := -m pytest -n 2 --dist worksteal --tb=short

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\): .*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "make %-13s  %s\n", $$1, $$2 }'

venv: $(STAMP)  ## make .venv with the pinned packages, unless it is there

# torch by itself and first, so that the index it comes from has no say in the rest.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "Making $(VENV) ..."; $(PYTHON) -m venv $(VENV); }
	@echo "Installing torch into $(VENV) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
		$(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $$(grep '^torch==' constraints.txt)
	@echo "Installing the pinned packages into $(VENV) (a few minutes, once) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[eval,dev,docs,ray]'
	@touch $@

demo: $(STAMP)  ## compare full cache, eviction, merging and matching on a real model: about 3 minutes on 2 idle cores
	@$(BIN)/python -m evaluation demo

test: $(STAMP)  ## run the tests, those on the real model included
	@$(RUN_TESTS) $(BIN)/python $(PYTEST)

test-long: $(STAMP)  ## run what takes long: thousands of drawn cases, an exception at every call, a thousand prefills
	@$(RUN_TESTS) $(BIN)/python $(PYTEST) --hypothesis-profile=long --hypothesis-seed=$(SEED) \
		tests/kernels/test_kernel_properties.py tests/test_properties.py
	@$(RUN_TESTS) $(BIN)/python $(PYTEST) -m long

test-lowest: .venv-lowest/.installed  ## run the tests with the oldest packages that pyproject.toml allows: gigabytes
	@$(RUN_TESTS) .venv-lowest/bin/python $(PYTEST)

test-latest: .venv-latest/.installed  ## run the tests with the newest packages that pyproject.toml allows: gigabytes
	@$(RUN_TESTS) .venv-latest/bin/python $(PYTEST)

.venv-lowest/.installed: pyproject.toml constraints-lowest.txt
	$(call install,.venv-lowest,$(LOWEST_PYTHON),$$(grep '^torch==' constraints-lowest.txt),-c constraints-lowest.txt)

.venv-latest/.installed: pyproject.toml
	$(call install,.venv-latest,$(LATEST_PYTHON),'torch<3',--upgrade --upgrade-strategy eager)

# An environment of its own: this Python, torch by itself and first, then the rest.
define install
@test -x $(1)/bin/python || $(2) -m venv $(1)
@echo "Installing into $(1) (some minutes and gigabytes, once) ..."
@$(1)/bin/python -m pip install -qq --disable-pip-version-check \
	$(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) $(3)
@$(1)/bin/python -m pip install -qq --disable-pip-version-check $(4) -e '.[eval,dev,docs,ray]'
@$(1)/bin/python -m pip freeze --disable-pip-version-check | grep -E '^(torch|transformers|kvpress|datasets|pandas|numpy)=='
@touch $@
endef

coverage: $(VENV)/.trust  ## measure which lines and branches of src/ the tests run
	@$(RUN_TESTS) $(BIN)/python $(PYTEST) --cov --cov-report=
	@mkdir -p evaluation/results/trust
	@{ printf '# Coverage\n\n`make coverage`: the lines and branches of `src/` that the tests run, and those that they miss: '; \
		printf 'abstract methods, and what runs on a GPU or in a process of its own.\n\n'; \
		$(BIN)/coverage report --format=markdown; } > evaluation/results/trust/coverage.md; \
		status=$$?; cat evaluation/results/trust/coverage.md; exit $$status

mutation: $(VENV)/.trust  ## break the kernels wherever mutmut can, one place at a time, and list what no test notices: hours
	@$(RUN_TESTS) $(BIN)/mutmut run --max-children 2 $(MUTANTS)
	@$(BIN)/mutmut results

$(VENV)/.trust: $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[trust]'
	@touch $@

style: $(STAMP)  ## check the code: ruff, mypy, and the public types with mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy --strict --config-file tests/typing/mypy.ini tests/typing

docs: $(STAMP)  ## write the API reference of the docstrings to api/
	@$(BIN)/python -W 'ignore:Error parsing type annotation BasePress' -m pdoc -d numpy -o api kvpress_merging \
		kvpress_merging.registry kvpress_merging.kernels.blend kvpress_merging.kernels.match \
		kvpress_merging.kernels.nearest kvpress_merging.kernels.nearby
	@echo "Written to api/: open api/kvpress_merging.html"

package-check:  ## build sdist and wheel, install each in a fresh environment, and merge with it: a few minutes
	@PYTHON="$(PYTHON)" TORCH_INDEX_URL="$(TORCH_INDEX_URL)" .ci/package-check

bench: $(STAMP)  ## time our kernels against kvpress's own: some minutes, and 9 GB of memory
	@$(BIN)/python -m evaluation speed

# No .venv: a machine with a GPU has its own torch. It needs transformers and kvpress beside that, and nothing of ours.
gpu:  ## check the kernels on a GPU and measure what they cost there, in 10 minutes, by PYTHON=python3 as it is
	@HF_HUB_OFFLINE=1 PYTHONPATH=$${PYTHONPATH:+$$PYTHONPATH:}src:. $(PYTHON) -m evaluation gpu $(GPU_FLAGS)

clean:  ## remove .venv, api/ and caches; results/ stays
	rm -rf $(VENV) .venv-lowest .venv-latest .coverage build dist api mutants .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
