# Everything a checkout needs: python3 and make. The first target that needs packages makes .venv and installs them there once.
#
#   make demo    train on real images with 2 workers, kill one of them, and print what that cost and the accuracy
#   make test    the test suite
#   make check   in under a minute: lint, types, and the tests that start no processes
#   make fast    the tests that take no more than ten seconds each
#   make repeat  one test, TIMES times in a row: make repeat TEST=tests/test_cleanup.py TIMES=20
#   make torches the fast tests and those of the launcher with the oldest torch and the newest, each in an environment of its own
#   make lint    ruff and mypy
#   make soak    the long tests
#   make bench   the benchmarks
#   make docs    the manual as HTML, in docs/_build/html
#   make clean   remove what the other targets made
#
# pip is used as it is configured on the machine: where it is set up to find a CPU-only build of torch, that one is installed.
# DEMO_ARGS, TEST_ARGS and BENCH_ARGS are handed on: make test TEST_ARGS="-k sampler".
# TORCHES says which versions of torch: make torches TORCHES="2.6 2.7 2.8 newest" has all those where the code asks for a feature.

PYTHON ?= python3
VENV ?= .venv
TEST_PROCESSES ?= 2
TIMES ?= 20
TORCHES ?= 2.6 newest
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed.stamp
DOCS_INSTALLED := $(VENV)/installed-docs.stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check fast repeat torches lint soak bench docs clean
.PRECIOUS: $(VENV)-torch-%/installed.stamp  # long to make

help:
	@sed -n 's/^#   //p' Makefile

demo: $(INSTALLED)
	$(BIN)/python examples/cifar10/train.py --num-workers 2 --kill 1 $(DEMO_ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) $(TEST_ARGS)

check: lint
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) -m "pure and not slow and not soak" $(TEST_ARGS)

fast: $(INSTALLED)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) -m "not slow and not soak and not kernel" $(TEST_ARGS)

repeat: $(INSTALLED)
	@test -n "$(TEST)" || { echo 'which test? make repeat TEST=tests/test_cleanup.py::test_name' >&2; exit 2; }
	@for time in $$(seq $(TIMES)); do echo "$$time of $(TIMES)"; $(BIN)/python -m pytest -q -x $(TEST) $(TEST_ARGS) || exit 1; done

torches: $(TORCHES:%=torch-%)

torch-%: $(VENV)-torch-%/installed.stamp
	$(VENV)-torch-$*/bin/python -c 'import torch; print("torch", torch.__version__)'
	$(VENV)-torch-$*/bin/python -m pytest -n $(TEST_PROCESSES) -m "not slow and not soak and not kernel" $(TEST_ARGS)
	$(VENV)-torch-$*/bin/python -m pytest -n $(TEST_PROCESSES) -m "slow and not soak" tests/test_launch_*.py tests/test_spmd*.py $(TEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

soak: $(INSTALLED)
	$(BIN)/python -m pytest -m soak --timeout 3600 $(TEST_ARGS)

bench: $(INSTALLED)
	$(BIN)/python benchmarks/all.py $(BENCH_ARGS)

docs: $(DOCS_INSTALLED)
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) $(VENV)-torch-* docs/_build build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(PIP) install --editable '.[test]'
	@touch $@

$(DOCS_INSTALLED): pyproject.toml $(INSTALLED)
	$(PIP) install --editable '.[docs]'
	@touch $@

$(VENV)-torch-%/installed.stamp: pyproject.toml
	$(call new_environment,$(VENV)-torch-$*)
	$(VENV)-torch-$*/bin/python -m pip --disable-pip-version-check install "torch$(if $(filter newest,$*),,==$*.*)" --editable '.[test]'
	@touch $@

$(BIN)/python:
	$(call new_environment,$(VENV))

# Some distributions ship Python without ensurepip; virtualenv brings its own pip.
define new_environment
	@$(PYTHON) -c 'import sys; sys.exit("torchtrainer needs Python 3.10 or newer, got " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.10") if sys.version_info < (3, 10) else None'
	@if $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then $(PYTHON) -m venv $(1); \
	elif $(PYTHON) -c 'import virtualenv' 2>/dev/null; then $(PYTHON) -m virtualenv $(1); \
	elif command -v virtualenv >/dev/null; then virtualenv --python $(PYTHON) $(1); \
	else echo "$(PYTHON) has neither ensurepip nor virtualenv: install one of them (on Debian and Ubuntu: python3-venv)" >&2; exit 1; fi
endef
