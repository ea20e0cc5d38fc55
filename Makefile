# The two commands of the README are `make bench` and `make test`. Both make .venv and build the
# extension where that is still to do. `make help` lists the rest.
#
#   TORCH=...     what pip installs as torch (a requirement or a wheel file)
#   PYTHON3=...   the Python that makes .venv (3.10 or newer)
#   PYTEST_ARGS=, BENCH_ARGS=   passed on

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON3 ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
PIP := $(PYTHON) -m pip --disable-pip-version-check
PINNED := $(PIP) install --quiet --constraint requirements/constraints.txt
CPU_INDEX := https://download.pytorch.org/whl/cpu

GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
ifeq ($(GPU),yes)
DEFAULT_TORCH := torch==2.13.0
else
DEFAULT_TORCH := torch==2.13.0+cpu
export RESOPS_CUDA ?= 0
endif
# A torch that was asked for by name replaces another one; without a wish, the one there stays.
ifneq ($(TORCH),)
ifneq ($(TORCH),$(shell cat $(STAMPS)/torch 2>/dev/null))
.PHONY: $(STAMPS)/torch
endif
endif
export RESOPS_NATIVE := 1

.PHONY: help bench test build lint lint-python lint-types lint-cpp sanitize mutation clean

help:
	@echo "make bench      compare resops with PyTorch on this machine (README)"
	@echo "make test       all tests but the slow ones (README)"
	@echo "make build      the environment and the extension only"
	@echo "make lint       ruff, mypy and clang-format, as CI runs them"
	@echo "make sanitize   the C++ kernels under AddressSanitizer and UBSan"
	@echo "make mutation   planted bugs, each of which a test must catch"
	@echo "make clean      remove what was built; the environment stays (rm -r .venv)"

bench: build
	@$(PYTHON) -m bench $(BENCH_ARGS)

test: build
	@$(PYTHON) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile $(PYTEST_ARGS)

build: $(STAMPS)/installed

lint: lint-python lint-types lint-cpp

lint-python: build
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# mypy reads the packages in the shape in which they are installed, so that it knows the folder
# triton_kernels/ as resops.triton_kernels.
lint-types: build
	$(PYTHON) setup.py --quiet build_py --build-lib build/typed
	$(VENV)/bin/mypy

lint-cpp: build
	$(VENV)/bin/clang-format --dry-run -Werror \
	  $$(find csrc tests bench -name "*.c" -o -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh")

sanitize: build
	$(PYTHON) tests/lanes/sanitize.py

mutation: build
	$(PYTHON) tests/lanes/mutation.py

clean:
	rm -rf build *.egg-info resops/_C*.so $(STAMPS)/native $(STAMPS)/installed

# ---- the environment, one stamp per step ----------------------------------------------------------

define say_missing
{ echo "resops: $(1); on Debian: apt-get install $(2)" >&2; exit 1; }
endef

$(STAMPS)/venv:
	@command -v $(PYTHON3) >/dev/null || $(call say_missing,$(PYTHON3) was not found,python3 python3-venv)
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "resops: $(PYTHON3) is older than Python 3.10; name a newer one: make PYTHON3=..." >&2; exit 1; }
	@$(PYTHON3) -c 'import ensurepip, venv' 2>/dev/null \
	  || $(call say_missing,Python's venv module is missing,python3-venv)
	@$(PYTHON3) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' \
	  || $(call say_missing,Python's header files are missing,python3-dev)
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null \
	  || $(call say_missing,a C++ compiler is missing,g++)
	@echo "resops: making the environment $(VENV)"
	@$(PYTHON3) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	@touch $@

$(STAMPS)/torch: | $(STAMPS)/venv
	@spec='$(or $(TORCH),$(DEFAULT_TORCH))'; \
	echo "resops: installing $$spec"; \
	$(PINNED) "$$spec" 2>$(STAMPS)/torch.log || { \
	  echo "resops: the package index has no $$spec; trying $(CPU_INDEX)"; \
	  $(PIP) install --quiet --no-deps --index-url $(CPU_INDEX) "$$spec" \
	    || { cat $(STAMPS)/torch.log >&2; \
	         echo "resops: torch could not be installed; TORCH=<requirement or wheel> names another" >&2; \
	         exit 1; }; \
	  $(PINNED) "$$spec"; }; \
	echo "$$spec" > $@

$(STAMPS)/packages: $(STAMPS)/torch $(wildcard requirements/*.txt)
	@echo "resops: installing the packages of requirements/"
	@$(PINNED) --requirement requirements/environment.txt
	@$(PYTHON) -c 'import importlib.util as u; raise SystemExit(u.find_spec("triton") is None)' \
	  || $(PIP) install --quiet --requirement requirements/triton.txt
	@$(PIP) install --quiet --no-deps --requirement requirements/models.txt
	@touch $@

# pip hides a build's progress and its summary: so the build runs here first, in sight, and pip finds
# it done.
$(STAMPS)/native: $(STAMPS)/packages setup.py CMakeLists.txt $(shell find csrc)
	@echo "resops: compiling the extension"
	@$(PYTHON) setup.py --quiet build_ext --inplace
	@touch $@

$(STAMPS)/installed: $(STAMPS)/native pyproject.toml resops/_version.py
	@echo "resops: installing resops into $(VENV)"
	@$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@touch $@
