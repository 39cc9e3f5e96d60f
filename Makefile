# Each target sets up what it needs in .venv, with uv if it is there, else with venv and pip.
#
#   make demo            ask the shipped model about a picture
#   make test            run the tests
#   make test-reference  the same with PyTorch and transformers, which turns on the live comparison
#   make lint            ruff and mypy
#   make bench           time the reference engine on this machine
#   make wheel           build dist/*.whl
#   make clean           remove what the targets made

VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
ARGS ?=

# The first Python on this machine that fits; uv can fetch one where there is none.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	2>/dev/null && echo $$python && break; done)
UV := $(shell command -v uv 2>/dev/null)

ifneq ($(UV),)
CREATE = uv venv --quiet --python '$(or $(PYTHON),>=3.10,<3.14)' $(VENV)
INSTALL = uv pip install --quiet --python $(BIN)/python
WHEEL = uv build --quiet --wheel --out-dir dist .
else
CREATE = $(if $(PYTHON),$(PYTHON) -m venv $(VENV),$(error Python 3.10 to 3.13 is needed: install one or set PYTHON=))
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
WHEEL = $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
endif

# Two targets at once would install into the same environment.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: demo test test-reference lint bench wheel clean

demo: $(VENV)/.installed
	$(BIN)/edgevl chat tiny -q "What number is on the display?" -i examples/meter.png

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

test-reference: $(VENV)/.reference
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/engine.py $(ARGS)

wheel: $(VENV)/.installed
	rm -rf dist
	$(WHEEL)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.created:
	rm -rf $(VENV)
	$(CREATE)
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(INSTALL) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml
	$(INSTALL) --editable '.[dev]'
	touch $(VENV)/.installed $@

$(VENV)/.reference: $(VENV)/.dev
	$(INSTALL) '$(TORCH)'
	$(INSTALL) --editable '.[dev,reference]'
	touch $@
