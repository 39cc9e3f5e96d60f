# Each target sets up what it needs in .venv, with uv if it is there, else with venv and pip.
#
#   make demo            ask the shipped model about a picture
#   make test            run the tests
#   make test-reference  the same with PyTorch and transformers, which turns on the live comparison
#   make test-native     build and run the tests of the C++ core
#   make sanitize        the same with the address, undefined-behaviour and thread sanitizers
#   make test-aarch64    the same for 64-bit Arm, with a cross compiler and qemu
#   make quantize        quantize the shipped model, with PyTorch
#   make lint            ruff, mypy, import-linter and clang-format
#   make bench           time the shipped model on this machine
#   make bench-compare   compare with other stacks; see benchmarks/README.md
#   make bench-serving   compare with other servers
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
# With pip, which installs the extras.
CREATE = uv venv --quiet --seed --python '$(or $(PYTHON),>=3.10,<3.14)' $(VENV)
INSTALL = uv pip install --quiet --python $(BIN)/python
WHEEL = uv build --quiet --wheel --out-dir dist .
else
CREATE = $(if $(PYTHON),$(PYTHON) -m venv $(VENV),$(error Python 3.10 to 3.13 is needed: install one or set PYTHON=))
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
WHEEL = $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
endif

# What an installation is compiled from, and all that is C++.
NATIVE := CMakeLists.txt $(wildcard native/*/CMakeLists.txt native/*.cpp native/emulator/* native/kernels/* native/model/* native/threads/*)
CXX_FILES = $(wildcard native/*.cpp native/*/*.cpp native/*/*.h native/*/*.inl)
NATIVE_JOBS ?= 2
comma := ,
# The tests of the C++ core: build/<first argument>, CMake's options; then a command that runs them.
NATIVE_TESTS = $(BIN)/cmake -S . -B build/$1 -DEDGEVL_MODULE=OFF -DEDGEVL_TESTS=ON $2 && \
	$(BIN)/cmake --build build/$1 --parallel $(NATIVE_JOBS)
RUN_NATIVE = $2 build/$1/kernels_test && $2 build/$1/model_test && $2 build/$1/emulator_test

# Two targets at once would install into the same environment.
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: demo test test-reference test-native sanitize test-aarch64 quantize lint bench bench-compare bench-serving wheel clean

demo: $(VENV)/.installed
	$(BIN)/edgevl chat tiny -q "What number is on the display?" -i examples/meter.png

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

test-reference: $(VENV)/.reference
	$(BIN)/python -m pytest $(ARGS)

test-native: $(VENV)/.dev
	$(call NATIVE_TESTS,native,)
	$(call RUN_NATIVE,native,)

sanitize: $(VENV)/.dev
	$(call NATIVE_TESTS,asan,-DEDGEVL_SANITIZE=address$(comma)undefined)
	$(call RUN_NATIVE,asan,)
	$(call NATIVE_TESTS,tsan,-DEDGEVL_SANITIZE=thread)
	build/tsan/model_test && build/tsan/emulator_test # kernels start no threads

# Processors that differ in the best set they have; model_test stops at an EDGEVL_ISA it cannot run.
AARCH64_CXX ?= aarch64-linux-gnu-g++
QEMU_AARCH64 ?= qemu-aarch64
RUN_AARCH64 = export EDGEVL_ISA=$2 && $(call RUN_NATIVE,aarch64,$(QEMU_AARCH64) -cpu $1)
test-aarch64: $(VENV)/.dev
	@command -v $(AARCH64_CXX) >/dev/null && command -v $(QEMU_AARCH64) >/dev/null || { echo \
	  "test-aarch64 needs $(AARCH64_CXX) and $(QEMU_AARCH64), on Debian in g++-aarch64-linux-gnu and qemu-user"; \
	  exit 1; }
	$(call NATIVE_TESTS,aarch64,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=$(AARCH64_CXX) -DCMAKE_EXE_LINKER_FLAGS=-static)
	$(call RUN_AARCH64,max,neon_i8mm)
	$(call RUN_AARCH64,neoverse-n1,neon)
	$(call RUN_AARCH64,cortex-a72,portable)

quantize: $(VENV)/.quantize
	rm -rf build/tiny-int4 build/tiny-int4.partial
	$(BIN)/edgevl quantize tiny -o build/tiny-int4 --vqa models/tiny/heldout/questions.jsonl $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

bench: $(VENV)/.installed
	$(BIN)/edgevl bench tiny --prompt-tokens 128,300 --image $(ARGS)

bench-compare: $(VENV)/.installed
	$(INSTALL) --editable '.[bench]'
	$(BIN)/python benchmarks/compare.py $(ARGS)

bench-serving: $(VENV)/.installed
	$(INSTALL) --editable '.[bench,serve]'
	$(BIN)/python benchmarks/serving.py $(ARGS)

wheel: $(VENV)/.installed
	rm -rf dist
	$(WHEEL)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.created:
	rm -rf $(VENV)
	$(CREATE)
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml $(NATIVE)
	$(INSTALL) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.created pyproject.toml $(NATIVE)
	$(INSTALL) --editable '.[dev]'
	touch $(VENV)/.installed $@

$(VENV)/.quantize: $(VENV)/.installed
	$(INSTALL) '$(TORCH)'
	$(INSTALL) --editable '.[quantize]'
	touch $@

$(VENV)/.reference: $(VENV)/.dev
	$(INSTALL) '$(TORCH)'
	$(INSTALL) --editable '.[dev,reference]'
	touch $@
