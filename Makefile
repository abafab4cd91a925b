# Every command of the project. Installs go into .venv, with the versions of constraints.txt, when a target needs them.
PYTHON ?= python3
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
# --no-compile: Python compiles what is imported, which is a small part of what is installed, and is to keep that, whatever
# it is told elsewhere: the tests start many processes, and to compile torch takes each of them seconds
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(RUN) -m pip install --quiet --no-compile --constraint constraints.txt
EVERYTHING := $(VENV)/extra-test,check,bench,examples,plot,wheel
NATIVE_SOURCES := setup.py $(shell find csrc)
# g++ 12 sees uninitialized values in its own AVX-512 header
WARNINGS := -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized
# nvcc takes minutes: without a GPU the tests compile the CUDA library by themselves, once, and nothing else needs it
export FASTPCGRAD_BUILD ?= $(if $(shell command -v nvidia-smi),auto,cpu)
# The tests of a file stay together: some share what is slow to set up, such as processes or a compiled library. Files
# come in the order of tests/conftest.py, the longest first, so that no process ends long after the others.
PYTEST := $(RUN) -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# What a change of the algorithms breaks first: no peers, no compilers, no other processes.
CORE := $(addprefix tests/,ops reference methods optimizer surgery test_autograd.py test_checks.py test_functional.py test_merging.py \
	test_small_round.py test_task_gradients.py test_variants.py)
CLANG_FORMAT := find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # two installs into one environment would collide
.PHONY: help venv demo test test-slow test-all test-core check format docs wheel bench plot gpu nccl clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(EVERYTHING) $(VENV)/extra-docs $(VENV)/native ## install into .venv what all other targets need

demo: $(VENV)/extra-examples $(VENV)/native ## where gradient surgery helps, where it does not, and what a step costs
	$(RUN) -m fastpcgrad demo $(ARGS)

test: $(EVERYTHING) $(VENV)/native ## run the tests that need no GPU, but the slow ones
	$(PYTEST) -m 'not slow' $(ARGS)

test-slow: $(EVERYTHING) $(VENV)/native ## run the slow tests: compilers, packages, small memory
	$(PYTEST) -m slow $(ARGS)

test-all: $(EVERYTHING) $(VENV)/native ## run both at once, which is faster than one after the other
	$(PYTEST) $(ARGS)

test-core: $(VENV)/extra-test-core $(VENV)/native ## in two minutes, with torch and pytest alone: ops, methods, surgery
	$(PYTEST) -m 'not slow' $(CORE) $(ARGS)

check: $(EVERYTHING) ## lint, formatting and types
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror

format: $(EVERYTHING) ## rewrite the sources as check wants them
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format
	$(CLANG_FORMAT) -i

docs: $(VENV)/extra-docs ## build the site into build/site, strictly
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet $(ARGS)

wheel: $(VENV)/extra-test-core,wheel ## build sdist and manylinux wheel with both libraries into dist, and test it; needs nvcc, takes minutes
	rm -rf dist
	FASTPCGRAD_BUILD=cuda .ci/wheel $(RUN) dist
	FASTPCGRAD_WHEEL=$$(ls dist/*manylinux*.whl) $(PYTEST) tests/test_wheel.py $(ARGS)

bench: $(EVERYTHING) $(VENV)/native ## measure, after the tests have passed
	@$(MAKE) --no-print-directory test-all ARGS= || { echo "Red tests mean no numbers." >&2; exit 1; }
	$(RUN) -m benchmarks.run $(ARGS)

plot: $(EVERYTHING) ## draw the benchmark results
	$(RUN) -m benchmarks.plot $(ARGS)

gpu: ## on a machine with a GPU, in 15 minutes: build, test, measure, tune into OUT; PARTS="tests figures": these alone
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
		|| { echo "make gpu: no torch in $(PYTHON) that finds a CUDA device here." >&2; exit 1; }
	$(PYTHON) -m benchmarks.gpu_plan $(PARTS) $(ARGS)

nccl: ## test surgery over several processes on the GPUs of this machine, one a process; needs torch, pytest alone
	FASTPCGRAD_TEST_DEVICE=cuda PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(PYTHON) -m pytest -q tests/distributed $(ARGS)

clean: ## remove what was built and installed
	rm -rf $(VENV) build dist *.egg-info fastpcgrad/*.so fastpcgrad/*.missing
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/created: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools
	touch $@

# By itself, so that a changed C++ file costs a compilation and no install.
$(VENV)/native: $(VENV)/created $(NATIVE_SOURCES)
	CXXFLAGS="$(WARNINGS) $$CXXFLAGS" $(RUN) setup.py --quiet build_ext --inplace
	touch $@

# The editable build finds the library in place and takes it as it is.
$(VENV)/extra-%: $(VENV)/created pyproject.toml | $(VENV)/native
	$(INSTALL) --no-build-isolation --editable '.[$*]'
	touch $@
