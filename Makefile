# `make demo` and `make test` need Python >= 3.10 with venv, a C++ compiler and make; the rest they install into VENV.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# The torch that is installed, and the package index it comes from (default: the one pip is configured for).
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
# The interpreter for `make gpu`: a GPU machine often brings its own torch.
GPU_PYTHON ?= $(PY)
OUT ?= out
# Processes that share the tests, a file each; each starts threads of its own, which must not spin while others work.
TEST_WORKERS ?= 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
# A change of TORCH is a change of the stamp's name, so it installs again.
TORCH_STAMP := $(VENV)/.stamp-$(subst /,-,$(subst =,-,$(TORCH)))
# Whatever is timed pins its threads: unpinned, short ops vary by more than what is measured.
PINNED := OMP_PROC_BIND=true OMP_PLACES=cores
TESTS := OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(TEST_WORKERS) --dist loadfile
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Tests of compiled code on small inputs, repeated for every instruction set and under sanitizers.
NATIVE_TESTS = -m "native and not full" $(shell grep -l 'mark[.]native' tests/test_*.py)
SANITIZED := build/sanitized
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1
# Python itself is not instrumented, so the runtimes are loaded before it; libstdc++ too, whose throw ASan wraps.
# Leaks are not looked for: Python and torch leave some at exit by design.
RUNTIMES = $(foreach name,libasan.so libubsan.so libstdc++.so,$(shell $${CXX:-g++} -print-file-name=$(name)))
SANITIZED_RUN = LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

.PHONY: help demo test test-full sanitized bench acceptance gpu lint build wheel clean

help:
	@echo "make demo       decode held-out text with the shipped pair: autoregressive, chain and tree side by side"
	@echo "make test       build, then run every test that is not marked full"
	@echo "make test-full  all tests, every CPU instruction set, sanitizers"
	@echo "make bench      benchmarks, table and pictures under $(OUT)/bench"
	@echo "make acceptance acceptance of every verifier beside the optimum, under $(OUT)/acceptance"
	@echo "make gpu        build, GPU tests, GPU benchmarks (GPU_PYTHON=... for an interpreter that has a CUDA torch)"
	@echo "make lint       ruff, clang-format"
	@echo "make build      compile the extension modules in place"
	@echo "make wheel      dist/*.whl"
	@echo "Variables: PYTHON VENV TORCH TORCH_INDEX OUT TEST_WORKERS PYTEST_ARGS DEMO_ARGS ACCEPTANCE_ARGS"

$(TORCH_STAMP):
	$(PYTHON) -m venv $(VENV)
	@if [ -z "$(TORCH_INDEX)" ] && ! command -v nvidia-smi >/dev/null; then \
	    echo "No NVIDIA GPU found. If pip now fetches CUDA libraries, TORCH_INDEX=<index of CPU wheels> avoids it."; fi
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	rm -f $(VENV)/.stamp-*
	touch $@

# The editable install carries no compiled code; `build` compiles in place, incrementally.
$(VENV)/.stamp-demo: pyproject.toml $(TORCH_STAMP)
	SPECDEC_NO_EXT=1 $(PIP) install -e '.[build,demo]'
	touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-demo
	SPECDEC_NO_EXT=1 $(PIP) install -e '.[dev]'
	touch $@

build: $(VENV)/.stamp-demo
	$(PY) setup.py --quiet build_ext --inplace

demo: build
	$(PINNED) $(PY) -m specdec_loop demo --out $(OUT)/demo.png $(DEMO_ARGS)

test: $(VENV)/.stamp-dev build
	$(TESTS) -m "not full" $(PYTEST_ARGS)

# Every instruction set that this machine runs, then the same tests on a copy that is built with sanitizers.
test-full: $(VENV)/.stamp-dev build sanitized
	$(TESTS) $(PYTEST_ARGS)
	tiers=$$($(PY) -c 'from specdec_kernels import _C; print(*_C.tiers())'); \
	for tier in $$tiers; do \
	    echo "== SPECDEC_CPU_ISA=$$tier"; \
	    SPECDEC_CPU_ISA=$$tier $(TESTS) -q $(NATIVE_TESTS); \
	done; \
	for tier in $$tiers; do \
	    echo "== sanitizers, SPECDEC_CPU_ISA=$$tier"; \
	    SPECDEC_CPU_ISA=$$tier $(SANITIZED_RUN) $(PY) -m pytest -q -p no:cacheprovider \
	        -o pythonpath="$(SANITIZED) python" $(NATIVE_TESTS); \
	done

# The sources are copied, so that neither build makes the other's objects out of date.
sanitized: $(VENV)/.stamp-dev
	mkdir -p $(SANITIZED)
	rm -rf $(SANITIZED)/csrc $(SANITIZED)/specdec_kernels
	cp -rp csrc specdec_kernels setup.py pyproject.toml README.md LICENSE $(SANITIZED)/
	rm -f $(SANITIZED)/specdec_kernels/*.so
	cd $(SANITIZED) && SPECDEC_REQUIRE_EXT=1 USE_CUDA=0 SPECDEC_CXXFLAGS="$(SANITIZE)" \
	    $(abspath $(PY)) setup.py --quiet build_ext --inplace

bench: $(VENV)/.stamp-dev build
	mkdir -p $(OUT)/bench
	$(PINNED) $(PY) -m pytest -q -s $(sort $(wildcard bench/bench_*.py)) --benchmark-json=$(OUT)/bench/results.json $(PYTEST_ARGS)
	$(PY) bench/report.py $(OUT)/bench/results.json --out $(OUT)/bench

acceptance: $(VENV)/.stamp-dev build
	$(PINNED) $(PY) bench/acceptance.py --out $(OUT)/acceptance $(ACCEPTANCE_ARGS)

gpu: $(if $(filter $(PY),$(GPU_PYTHON)),$(VENV)/.stamp-dev)
	$(GPU_PYTHON) bench/gpu.py --out $(OUT)/gpu

lint: $(VENV)/.stamp-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(if $(CPP),$(VENV)/bin/clang-format --dry-run -Werror $(CPP))

# `_C` and `_C_cuda` load in every Python from 3.10; `_host`, which is optional, in the version that built the wheel.
wheel: $(VENV)/.stamp-demo
	$(PIP) wheel --no-build-isolation --no-deps --config-settings=--build-option=--py-limited-api=cp310 \
	    --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info specdec_kernels/*.so
