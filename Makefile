# Every verb sets up what it needs: a Python >= 3.10 and make are enough.
#   make demo          train GraNet .5 -> .9 on the embedded digits, in about a minute
#   make test          lint, types and tests, in a virtual environment of its own
#   make test-oldest   the tests on the oldest supported torch  (PYTHON_OLDEST, default python3.10)
#   make test-newest   the tests on the newest torch            (PYTHON_NEWEST, default python3.13)

PYTHON ?= python3
PYTHON_OLDEST ?= python3.10
PYTHON_NEWEST ?= python3.13
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

.PHONY: demo test pytest lint type format bench bench-gpu test-oldest test-newest clean

demo: $(VENV)/.installed
	$(BIN)/granet train

test: lint type pytest

pytest: $(VENV)/.installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: $(VENV)/.installed
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed
	$(BIN)/python -m pytest bench --benchmark-only $(PYTEST_ARGS)

bench-gpu:
	PYTHON=$(PYTHON) bench/gpu.sh

$(VENV)/.installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "granet needs Python >= 3.10, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest $(PYTEST_ARGS)

.venv-oldest/.installed: pyproject.toml setup.py
	$(PYTHON_OLDEST) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet 'torch==2.6.0' 'torchvision==0.21.0' 'numpy<2.4' --editable '.[test]'
	@touch $@

test-newest: .venv-newest/.installed
	.venv-newest/bin/python -m pytest $(PYTEST_ARGS)

.venv-newest/.installed: pyproject.toml setup.py
	$(PYTHON_NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade torch torchvision --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist *.egg-info kernels/*.egg-info .mypy_cache .ruff_cache .hypothesis
