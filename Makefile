# make demo and make test work from a fresh clone: they make .venv, install the versions pinned in
# constraints.txt, build the extension, and then do their job. Set-up is skipped until its inputs
# change. pip reads its usual variables: PIP_EXTRA_INDEX_URL=... make demo takes a CPU-only torch,
# which is far smaller, from an index that has one.

SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
ifeq ($(origin CXX),default)
CXX := c++
endif
export CXX
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := .venv/bin
STAMP := .venv/.installed
NATIVE := $(shell find csrc -type f)
RUN := runs/quickstart

# PATH lets the build find the ninja inside .venv.
PIP := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -c constraints.txt
# Of pip's many lines, large downloads, builds and installs; what goes wrong is on its other stream.
BRIEFLY := | sed -u -n -E -e 's/^(.{96}).*/\1 .../' -e '/^ *(Downloading .* [MG]B\)|Building|Installing)/p'

FAULT = $(shell PYTHON='$(PYTHON)' CXX='$(CXX)' sh scripts/check_toolchain.sh)

.PHONY: help demo setup test lint format clean

help:  ## show this list
	@sed -n -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 16
	@echo
	@echo "  PYTHON=python3.11 and CXX=g++-13 choose the Python that makes .venv and the compiler."

demo: $(STAMP)  ## distil a small model on digits, export it to ONNX, predict held-out images
	@echo "== demo 1/3: train (m2mkd train quickstart)"
	$(BIN)/m2mkd train quickstart --out $(RUN)
	@echo "== demo 2/3: export to ONNX"
	$(BIN)/m2mkd export $(RUN) -o $(RUN)/model.onnx --target cpu
	@echo "== demo 3/3: predict held-out images with ONNX Runtime"
	$(BIN)/m2mkd predict $(RUN)/model.onnx $(RUN)/samples

setup: $(STAMP)  ## make .venv and build the extension, if anything changed

# A broken or half-made .venv (no working pip) is made anew.
$(STAMP): pyproject.toml constraints.txt setup.py $(NATIVE)
	$(if $(FAULT),$(error $(FAULT)))
	@echo "== set-up 1/3: .venv"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	@$(PIP) -q --upgrade pip
	@echo "== set-up 2/3: PyTorch and the build tools (several GB the first time)"
	@$(PIP) setuptools wheel ninja pybind11 torch torchvision $(BRIEFLY)
	@echo "== set-up 3/3: the other packages, and m2mkd with its compiled extension"
	@PYTHONWARNINGS='ignore:Editable installation' $(PIP) --no-build-isolation -e '.[dev]' $(BRIEFLY)
	@touch $@

test: $(STAMP)  ## run the whole test suite
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

lint: $(STAMP)  ## check style, types and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests/csrc -regex '.*\.\(cpp\|h\|cu\|cuh\)' -exec $(BIN)/clang-format --dry-run -Werror {} +

format: $(STAMP)  ## rewrite Python and C++ files in the house format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	find csrc tests/csrc -regex '.*\.\(cpp\|h\|cu\|cuh\)' -exec $(BIN)/clang-format -i {} +

clean:  ## remove .venv, builds and caches; runs/ stays
	rm -rf .venv build dist *.egg-info m2mkd/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
