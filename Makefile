# The commands of this repository. Everything else is CMake: see CMakePresets.json.
SHELL := /bin/bash
# One compiler process may take 2 GiB.
JOBS ?= $(shell awk -v cpus=$$(nproc) '/MemAvailable/ {n = int($$2 / 2097152); print n < 1 ? 1 : n < cpus ? n : cpus}' /proc/meminfo)
ARGS ?=
FUZZ_SECONDS ?= 60
SOURCES = $(shell git ls-files 'src/*.cpp' 'src/*.h' 'tests/*.cpp' 'tests/*.h' 'bench/*.cpp')

.PHONY: help run build test test-all test-gpu test-long test-client sanitizers fuzz check-format check-tidy \
  dependencies development-dependencies

help:
	@echo 'make run        build, then the demo (make run ARGS=--exit ends after the conversation)'
	@echo 'make build      build the program: build/tokenspeed'
	@echo 'make test       build and run the fast tests and the goldens'
	@echo 'make test-all   also the long tests, the sanitizers, the OpenAI client and the fuzzers (a minute each)'
	@echo 'make test-gpu   build and run everything that a GPU can check'

run: build
	build/tokenspeed demo $(ARGS)

dependencies:
	@scripts/install_dependencies.sh deps/apt.txt
development-dependencies:
	@scripts/install_dependencies.sh deps/apt.txt deps/apt-development.txt

build: dependencies
	cmake --preset release
	cmake --build --preset release --target tokenspeed -j $(JOBS)

test: dependencies
	cmake --preset release
	cmake --build --preset release -j $(JOBS)
	ctest --test-dir build/release -L fast -j $(JOBS) --output-on-failure

# Needs a GPU and a CUDA toolkit; the summary is the test program's last lines.
test-gpu: dependencies
	cmake --preset release
	cmake --build --preset release --target gpu_tests -j $(JOBS)
	build/release/gpu_tests

test-long:
	ctest --test-dir build/release -L long --output-on-failure

# OpenAI's own Python client against the demo model.
test-client: build development-dependencies
	python3 -m venv build/venv && build/venv/bin/pip install --quiet openai
	build/venv/bin/python tests/server/openai_client_test.py --binary build/tokenspeed
	python3 tests/server/golden_completions_test.py --binary build/tokenspeed

# The fast sets of these rooms under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer; model,
# text, server and app are to follow.
ASAN_ROOMS = base cache compile engine kernels runtime
TSAN_ROOMS = base engine
sanitizers: dependencies
	cmake --preset asan-ubsan
	cmake --build --preset asan-ubsan -j $(JOBS) --target $(ASAN_ROOMS:%=%_tests)
	for room in $(ASAN_ROOMS); do build/asan-ubsan/$${room}_tests --gtest_brief=1 || exit 1; done
	cmake --preset tsan
	cmake --build --preset tsan -j $(JOBS) --target $(TSAN_ROOMS:%=%_tests)
	for room in $(TSAN_ROOMS); do build/tsan/$${room}_tests --gtest_brief=1 || exit 1; done

fuzz: development-dependencies
	cmake --preset fuzz
	cmake --build --preset fuzz --target fuzzers -j $(JOBS)
	tests/fuzz/run_all.sh $(FUZZ_SECONDS) build/fuzz

test-all: test test-long test-client sanitizers fuzz

check-format:
	clang-format-14 --dry-run --Werror $(SOURCES)
# The rooms that are clean so far; model, runtime, server and text are to follow.
TIDY_ROOMS = app base cache compile engine kernels
check-tidy:
	printf '%s\n' $(filter $(TIDY_ROOMS:%=src/%/%),$(filter %.cpp,$(SOURCES))) | xargs -P $(JOBS) -n 4 clang-tidy-14 --quiet -p build/release
